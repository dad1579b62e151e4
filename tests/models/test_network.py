"""Networks against the published table, and against the same network written out plainly."""

import contextlib
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from revnet_jax.core import STRATEGIES, Exactness, Grid
from revnet_jax.models import ConvNet, ModelOptions, Sweep, Variables, num_params
from revnet_jax.models.convolutional import network as network_module
from revnet_jax.models.convolutional import residual
from revnet_jax.models.convolutional.shape import ConvNetShape, groups
from tests import by_default

# The same optimised program, translated with less effort: compiling is what these tests pay for.
COMPILE_FAST = {"xla_backend_optimization_level": 0}
BATCH = 4

# (family, units, channels, bottleneck, stem, image size)
CIFAR = {
    "resnet32": ("resnet", (5, 5, 5), (16, 16, 32, 64), False, "cifar", 32),
    "revnet38": ("revnet", (3, 3, 3), (32, 32, 64, 112), False, "cifar", 32),
    "resnet110": ("resnet", (18, 18, 18), (16, 16, 32, 64), False, "cifar", 32),
    "revnet110": ("revnet", (9, 9, 9), (32, 32, 64, 128), False, "cifar", 32),
    "resnet164": ("resnet", (18, 18, 18), (16, 64, 128, 256), True, "cifar", 32),
    "revnet164": ("revnet", (9, 9, 9), (32, 128, 256, 512), True, "cifar", 32),
}
RESNET_CHANNELS, REVNET_CHANNELS = (64, 256, 512, 1024, 2048), (128, 512, 1024, 2048, 3328)
IMAGENET = {
    "resnet50": ("resnet", (3, 4, 6, 3), RESNET_CHANNELS, True, "imagenet", 224),
    "resnet101": ("resnet", (3, 4, 23, 3), RESNET_CHANNELS, True, "imagenet", 224),
    "revnet56": ("revnet", (2, 2, 3, 2), REVNET_CHANNELS, True, "imagenet", 224),
    "revnet104": ("revnet", (2, 2, 11, 2), REVNET_CHANNELS, True, "imagenet", 224),
}
# Every kind of unit occurs: the very first, one that changes shape, and a chain (of two).
TINY = {
    "revnet": ("revnet", (1, 3), (8, 8, 16), False, "cifar", 8),
    "revnet bottleneck": ("revnet", (1, 2), (6, 16, 32), True, "imagenet", 16),
    "resnet": ("resnet", (1, 2), (6, 6, 8), False, "cifar", 8),
}


def architecture(name, num_classes=10):
    family, units, channels, bottleneck, stem, size = (CIFAR | IMAGENET | TINY)[name]
    return ConvNetShape(family, units, channels, bottleneck, stem, (size, size, 3), num_classes)


def abstract_variables(network):
    return jax.eval_shape(network.init, jax.random.key(0))


def default_backprop(arch):
    return "reverse" if arch.family == "revnet" else "store"


# --- Parameter counts -----------------------------------------------------------------------------


def parameter_count(arch):
    """In closed form: a convolution has no bias, a normalisation two vectors, a projection only
    with bottlenecks, and the first unit of all lacks the leading normalisation of f."""
    conv = lambda size, a, b: size * size * a * b
    norm = lambda c: 2 * c

    def branch(a, b):
        if arch.bottleneck:
            m = b // 4
            return norm(a) + conv(1, a, m) + norm(m) + conv(3, m, m) + norm(m) + conv(1, m, b)
        return norm(a) + conv(3, a, b) + norm(b) + conv(3, b, b)

    streams = {"resnet": 1, "revnet": 2}[arch.family]
    stem, *widths = (c // streams for c in arch.channels)
    total = conv({"cifar": 3, "imagenet": 7}[arch.stem], 3, stem * streams) + norm(stem * streams)
    total -= norm(stem)
    a = stem
    for stage, (depth, b) in enumerate(zip(arch.units, widths, strict=True)):
        total += branch(a, b) + (depth - 1) * branch(b, b)
        if streams == 2:
            total += depth * branch(b, b)
        if arch.bottleneck and (a != b or stage > 0):
            total += streams * conv(1, a, b)
        a = b
    last = a * streams
    return total + norm(last) + last * arch.num_classes + arch.num_classes


@pytest.mark.parametrize(
    ("name", "num_classes", "published"),
    [
        ("resnet32", 10, 464_154),
        ("resnet32", 100, 470_004),
        ("revnet38", 10, 464_890),
        ("revnet38", 100, 475_060),
        ("resnet110", 10, 1_727_962),
        ("resnet110", 100, 1_733_812),
        ("revnet110", 10, 1_729_194),
        ("revnet110", 100, 1_740_804),
        ("resnet164", 10, 1_703_258),
        ("resnet164", 100, 1_726_388),
        ("revnet164", 10, 1_748_778),
        ("revnet164", 100, 1_794_948),
        ("resnet50", 1000, None),
        ("resnet101", 1000, None),
        ("revnet56", 1000, None),
        ("revnet104", 1000, None),
    ],
)
def test_parameter_count(name, num_classes, published):
    """Exactly the published one (CIFAR), and the closed form everywhere."""
    arch = architecture(name, num_classes)
    variables = abstract_variables(ConvNet(arch, ModelOptions(backprop=default_backprop(arch))))
    count = num_params(variables)
    assert count == parameter_count(arch)
    if published is not None:
        assert count == published
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


# --- The network written out ----------------------------------------------------------------------


def plain_conv(x_BHWC, kernel, *, stride=1):
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x_BHWC, kernel, (stride, stride), "SAME", dimension_numbers=dims
    )


