"""What the benchmark measures where: a laptop's suite, and that of a large GPU."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from revnet_jax.config import language_model
from revnet_jax.errors import UserError
from revnet_jax.memory.benchmark import Setting, compare
from revnet_jax.memory.benchmark_limits import Axis, device_limit_bytes, find_limit
from revnet_jax.memory.benchmark_models import (
    LEARNING_RATE,
    ConfigModel,
    Mlp,
    Transformer,
    parse_strategy,
)

BASIC = ("store", "remat", "reverse")


class Search(NamedTuple):
    """A limit to find: see `find_limit`."""

    model: Any
    axis: Axis
    layers: int
    batch: int
    strategies: tuple[str, ...]


class Suite(NamedTuple):
    settings: tuple[Setting, ...]
    searches: tuple[Search, ...] = ()


def suites(config: ConfigDict) -> dict[str, Suite]:
    """By name. config: of the RevNet that is measured, with three stages alike."""
    half = config.copy_and_resolve_references()
    half.model.compute_dtype = "bfloat16"
    return {
        "laptop": laptop(ConfigModel(config), decoder(width=256, context=512)),
        "gpu": gpu(ConfigModel(half), decoder(width=1024, context=2048, dtype="bfloat16")),
    }


def decoder(*, width: int, context: int, dtype: str = "float32") -> ConfigModel:
    """A language model of bytes, with heads of 64."""
    config = language_model()
    config.data.context = context
    heads = width // 64
    config.model.update({"width": width, "heads": heads, "kv_heads": heads, "hidden": 3 * width})
    config.model.compute_dtype = dtype
    config.optimizer.name = "sgd"
    config.schedule.update({"learning_rate": LEARNING_RATE, "warmup_steps": 0})
    return ConfigModel(config, "decoder", "tokens")


def laptop(revnet: ConfigModel, lm: ConfigModel) -> Suite:
    """Two cores, under ten minutes; what is not timed is compiled only, for its memory."""
    mlp, transformer = Mlp(), Transformer()
    some = (*BASIC, "remat_dots")
    # Here arithmetic outweighs what storing costs, and a mixture's price shows.
    wide, mixed = Mlp(width=2048, name="wide_mlp"), ("store", "reverse+3", "reverse+2", "reverse+1")
    return Suite(
        (
            Setting(mlp, layers=32, batch=1024, strategies=(*some, "reverse/lockstep"), seconds=70),
            Setting(wide, layers=4, batch=256, strategies=(*mixed, "reverse"), seconds=80),
            Setting(mlp, layers=64, batch=1024, strategies=some, seconds=0),
            Setting(transformer, layers=12, batch=8, strategies=BASIC, seconds=70),
            Setting(lm, layers=12, batch=8, strategies=("twin", "store", "reverse"), seconds=60),
            Setting(revnet, layers=27, batch=10, strategies=BASIC, seconds=60),
        )
    )


def gpu(revnet: ConfigModel, lm: ConfigModel) -> Suite:
    """One GPU of 80 GB or more, under eight minutes."""
    transformer = Transformer(width=1024, tokens=1024, head_size=128, dtype="bfloat16")
    mlp = Mlp(width=2048, dtype="bfloat16")
    most = (*BASIC, "reverse/lockstep", "remat_dots", "offload")
    return Suite(
        (
            Setting(mlp, layers=32, batch=8192, strategies=most, seconds=10),
            Setting(transformer, layers=24, batch=8, strategies=(*most, "reverse+8"), seconds=15),
            Setting(lm, layers=24, batch=8, strategies=("twin", *BASIC), seconds=10),
            Setting(revnet, layers=27, batch=512, strategies=BASIC, seconds=10),
        ),
        (
            Search(transformer, "batch", layers=24, batch=4, strategies=most),
            Search(transformer, "layers", layers=12, batch=16, strategies=most),
            Search(mlp, "layers", layers=16, batch=32768, strategies=most),
            Search(revnet, "batch", layers=27, batch=512, strategies=BASIC),
        ),
    )


def select(
    suite: Suite,
    *,
    models: Sequence[str] | None = None,
    strategies: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    batch: Sequence[int] | None = None,
    seconds: float | None = None,
) -> Suite:
    """A part of a suite, or other sizes; None leaves as it is.

    Raises UserError for models and strategies that there are not.

    layers, batch: each of these with each of those, for every model, in place of what the suite
      compares; its searches start from where they do.
    """
    known = dict.fromkeys(setting.model.name for setting in suite.settings)
    names = list(known) if models is None else list(models)
    for name in names:
        if name not in known:
            raise UserError(f"got model {name!r}, expected some of {', '.join(known)}")
    settings = [setting for setting in suite.settings if setting.model.name in names]
    if layers or batch:
        timed = [setting for setting in settings if setting.seconds]
        settings = [
            setting._replace(layers=n, batch=b)
            for setting in timed
            for n, b in itertools.product(layers or [setting.layers], batch or [setting.batch])
        ]
    if seconds is not None:
        settings = [s._replace(seconds=seconds if s.seconds else 0) for s in settings]
    searches = tuple(search for search in suite.searches if search.model.name in names)
    if strategies is not None:
        settings = [setting._replace(strategies=tuple(strategies)) for setting in settings]
        searches = tuple(search._replace(strategies=tuple(strategies)) for search in searches)
    for each in (*settings, *searches):  # now, rather than after the measurements before it
        for strategy in each.strategies:
            parse_strategy(strategy, each.layers)
            if strategy == "twin" and not each.model.has_twin:
                raise UserError(f"got strategy 'twin' for {each.model.name}, which has none")
    return Suite(tuple(settings), searches)


def run(suite: Suite, *, limit_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a suite, as they are measured; what is under way goes to stderr.

    limit_bytes: where searches end; by default what the device says it has.
    """
    say = lambda *words: print(*words, file=sys.stderr, flush=True)
    bytes_there = (limit_bytes or device_limit_bytes()) if suite.searches else 0
    for setting in suite.settings:
        say(f"{setting.model.name}, {setting.layers} layers, batch {setting.batch}")
        yield from compare(setting)
    for search in suite.searches:
        for strategy in search.strategies:
            say(f"{search.model.name}, the largest {search.axis} under {strategy}")
            sizes = {"layers": search.layers, "batch": search.batch, "limit_bytes": bytes_there}
            yield find_limit(search.model, strategy, search.axis, **sizes)
