"""The benchmark's suites, one for a laptop and two for a large GPU, and how to run them."""

from __future__ import annotations

import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from revnet_jax.benchmark.limits import Axis, device_limit_bytes, find_limit
from revnet_jax.benchmark.models import (
    LEARNING_RATE,
    ConfigModel,
    MlpChain,
    TransformerChain,
)
from revnet_jax.benchmark.steps import Setting, compare_strategies
from revnet_jax.config import language_model
from revnet_jax.errors import UserError
from revnet_jax.planning.variants import parse_variant

BASIC = ("store", "remat", "reverse")
SEARCH_SECONDS = 60  # expected for one limit under one strategy, which compiles up to six programs


class Search(NamedTuple):
    """A limit to find under each strategy; see `find_limit`."""

    model: Any
    axis: Axis
    layers: int
    batch: int
    strategies: tuple[str, ...]
    deterministic: bool = False


class Suite(NamedTuple):
    """Settings to compare and limits to search. minutes: the default time budget; None: no end."""

    settings: tuple[Setting, ...]
    searches: tuple[Search, ...] = ()
    minutes: float | None = None


class SuitePart(NamedTuple):
    """What is measured at a time: a setting of a suite, or a search under one strategy.

    Attributes:
      title: says what it is, in progress lines.
      sizes: the model and its sizes, for the row of a part that fails.
      may_take_seconds: expected duration.
      measure: returns the rows.
    """

    title: str
    sizes: dict[str, Any]
    may_take_seconds: float
    measure: Callable[[], Iterable[dict[str, Any]]]


def suites(config: ConfigDict, lm_config: ConfigDict) -> dict[str, Suite]:
    """The suites by name.

    Args:
      config: of the RevNet to measure, with three equal stages.
      lm_config: of the language model that the GPU suite trains at its own depth.
    """
    of_gpu = gpu(config, ConfigModel(lm_config, "lm_124m", "tokens"))
    return {
        "laptop": laptop(ConfigModel(config), decoder(width=256, context=512)),
        "exact": Suite(tuple(setting for setting in of_gpu.settings if setting.deterministic)),
        "gpu": of_gpu,
    }


def decoder(*, width: int, context: int, dtype: str = "float32") -> ConfigModel:
    """A byte-level language model whose heads have size 64."""
    config = language_model()
    config.data.context = context
    heads = width // 64
    config.model.update({"width": width, "heads": heads, "kv_heads": heads, "hidden": 3 * width})
    config.model.compute_dtype = dtype
    config.optimizer.name = "sgd"
    config.schedule.update({"learning_rate": LEARNING_RATE, "warmup_steps": 0})
    return ConfigModel(config, "decoder", "tokens")


def laptop(revnet: ConfigModel, lm: ConfigModel) -> Suite:
    """For two cores, under ten minutes; settings of 0 seconds are only compiled, for memory."""
    mlp, transformer = MlpChain(), TransformerChain()
    some = (*BASIC, "remat_dots")
    # At this width arithmetic outweighs the cost of storing, so that the price of a mixture shows.
    wide, mixed = (
        MlpChain(width=2048, name="wide_mlp"),
        ("store", "reverse+3", "reverse+2", "reverse+1"),
    )
    return Suite(
        (
            Setting(mlp, layers=32, batch=1024, strategies=(*some, "reverse/lockstep"), seconds=70),
            Setting(wide, layers=4, batch=256, strategies=(*mixed, "reverse"), seconds=80),
            Setting(mlp, layers=64, batch=1024, strategies=some, seconds=0),
            Setting(transformer, layers=12, batch=8, strategies=BASIC, seconds=70),
            Setting(lm, layers=12, batch=8, strategies=("twin", "store", "reverse"), seconds=60),
            # The 3 x 9 units of RevNet-110.
            Setting(revnet, layers=27, batch=10, strategies=BASIC, seconds=60),
        )
    )