def plain_norm(params, stats, x, train):
    """Normalised and rectified, and the running averages after it (decay 0.99, eps 1e-3)."""
    wide = lambda v: v.reshape(1, 1, 1, -1)
    mean, var = stats["mean"], stats["var"]
    if train:
        mean = jnp.mean(x, (0, 1, 2))
        var = jnp.mean((x - wide(mean)) ** 2, (0, 1, 2))
        moments = {"mean": mean, "var": var}
        stats = jax.tree.map(lambda old, new: 0.99 * old + 0.01 * new, stats, moments)
    x = (x - wide(mean)) / jnp.sqrt(wide(var) + 1e-3)
    return jnp.maximum(x * wide(params["scale"]) + wide(params["bias"]), 0), stats


def plain_branch(params, stats, x, stride, activate_first, train):
    convs, norms = params["convs"], iter(params["norms"])
    new_stats = {}
    for i in range(len(convs)):
        if i > 0 or activate_first:
            j = next(norms)
            x, new_stats[j] = plain_norm(params["norms"][j], stats["norms"][j], x, train)
        x = plain_conv(x, convs[i]["kernel"], stride=stride if i == 0 else 1)
    assert next(norms, None) is None
    return x, {"norms": new_stats}


def plain_shortcut(params, x, out_channels, stride):
    if "kernel" in params:
        return plain_conv(x, params["kernel"], stride=stride)
    B, H, W, C = x.shape
    x = x.reshape(B, H // stride, stride, W // stride, stride, C).mean((2, 4))
    zeros = jnp.zeros((*x.shape[:3], (out_channels - C) // 2), x.dtype)
    return jnp.concatenate([zeros, x, zeros], axis=-1)


def plain_stem(arch, params, stats, image, train):
    stride = 1 if arch.stem == "cifar" else 2
    x = plain_conv(image, params["conv"]["kernel"], stride=stride)
    x, new_norm = plain_norm(params["norm"], stats["norm"], x, train)
    if arch.stem == "imagenet":
        # Even sizes: "SAME" pads the far edges only, and after a ReLU nothing is below 0.
        _, H, W, _ = x.shape
        x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        windows = [x[:, i : i + H : 2, j : j + W : 2] for i in range(3) for j in range(3)]
        x = functools.reduce(jnp.maximum, windows)
    return x, {"norm": new_norm}


def plain_unit(arch, params, stats, x, out_channels, stride, first, train):
    """`y1 = x1 + f(x2)`, `y2 = x2 + g(y1)`; or `y = x + f(x)` with a single stream."""
    n, changes = len(x), stride > 1 or x[0].shape[-1] != out_channels
    new_stats = list(stats)
    if changes:
        x0 = [plain_shortcut(params[n + i], x[i], out_channels, stride) for i in range(n)]
    else:
        x0 = list(x)
    u, new_stats[0] = plain_branch(params[0], stats[0], x[-1], stride, not first, train)
    y = [x0[0] + u]
    if n == 2:
        u, new_stats[1] = plain_branch(params[1], stats[1], y[0], 1, True, train)
        y.append(x0[1] + u)
    return tuple(y), tuple(new_stats)


def plain_network(arch, variables, image, train=True):
    """(logits, running averages): loops over stages and units, nothing else."""
    params, stats = variables
    new_stats = {}
    x, new_stats["stem"] = plain_stem(arch, params["stem"], stats["stem"], image, train)
    streams = {"resnet": 1, "revnet": 2}[arch.family]
    x = tuple(jnp.split(x, streams, axis=-1))
    for stage, depth in enumerate(arch.units):
        out_channels = arch.channels[stage + 1] // streams
        layers = {}
        for i in range(depth):
            name = f"stage{stage + 1}_{'b' if i else 'a'}"
            stride = 2 if stage and not i else 1
            unit_params, unit_stats = params[name], stats[name]
            stacked = stride == 1 and x[0].shape[-1] == out_channels
            if stacked:
                layer = max(i - 1, 0)
                at = lambda leaf, layer=layer: leaf[layer]
                unit_params, unit_stats = jax.tree.map(at, (unit_params, unit_stats))
            x, unit_stats = plain_unit(
                arch, unit_params, unit_stats, x, out_channels, stride, stage == i == 0, train
            )
            layers.setdefault((name, stacked), []).append(unit_stats)
        for (name, stacked), units in layers.items():
            stack = lambda *leaves: jnp.stack(leaves)
            new_stats[name] = jax.tree.map(stack, *units) if stacked else units[0]
    x = jnp.concatenate(x, axis=-1)
    head = params["head"]
    x, new_norm = plain_norm(head["norm"], stats["head"]["norm"], x, train)
    new_stats["head"] = {"norm": new_norm}
    logits = x.mean((1, 2)) @ head["dense"]["kernel"] + head["dense"]["bias"][None]
    return logits, new_stats


# --- Running them ---------------------------------------------------------------------------------


def random_variables(network, dtype=jnp.float32):
    """Nothing at its initial value: scales, biases and running averages are random too."""
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        normal = rng.normal(size=shape.shape)
        match path[-1].key:
            case "kernel":
                x = normal * (2 / np.prod(shape.shape[-4:-1])) ** 0.5
            case "scale" | "var":
                x = np.exp(0.3 * normal)
            case "bias" | "mean":
                x = 0.3 * normal
        return jnp.asarray(x, dtype)

    return jax.tree_util.tree_map_with_path(leaf, abstract_variables(network))


def batch(arch, dtype=jnp.float32, size=BATCH):
    rng = np.random.default_rng(1)
    image = rng.normal(size=(size, *arch.image_shape))
    return jnp.asarray(image, dtype), jnp.asarray(rng.integers(arch.num_classes, size=size))


def loss_and_gradient(apply, compiler_options=None):
    """Jitted `(params, probes, stats, image, label) -> ((loss, (logits, stats)), gradients)`."""

    def loss(params, probes, stats, image, label):
        logits, stats = apply(Variables(params, stats), image, probes)
        log_p = jax.nn.log_softmax(logits)
        return -jnp.mean(log_p[jnp.arange(len(label)), label]), (logits, stats)

    grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return jax.jit(grad, compiler_options=compiler_options)


def train_step(network):
    return lambda variables, image, probes: network.apply(
        variables, image, train=True, sweep=Sweep(probes)
    )


def relative_error(tree, true_tree):
    """Relative L2 distance over all leaves together."""
    flat = lambda t: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(t)])
    a, b = flat(tree), flat(true_tree)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@contextlib.contextmanager
def float64_parts():
    """Float64, and XLA's convolution, which compiles in half the time."""
    with (
        jax.enable_x64(True),
        # flax's own float64 statistics fail under strict promotion.
        jax.numpy_dtype_promotion("standard"),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(residual, "conv", plain_conv)
        yield


@pytest.mark.parametrize("name", by_default(TINY, "revnet"))
def test_equals_the_plain_network(name):
    """Logits, running averages and the gradient of every parameter, in float64 to 1e-9."""
    arch = architecture(name)
    with float64_parts():
        network = ConvNet(
            arch,
            ModelOptions(backprop=default_backprop(arch), compute_dtype=jnp.float64, grid=None),
        )
        variables = random_variables(network, jnp.float64)
        args = variables.params, None, variables.stats, *batch(arch, jnp.float64)
        got = loss_and_gradient(train_step(network), COMPILE_FAST)(*args)
        plain = lambda variables, image, probes: plain_network(arch, variables, image)
        want = loss_and_gradient(plain, COMPILE_FAST)(*args)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == w.dtype == jnp.float64
        assert g.shape == w.shape
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-9 * max(1, np.max(np.abs(w))))
    for path, leaf in jax.tree_util.tree_leaves_with_path(want[1][0]):
        assert np.any(np.asarray(leaf) != 0), jax.tree_util.keystr(path)


# --- Strategies -----------------------------------------------------------------------------------


def run(backprop, compute_dtype=jnp.float32):
    """One training step of the tiny RevNet on the grid."""
    arch = architecture("revnet")
    network = ConvNet(arch, ModelOptions(backprop=backprop, compute_dtype=compute_dtype))
    variables = random_variables(network)
    step = loss_and_gradient(train_step(network), COMPILE_FAST)
    (loss, (logits, stats)), (grads, exactness) = step(
        variables.params, network.probes(), variables.stats, *batch(arch)
    )
    return Run(loss, logits, stats, grads, exactness)


class Run(NamedTuple):
    loss: jax.Array
    logits: jax.Array
    stats: dict
    grads: dict
    exactness: dict[str, Exactness]


def plain_forward(train):
    arch = architecture("revnet")
    variables = random_variables(ConvNet(arch))
    apply = jax.jit(
        lambda variables, image: plain_network(arch, variables, image, train),
        compiler_options=COMPILE_FAST,
    )
    return apply(variables, batch(arch)[0])


def assert_same_bits(tree, true_tree):
    def same(a, b):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))

    jax.tree.map(same, tree, true_tree)


