"""Counts the arithmetic of a program in its jaxpr, before compilation."""

from __future__ import annotations

import math

from jax.extend.core import ClosedJaxpr, Jaxpr, jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr


def arithmetic(jaxpr: ClosedJaxpr, *, platform: str) -> int:
    """FLOPs of a program's matrix products and convolutions, 2 per multiply-add.

    Args:
      jaxpr: `jax.jit(function).trace(*args).jaxpr`.
      platform: "cpu", "tpu" or "gpu": its branch of a `lax.platform_dependent` is counted.

    A loop's body counts as often as it runs (once if that is known only at run time), a
    conditional as its most expensive branch, and unused results not at all. Products with the
    zeros that pad or dilate a convolution are left out, as in XLA's cost analysis, which however
    counts the body of every loop once. A Pallas kernel counts with all blocks of its grid, also
    those that it skips (half of causal attention). cuDNN's attention counts as 2 products forward
    and 5 backward, where the scores are recomputed; half of that if causal, and with a window only
    the scores inside it.
    """
    # Drops what nobody reads, as the compiler will: some of what `jax.checkpoint` computes again.
    needed, _ = dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.out_avals))
    # JAX lowers for CUDA or ROCm, so that no branch is for "gpu".
    return _count(needed, {"gpu": "cuda"}.get(platform, platform))


def _count(jaxpr: Jaxpr | ClosedJaxpr, platform: str) -> int:
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return sum(_count_equation(equation, platform) for equation in jaxpr.eqns)


# Primitives of `jax.nn.dot_product_attention(implementation="cudnn")`, and their matrix products.
_CUDNN_PRODUCTS = {
    "dot_product_attention_fwd_wrapper": 2,
    "dot_product_attention_bwd_wrapper": 5,
}


def _count_equation(equation, platform):
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot(equation)
    if name == "conv_general_dilated":
        return _convolution(equation)
    if name == "scan":
        return params["length"] * _count(params["jaxpr"], platform)
    if name == "pallas_call":
        # The kernel's jaxpr is of one block of the grid.
        return math.prod(params["grid_mapping"].grid) * sum(
            _count(inner, platform) for inner in jaxprs_in_params(params)
        )
    if name == "shard_map":  # inside, shapes are of one device along the manual mesh axes
        inside = sum(_count(inner, platform) for inner in jaxprs_in_params(params))
        sizes = dict(params["mesh"].shape)
        return math.prod(sizes[axis] for axis in params["newly_manual_axes"]) * inside
    if name in _CUDNN_PRODUCTS:
        return _CUDNN_PRODUCTS[name] * _scores(equation)
    if name == "ragged_dot_general":
        lhs, (out,) = equation.invars[0].aval, equation.outvars
        # [rows, in] x [groups, in, out]: each row meets the kernel of its own group only.
        return 2 * lhs.size * out.aval.shape[-1]
    if name == "cond":
        counts = [_count(branch, platform) for branch in params["branches"]]
        # `platform_dependent` is a conditional over platforms, decided at lowering.
        platforms = params.get("branches_platforms")
        return max(counts) if platforms is None else counts[_chosen(platforms, platform)]
    return sum(_count(inner, platform) for inner in jaxprs_in_params(params))


def _chosen(platforms, platform):
    """The index of the branch for `platform`; `None` in `platforms` marks the default branch."""
    own = [i for i, names in enumerate(platforms) if names is not None and platform in names]
    return own[0] if own else platforms.index(None)


def _dot(equation):
    (contracted, _), _ = equation.params["dimension_numbers"]
    lhs, (out,) = equation.invars[0].aval, equation.outvars
    # Batch and free axes are in the result; each of its elements sums over the contracted axes.
    return 2 * math.prod(out.aval.shape) * math.prod(lhs.shape[i] for i in contracted)


def _scores(equation):
    """FLOPs of one matrix product in cuDNN's attention, over T x S scores in each head."""
    query, key = (var.aval.shape for var in equation.invars[:2])
    tokens, heads = (1, 2) if equation.params["layout"] == 0 else (2, 1)  # BTNH or BNTH
    causal = equation.params["mask_type"].name.endswith("CAUSAL")
    window = equation.params["sliding_window_length"]
    pairs = pairs_read(query[tokens], key[tokens], causal=causal, window=window)
    return 2 * query[0] * query[heads] * query[3] * pairs


def pairs_read(T: int, S: int, *, causal: bool, window: int | None) -> int:
    """The number of (query, key) pairs that attention computes for T queries and S keys.

    Args:
      window: as in `attend`; None or 0 for no window.

    Counted as areas: causal attention has half of all pairs.
    """
    if not causal:
        return T * S
    window = window or 0
    # The first tokens have fewer tokens before them than the window: a triangle is missing.
    # window T - window^2 / 2 pairs.
    return window * (2 * T - window) // 2 if 0 < window < T else T * S // 2


def _convolution(equation):
    params = equation.params
    numbers = params["dimension_numbers"]
    lhs, rhs, out = (var.aval.shape for var in (*equation.invars, *equation.outvars))
    taps = 1
    for i, padding in enumerate(params["padding"]):
        taps *= _valid_taps(
            lhs[numbers.lhs_spec[2 + i]],
            rhs[numbers.rhs_spec[2 + i]],
            out[numbers.out_spec[2 + i]],
            padding_low=padding[0],
            stride=params["window_strides"][i],
            lhs_dilation=params["lhs_dilation"][i],
            rhs_dilation=params["rhs_dilation"][i],
        )
    # Specs list batch and channels before the spatial axes, for a kernel output before input
    # channels. These are the input channels of one group.
    batch, out_channels = (out[numbers.out_spec[i]] for i in (0, 1))
    return 2 * batch * out_channels * rhs[numbers.rhs_spec[1]] * taps


def _valid_taps(size, kernel, out, *, padding_low, stride, lhs_dilation, rhs_dilation):
    """Pairs of output position and kernel element, along one axis, that read an input element.

    The others read padding, or zeros between the elements of a dilated input.
    """
    # Output o and kernel element k meet at position stride o + rhs_dilation k - padding of the
    # dilated input, whose elements lie lhs_dilation apart.
    positions = (
        stride * o + rhs_dilation * k - padding_low for o in range(out) for k in range(kernel)
    )
    return sum(0 <= p <= (size - 1) * lhs_dilation and p % lhs_dilation == 0 for p in positions)