def gpu(config: ConfigDict, lm: ConfigModel, minutes: float = 5.0) -> Suite:
    """For one GPU of 80 GB or more; whether gradients are exact is measured first.

    The order: gradients of `reverse` against those of `store`, by deterministic kernels, for every
    model in bfloat16 and float32; a language model as it is trained; the times of all strategies in
    bfloat16; then the limits, which do not fit into five minutes.
    """
    sizes: dict[str, dict[str, int]] = {
        "mlp": {"layers": 32, "batch": 8192},
        "transformer": {"layers": 24, "batch": 8},
        "decoder": {"layers": 24, "batch": 8},
        "revnet": {"layers": 27, "batch": 512},
    }
    half, full = _gpu_models(config, "bfloat16"), _gpu_models(config, "float32")
    # float32 has no cuDNN attention, and XLA then autotunes products of another shape for each
    # chunk of attention: a shorter context keeps these few.
    full["decoder"] = decoder(width=1024, context=512, dtype="float32")
    pair = ("store", "reverse")
    exact = [
        # float32 gets a quarter of the batch: it has twice the bytes and a tenth of the speed.
        Setting(model, size["layers"], size["batch"] // part, pair, seconds=0.2, deterministic=True)
        for models, part in ((half, 1), (full, 4))
        for model, size in zip(models.values(), sizes.values(), strict=True)
    ]
    most = ("store", "remat", "reverse", "reverse/lockstep", "remat_dots", "offload")
    strategies_of = {
        "mlp": most,
        "transformer": (*most, "reverse+8"),
        "decoder": ("store", "twin", *BASIC[1:]),
        "revnet": BASIC,
    }
    # Unrolled too, since loops copy what layers keep (docs/decisions.md).
    fastest = ("store", "store/unroll", "reverse", "reverse/unroll", "twin/unroll")
    layers = lm.config.model.layers
    trained = [Setting(lm, layers, batch, fastest, seconds=8) for batch in (16, 64)]
    timed = [
        Setting(half[name], sizes[name]["layers"], sizes[name]["batch"], strategies, seconds=8)
        for name, strategies in strategies_of.items()
    ]
    return Suite(
        (*exact, *trained, *timed),
        (
            Search(half["transformer"], "batch", layers=24, batch=4, strategies=most),
            Search(half["transformer"], "layers", layers=12, batch=16, strategies=most),
            # With 32,768 rows a layer's streams, 2 x 256 MiB, outweigh its weights, 64 MiB.
            Search(half["mlp"], "layers", layers=16, batch=32768, strategies=most),
            Search(half["revnet"], "batch", layers=27, batch=512, strategies=BASIC),
        ),
        minutes,
    )


def _gpu_models(config, dtype):
    revnet = config.copy_and_resolve_references()
    revnet.model.compute_dtype = dtype
    return {
        "mlp": MlpChain(width=2048, dtype=dtype),
        "transformer": TransformerChain(width=1024, tokens=1024, head_size=128, dtype=dtype),
        "decoder": decoder(width=1024, context=2048, dtype=dtype),
        "revnet": ConfigModel(revnet),
    }


def select(
    suite: Suite,
    *,
    models: Sequence[str] | None = None,
    strategies: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    batch: Sequence[int] | None = None,
    seconds: float | None = None,
    deterministic: bool | None = None,
) -> Suite:
    """A part of a suite, or the suite at other sizes; an argument of None changes nothing.

    Args:
      layers: numbers of layers, in place of the suite's. Every combination with `batch` is
        compared, for every model; searches keep their starting sizes.
      batch: batch sizes, in place of the suite's.

    Raises UserError for unknown models and strategies.
    """
    known = dict.fromkeys(setting.model.name for setting in suite.settings)
    names = list(known) if models is None else list(models)
    for name in names:
        if name not in known:
            raise UserError(f"got model {name!r}, expected some of {', '.join(known)}")
    settings = [setting for setting in suite.settings if setting.model.name in names]
    if layers or batch:
        # What is only compiled is a model at a second size, which would be the same size now.
        timed = [setting for setting in settings if setting.seconds]
        settings = [
            setting._replace(layers=n, batch=b)
            for setting in timed
            for n, b in itertools.product(layers or [setting.layers], batch or [setting.batch])
        ]
    if layers or batch or strategies is not None:
        settings = _merged(settings, strategies)
    if seconds is not None:
        settings = [s._replace(seconds=seconds if s.seconds else 0) for s in settings]
    searches = [search for search in suite.searches if search.model.name in names]
    if deterministic is not None:
        settings = [s._replace(deterministic=deterministic) for s in settings]
        searches = [s._replace(deterministic=deterministic) for s in searches]
    if strategies is not None:
        searches = [search._replace(strategies=tuple(strategies)) for search in searches]
    for each in (*settings, *searches):  # fail now, not after the first measurements
        for strategy in each.strategies:
            is_twin = parse_variant(strategy, each.layers).is_twin
            if is_twin and not each.model.has_twin:
                raise UserError(
                    f"got strategy {strategy!r} for {each.model.name}, which does not have it"
                )
    return Suite(tuple(settings), tuple(searches), suite.minutes)


def _merged(settings, strategies):
    """Merges the settings of each model and size; `strategies` replaces their own if given."""
    found: dict[tuple, Setting] = {}
    for setting in settings:
        model, size = setting.model, (setting.layers, setting.batch)
        key = model.name, model.dtype, *size, setting.deterministic
        first = found.get(key, setting)
        names = strategies or dict.fromkeys((*first.strategies, *setting.strategies))
        longer = max(first.seconds, setting.seconds)
        found[key] = first._replace(strategies=tuple(names), seconds=longer)
    return list(found.values())


class Budget:
    """A time budget that corrects estimates by how long earlier work took.

    Args:
      seconds: None for no end.
    """

    def __init__(self, seconds: float | None):
        self._seconds, self._started = seconds, time.monotonic()
        self._spent = self._expected = 0.0

    @property
    def left_seconds(self) -> float:
        if self._seconds is None:
            return math.inf
        return self._seconds - (time.monotonic() - self._started)

    def needed(self, may_take_seconds: float) -> float:
        """The estimate, scaled up by how much longer than estimated the earlier work took."""
        return may_take_seconds * max(1.0, self._spent / self._expected if self._expected else 1.0)

    @contextmanager
    def spend(self, may_take_seconds: float) -> Generator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            # After a failure, too: its time is gone as well.
            self._spent += time.monotonic() - started
            self._expected += may_take_seconds


def run_suite(
    suite: Suite, *, limit_bytes: int | None = None, minutes: float | None = None
) -> Iterator[dict[str, Any]]:
    """Yields the rows of a suite as they are measured; prints progress to stderr.

    A setting that the device cannot run gives a row with an "error", and the run goes on.

    Args:
      limit_bytes: the memory that searches fill; by default what the device reports.
      minutes: time budget; parts that may take longer than is left are skipped. By default the
        suite's.

    Raises UserError for `limit_bytes` without a search.
    """
    if limit_bytes is not None and not suite.searches:
        raise UserError(
            "got limit_gib where no limit is searched, expected it for mlp, transformer or revnet "
            "with --suite=gpu"
        )
    minutes = suite.minutes if minutes is None else minutes
    budget = Budget(None if minutes is None else 60 * minutes)
    say = lambda *words: print(*words, file=sys.stderr, flush=True)
    for part in _parts(suite, limit_bytes):
        needed = budget.needed(part.may_take_seconds)
        if needed > budget.left_seconds:
            left = max(0, budget.left_seconds)
            say(f"skipped: {part.title} (may take {needed:.0f} s, {left:.0f} s left of --minutes)")
            continue
        say(f"{part.title} (may take {needed:.0f} s)")
        try:
            with budget.spend(part.may_take_seconds):
                # All rows of a part before any is yielded: a part that fails is one row, its error.
                rows = list(part.measure())
        except (jax.errors.JaxRuntimeError, NotImplementedError, UserError) as error:
            # Out of memory, what a device lacks, or sizes that a model cannot have. Any other error
            # is a mistake and ends the run.
            message = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            say(f"failed: {part.title}: {message}")
            rows = [part.sizes | {"error": message}]
        yield from rows


def _parts(suite: Suite, limit_bytes: int | None) -> Iterator[SuitePart]:
    # Asked before anything is measured, because the device may not report its memory.
    limit_bytes = limit_bytes or (device_limit_bytes() if suite.searches else 0)
    for setting in suite.settings:
        measure = functools.partial(compare_strategies, setting)
        yield SuitePart(str(setting), _sizes(setting), setting.may_take_seconds, measure)
    for search in suite.searches:
        model, axis = search.model, search.axis
        for strategy in search.strategies:
            find = functools.partial(
                find_limit,
                model,
                strategy,
                axis,
                layers=search.layers,
                batch=search.batch,
                limit_bytes=limit_bytes,
                deterministic=search.deterministic,
            )
            title = f"{model.name} in {model.dtype}, the largest {axis} under {strategy}"
            sizes = _sizes(search) | {"strategy": strategy, "axis": axis}
            # `find=find` binds this turn's search, whenever it is called.
            yield SuitePart(title, sizes, SEARCH_SECONDS, lambda find=find: [find()])


def _sizes(part: Setting | Search) -> dict[str, Any]:
    model = part.model
    return {
        "model": model.name,
        "dtype": model.dtype,
        "layers": part.layers,
        "batch": part.batch,
    }