@pytest.mark.thorough
def test_strategies_are_one_function(monkeypatch):
    """One loss, one gradient, and running averages updated once, to the bit."""
    monkeypatch.setattr(residual, "conv", plain_conv)
    store, *others = (run(backprop) for backprop in STRATEGIES)
    for got in others:
        np.testing.assert_allclose(got.loss, store.loss, rtol=1e-6)
        assert relative_error(got.grads, store.grads) < 1e-5
        # The operation before the chains, which a custom gradient can cut off.
        assert relative_error(got.grads["stem"], store.grads["stem"]) < 1e-5
        assert_same_bits(got.stats, store.stats)
    assert all(np.all(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(store.grads["stem"]))
    # 0.99 of the old and 0.01 of this batch's moments: a recompute does not count again. A
    # stream on the grid differs from the plain one by the grid's resolution, 2.4e-4.
    old = random_variables(ConvNet(architecture("revnet"))).stats
    logits, stats = plain_forward(train=True)
    change = lambda new: jax.tree.map(jnp.subtract, new, old)
    assert relative_error(change(store.stats), change(stats)) < 2e-3
    assert relative_error(store.logits, logits) < 2e-3


def test_evaluation(monkeypatch):
    """By the running averages, which stay as they are: an image's logits are its own."""
    monkeypatch.setattr(residual, "conv", plain_conv)
    arch = architecture("revnet")
    image, _ = batch(arch)
    want, _ = plain_forward(train=False)
    for backprop in ("store", "reverse"):
        network = ConvNet(arch, ModelOptions(backprop=backprop))
        variables = random_variables(network)
        apply = functools.partial(network.apply, train=False)
        apply = jax.jit(apply, compiler_options=COMPILE_FAST)
        logits, stats = apply(variables, image)
        assert_same_bits(stats, variables.stats)
        assert relative_error(logits, want) < 2e-3
        among_others, _ = apply(variables, jnp.concatenate([image[:1], 3 * image[1:] + 1]))
        np.testing.assert_array_equal(among_others[0], logits[0])
        assert np.all(np.asarray(among_others[1:] != logits[1:]))


# --- Mixed precision ------------------------------------------------------------------------------


@pytest.mark.thorough
def test_bfloat16_is_undone_exactly():
    """With the convolution of this platform: other bits in the backward loop would show."""
    got, want = run("reverse", jnp.bfloat16), run("store", jnp.bfloat16)
    assert set(got.exactness) == {"stage1_a", "stage2_b"}
    for exactness in got.exactness.values():
        assert exactness.mismatches == 0
        assert exactness.max_difference == 0
        assert 1 < exactness.max_abs < Grid().limit(jnp.float32)
    assert relative_error(got.grads, want.grads) < 1e-6
    assert_same_bits(got.stats, want.stats)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", TINY)
def test_streams_and_logits_are_float32(name, monkeypatch):
    arch = architecture(name)
    network = ConvNet(
        arch, ModelOptions(backprop=default_backprop(arch), compute_dtype=jnp.bfloat16)
    )
    seen, convolved = [], []

    def sequence(sections, x, **kwargs):
        seen.extend(leaf.dtype for leaf in x)
        return network_module_sequence(sections, x, **kwargs)

    def conv(x_BHWC, kernel, **kwargs):
        convolved.append((x_BHWC.dtype, kernel.dtype))
        return plain_conv(x_BHWC, kernel, **kwargs)

    network_module_sequence = network_module.sequence
    monkeypatch.setattr(network_module, "sequence", sequence)
    monkeypatch.setattr(residual, "conv", conv)
    variables = abstract_variables(network)
    logits, stats = jax.eval_shape(
        functools.partial(network.apply, train=True), variables, batch(arch)[0]
    )
    assert set(seen) == {jnp.dtype("float32")}
    assert set(convolved) == {(jnp.dtype("bfloat16"),) * 2}
    assert logits.shape == (BATCH, 10)
    assert logits.dtype == jnp.float32
    same = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)
    assert jax.tree.all(jax.tree.map(same, stats, variables.stats))


