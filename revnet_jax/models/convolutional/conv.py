"""A 2-D convolution with a fast gradient on CPUs; on other platforms it is XLA's own."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from revnet_jax.models.dtypes import at_least_float32

# Bytes of one chunk's columns in the CPU gradient: small enough to stay in the caches, large enough
# to amortise the start of a matrix product. Measured times hardly differ from 1 to 4 MiB.
_COLUMN_BYTES = 2 << 20


def conv(x_BHWC: jax.Array, kernel: jax.Array, *, stride: int = 1) -> jax.Array:
    """2-D convolution with "SAME" padding and no bias, as `lax.conv_general_dilated` defines it.

    Args:
      x_BHWC: images [B, H, W, Cin], float32, bfloat16 or float64.
      kernel: [kh, kw, Cin, Cout], of the same dtype.
      stride: step along both H and W.

    Returns:
      y_BHWC, [B, ceil(H / stride), ceil(W / stride), Cout], in the dtype of `x_BHWC`; products are
      summed in at least float32 and rounded once.

    Cost: the residuals are exactly `x_BHWC` and `kernel`; the gradient has the arithmetic of two
    convolutions. XLA's CPU gradient of a convolution is 5 to 30 times slower than necessary, so on
    CPU it is computed as matrix products over columns (im2col: the window of each output pixel,
    laid out flat), for as many images at a time as fit in 2 MiB. Temporaries are about three times
    that, at any batch size; bfloat16 adds a float32 copy of the result. Everything else is XLA's.

    Raises:
      ValueError: for operands that do not fit together, at trace time.
    """
    if x_BHWC.ndim != 4 or kernel.ndim != 4 or x_BHWC.shape[3] != kernel.shape[2]:
        raise ValueError(
            f"conv got x {x_BHWC.shape} and kernel {kernel.shape}; expected [B, H, W, Cin] and "
            "[kh, kw, Cin, Cout] with the same Cin: check the layout (channels come last in x)."
        )
    if x_BHWC.dtype != kernel.dtype or not jnp.issubdtype(x_BHWC.dtype, jnp.floating):
        raise ValueError(
            f"conv got x of {x_BHWC.dtype} and kernel of {kernel.dtype}; expected one floating "
            "dtype for both: cast one of them, so that the precision is your choice."
        )
    if stride < 1:
        raise ValueError(f"conv got stride {stride}; expected an integer of at least 1.")
    return _conv(stride, x_BHWC, kernel)


def _xla_conv(stride, x_BHWC, kernel):
    # No preferred_element_type for bfloat16: cuDNN and the TPU's matrix unit sum in float32 and
    # round the result anyway, and with it JAX would compute the gradient by float32 convolutions.
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x_BHWC, kernel, (stride, stride), "SAME", dimension_numbers=dims
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(stride, x_BHWC, kernel):
    return _xla_conv(stride, x_BHWC, kernel)


def _conv_fwd(stride, x_BHWC, kernel):
    # Not `_conv`: a nested custom_vjp would hide the convolution from the policy of `remat_dots`.
    return _xla_conv(stride, x_BHWC, kernel), (x_BHWC, kernel)


def _conv_bwd(stride, residuals, dy_BHWC):
    # Chosen by the platform of the lowering, because a CPU process may compile for a TPU.
    return lax.platform_dependent(
        *residuals,
        dy_BHWC,
        cpu=partial(_columns_grad, stride),
        default=lambda x, kernel, dy: jax.vjp(partial(_xla_conv, stride), x, kernel)[1](dy),
    )


_conv.defvjp(_conv_fwd, _conv_bwd)


def _columns_grad(stride, x_BHWC, kernel, dy_BHWC):
    """Both gradients, by matrix products over columns (im2col)."""
    # [m, n, H, W, Cin] and [m, n, H', W', Cout]: chunk i is [:, i].
    x_mnHWC = _chunked(x_BHWC, kernel, stride)
    dy_mnHWC = dy_BHWC.reshape(*x_mnHWC.shape[:2], *dy_BHWC.shape[1:])
    kernel_acc = kernel.astype(at_least_float32(kernel.dtype))

    def put_chunk(i, grads):
        dx_mnHWC, dkernel = grads
        # The derivative of slicing pads and adds: the pull-back sums overlapping windows (col2im).
        _, pull = jax.vjp(partial(_columns_dot, stride), _chunk(x_mnHWC, i), kernel_acc)
        dx, dkernel_chunk = pull(_chunk(dy_mnHWC, i))
        dx_mnHWC = lax.dynamic_update_index_in_dim(dx_mnHWC, dx, i, axis=1)
        return dx_mnHWC, dkernel + dkernel_chunk

    # The loop carries float32 sums that are rounded once at the end: XLA's CPU compiler would
    # convert a whole bfloat16 array to float32 and back for every in-place update.
    zeros = jnp.zeros(x_mnHWC.shape, kernel_acc.dtype), jnp.zeros_like(kernel_acc)
    dx_mnHWC, dkernel = lax.fori_loop(0, x_mnHWC.shape[1], put_chunk, zeros)
    return dx_mnHWC.reshape(x_BHWC.shape).astype(x_BHWC.dtype), dkernel.astype(kernel.dtype)


def _columns_dot(stride, x_BHWC, kernel):
    """The convolution of one chunk as one matrix product; its gradient is two products."""
    B, H, W, C = x_BHWC.shape
    kh, kw, _, Cout = kernel.shape
    (top, bottom), (left, right) = lax.padtype_to_pads((H, W), (kh, kw), (stride, stride), "SAME")
    x_BHWC = jnp.pad(x_BHWC, ((0, 0), (top, bottom), (left, right), (0, 0)))
    # From the first to the last pixel that a tap of the kernel reads.
    h_span, w_span = ((-(-size // stride) - 1) * stride + 1 for size in (H, W))
    windows = [
        lax.slice(x_BHWC, (0, i, j, 0), (B, i + h_span, j + w_span, C), (1, stride, stride, 1))
        for i in range(kh)
        for j in range(kw)
    ]
    # [B, H', W', kh kw Cin] @ [kh kw Cin, Cout]
    return jnp.concatenate(windows, axis=-1) @ kernel.reshape(-1, Cout)


def _chunked(x_BHWC, kernel, stride):
    """x as [m images, n chunks, H, W, C].

    The image axis comes first, so that a batch that is sharded over devices stays sharded within
    each chunk.
    """
    B, H, W, C = x_BHWC.shape
    taps = kernel.shape[0] * kernel.shape[1]
    image_bytes = (
        -(-H // stride) * -(-W // stride) * taps * C * at_least_float32(kernel.dtype).itemsize
    )
    # The columns of a 1x1 kernel are the image itself, at most strided: nothing to keep small.
    most = B if taps == 1 else max(1, _COLUMN_BYTES // image_bytes)
    # Chunks are equally large, so their size divides the batch.
    m = max(m for m in range(1, min(B, most) + 1) if B % m == 0)
    return x_BHWC.reshape(m, B // m, H, W, C)


def _chunk(a_mnHWC, i):
    a_mHWC = lax.dynamic_index_in_dim(a_mnHWC, i, axis=1, keepdims=False)
    return a_mHWC.astype(at_least_float32(a_mHWC.dtype))