# --- Structure ------------------------------------------------------------------------------------


def test_chains_of_revnet_110():
    network = ConvNet(architecture("revnet110"))
    names = ["stage1_a", "stage1_b", "stage2_a", "stage2_b", "stage3_a", "stage3_b"]
    assert [group.name for group in network.groups] == names
    assert [group.depth for group in network.groups] == [1, 8, 1, 8, 1, 8]
    assert {name: [group.name for group in chain] for name, chain in network.chains.items()} == {
        "stage1_a": ["stage1_a", "stage1_b"],
        "stage2_b": ["stage2_b"],
        "stage3_b": ["stage3_b"],
    }
    assert set(network.probes()) == set(network.chains)
    widths = [(g.unit.in_channels, g.unit.out_channels, g.unit.stride) for g in network.groups]
    stage1, stage2, stage3 = (16, 16, 1), (32, 32, 1), (64, 64, 1)
    assert widths == [stage1, stage1, (16, 32, 2), stage2, (32, 64, 2), stage3]


def test_bottlenecks_change_width_in_the_first_unit():
    """Stage 1 too has a transition then, of stride 1."""
    found = groups(architecture("revnet104"))
    assert [s.depth for s in found] == [1, 1, 1, 1, 1, 10, 1, 1]
    assert [s.unit.stride for s in found] == [1, 1, 2, 1, 2, 1, 2, 1]
    assert [s.name for s in found if s.unit.keeps_shape] == [f"stage{i}_b" for i in (1, 2, 3, 4)]


@pytest.mark.parametrize("name", ["revnet110", "resnet164"])
def test_only_the_first_f_skips_its_leading_normalisation(name):
    arch = architecture(name)
    params = abstract_variables(ConvNet(arch, ModelOptions(backprop=default_backprop(arch)))).params
    convs = 3 if arch.bottleneck else 2
    for group in groups(arch):
        modules = params[group.name][: arch.num_streams]
        assert [len(m["convs"]) for m in modules] == [convs] * arch.num_streams
        f_norms = convs - 1 if group.name == "stage1_a" else convs
        assert [len(m["norms"]) for m in modules] == [f_norms, convs][: arch.num_streams]


def test_init():
    """Layers of a chain, and f and g, start apart from each other; He scale, fan-out."""
    arch = ConvNetShape("revnet", (3,), (32, 32), False, "cifar", (8, 8, 3), 10)
    network = ConvNet(arch)
    params, stats = jax.jit(network.init, compiler_options=COMPILE_FAST)(jax.random.key(0))
    kernels = [np.asarray(m["convs"][0]["kernel"]) for m in params["stage1_b"]]
    assert kernels[0].shape == (2, 3, 3, 16, 16)
    distinct = [kernel[i] for kernel in kernels for i in range(2)]
    for i, kernel in enumerate(distinct):
        assert np.std(kernel) == pytest.approx((2 / (9 * 16)) ** 0.5, rel=0.1)
        assert all(np.max(np.abs(kernel - other)) > 0.01 for other in distinct[:i])
    for norm in params["stage1_b"][0]["norms"].values():
        np.testing.assert_array_equal(norm["scale"], 1)
        np.testing.assert_array_equal(norm["bias"], 0)
    for norm in stats["stage1_b"][0]["norms"].values():
        np.testing.assert_array_equal(norm["mean"], 0)
        np.testing.assert_array_equal(norm["var"], 1)


ERRORS = {
    "family": ({"family": "densenet"}, "got family='densenet' .*expected one of resnet, revnet"),
    "stem": ({"stem": "mnist"}, "stem='mnist', expected .*one of cifar, imagenet"),
    "a stage too few": ({"units": (1,)}, r"got units=\(1,\), channels=\(8, 8, 16\).*expected"),
    "an empty stage": ({"units": (1, 0)}, r"got units=\(1, 0\).*expected positive sizes"),
    "no stage": ({"units": (), "channels": (8,)}, r"got units=\(\).*expected positive sizes"),
    "no channels": ({"channels": (8, 8, 0)}, r"got .*channels=\(8, 8, 0\).*positive sizes"),
    "no classes": ({"num_classes": 0}, r"got .*num_classes=0, expected positive sizes"),
    "odd channels": (
        {"channels": (8, 8, 15)},
        r"got channels=\(8, 8, 15\), expected a multiple of",
    ),
    "odd stem": (
        {"channels": (7, 8, 16)},
        r"got channels=\(7, 8, 16\), .* 2 for the stem and of 2",
    ),
    "odd bottleneck": (
        {"channels": (8, 12, 16), "bottleneck": True},
        r"got channels=\(8, 12, 16\), expected a multiple of 2 for the stem and of 8",
    ),
    "fewer channels": ({"channels": (8, 16, 8)}, r"got channels=\(8, 16, 8\), .*not to decrease"),
}
GOOD = {
    "family": "revnet",
    "units": (1, 3),
    "channels": (8, 8, 16),
    "bottleneck": False,
    "stem": "cifar",
    "image_shape": (8, 8, 3),
    "num_classes": 10,
}


@pytest.mark.parametrize("case", ERRORS)
def test_clear_error(case):
    changes, message = ERRORS[case]
    with pytest.raises(ValueError, match=message) as caught:
        ConvNetShape(**(GOOD | changes))
    assert "\n" not in str(caught.value)


def test_a_probe_of_another_name_is_an_error():
    """As it is in models of one chain."""
    arch = architecture("revnet")
    network = ConvNet(arch, ModelOptions(backprop="reverse"))
    variables, sweep = abstract_variables(network), Sweep({"another": Exactness.probe()})
    with pytest.raises(KeyError):
        jax.eval_shape(
            functools.partial(network.apply, train=True, sweep=sweep), variables, batch(arch)[0]
        )


def test_a_resnet_has_no_inverse():
    with pytest.raises(ValueError, match="got backprop='reverse' for a resnet, exp") as caught:
        ConvNet(architecture("resnet32"), ModelOptions(backprop="reverse"))
    assert "\n" not in str(caught.value)


# --- Memory ---------------------------------------------------------------------------------------


def temporary_bytes(backprop, depth):
    """Those of the compiled gradient; variables, gradients and new averages do not count."""
    arch = ConvNetShape("revnet", (1, depth), (8, 8, 16), False, "cifar", (16, 16, 3), 10)
    network = ConvNet(arch, ModelOptions(backprop=backprop))
    variables = abstract_variables(network)
    image = jax.ShapeDtypeStruct((16, 16, 16, 3), jnp.float32)
    label = jax.ShapeDtypeStruct((16,), jnp.int32)
    gradient = loss_and_gradient(train_step(network), COMPILE_FAST)
    compiled = gradient.lower(variables.params, None, variables.stats, image, label).compile()
    return compiled.memory_analysis().temp_size_in_bytes


# One stream of the second stage, float32: images * height * width * channels.
STREAM_BYTES = 4 * 16 * 8 * 8 * 8


@pytest.mark.thorough
def test_memory_of_reverse_does_not_depend_on_depth(monkeypatch):
    """Six more units, and not a single stream more."""
    monkeypatch.setattr(residual, "conv", plain_conv)
    shallow, deep = (temporary_bytes("reverse", depth) for depth in (3, 9))
    assert abs(deep - shallow) <= min(0.01 * shallow, STREAM_BYTES)


@pytest.mark.thorough
def test_memory_of_store_grows_with_every_unit(monkeypatch):
    """By what each branch reads, and what its first convolution returns."""
    monkeypatch.setattr(residual, "conv", plain_conv)
    shallow, deep = (temporary_bytes("store", depth) for depth in (3, 9))
    assert deep - shallow == pytest.approx(6 * 4 * STREAM_BYTES, rel=0.01)
