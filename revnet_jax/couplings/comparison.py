"""Trains the same small network with every coupling, side by side, and measures each.

The rows take turns at every step, on the same batch, so that other load on the machine slows all
of them alike. All rows share one recipe; none is tuned.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from revnet_jax.core import Backprop, Exactness
from revnet_jax.couplings.network import CouplingNetwork
from revnet_jax.couplings.rows import ROWS, check_names
from revnet_jax.data import Dataset, eval_batches, load_dataset, train_batches
from revnet_jax.errors import UserError
from revnet_jax.models.task import Batch, cross_entropy, is_correct
from revnet_jax.optimizers.build import make_optimizer, make_schedule
from revnet_jax.runs.metrics import Progress
from revnet_jax.training.compiler import exact_jit, jit_initialization
from revnet_jax.training.evaluation import evaluate

# For each data set, its augmentation, and the stride of the stem, which limits the feature size.
DATA_SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {"crop_padding": 0, "flip": False, "stem_stride": 1},
    "cifar10": {"crop_padding": 2, "flip": True, "stem_stride": 2},
}


class RunState(NamedTuple):
    """The training state of one row and seed. exactness: summed over all steps."""

    params: Any
    opt_state: Any
    key: jax.Array
    step: jax.Array
    exactness: Exactness


class Trainer:
    """Trains one row: its compiled programs, and what was measured so far."""

    def __init__(
        self, network: CouplingNetwork, optimizer: optax.GradientTransformation, seeds: int
    ):
        self.network, self.optimizer = network, optimizer
        self.step_seconds: list[float] = []
        self.accuracies: list[float] = []
        self.exactness: list[Exactness] = []
        # [seeds, 2]: for each seed a key for its parameters and one for its steps, the same in all
        # rows.
        keys = jax.random.split(jax.random.key(0), (seeds, 2))
        init = lambda: (jax.vmap(network.init)(keys[:, 0]), keys[:, 1])
        self._fresh = jit_initialization(init)()  # all seeds by one program
        self._programs: dict[Backprop, jax.stages.Compiled] = {}
        # The state is donated: the new one is written into the memory of the old.
        self._update = exact_jit(self._updated, donate_argnums=0)
        self._eval_step = exact_jit(self._sums)
        self.start(0)

    def start(self, seed: int) -> None:
        """Replaces the state by the initial state of a seed."""
        # Indexing copies, so that the donated state is not part of `_fresh`.
        params, key = jax.tree.map(lambda leaf: leaf[seed], self._fresh)
        step, opt_state = jnp.zeros((), jnp.int32), self.optimizer.init(params)
        self.state = RunState(params, opt_state, key, step, Exactness.probe())

    def gradient(self, batch: Batch, backprop: Backprop) -> jax.stages.Compiled:
        """The compiled program `(params, batch, key, step) -> (loss, (gradient, exactness))`."""
        if backprop not in self._programs:
            program = exact_jit(lambda *args: self._gradient(*args, backprop))
            args = self.state.params, batch, self.state.key, self.state.step
            # Compiled ahead: its memory can be asked for, and no step's time includes compiling it.
            self._programs[backprop] = program.lower(*args).compile()
        return self._programs[backprop]

    def step(self, batch: Batch) -> float:
        """Makes one update, timed from call to result; returns the loss."""
        gradient, state = self.gradient(batch, self.network.train_backprop), self.state
        started = time.perf_counter()
        loss, grads_and_exactness = gradient(state.params, batch, state.key, state.step)
        # JAX returns before a device is done, so the time is taken when the new state is there.
        self.state = jax.block_until_ready(self._update(state, *grads_and_exactness))
        self.step_seconds.append(time.perf_counter() - started)
        return float(loss)

    def finish(self, dataset: Dataset) -> None:
        """Records accuracy on the whole test split, and what the exactness check found."""
        # One device, as in training, because times and memory are compared per device.
        mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
        batches = eval_batches(dataset, batch_size=200)
        means = evaluate(self._eval_step, self.state.params, batches, mesh)
        self.accuracies.append(means["accuracy"])
        self.exactness.append(jax.device_get(self.state.exactness))

    def temporary_bytes(self, batch: Batch, backprop: Backprop) -> int:
        """Temporary memory of the compiled gradient, beside arguments and results; runs nothing."""
        memory: Any = self.gradient(batch, backprop).memory_analysis()
        return memory.temp_size_in_bytes

    def _gradient(self, params, batch, key, step, backprop):
        def loss(params, probe):
            logits_BV = self.network.apply(
                params,
                batch["image"],
                backprop=backprop,
                # Another key in each step, for bdia's gammas.
                key=jax.random.fold_in(key, step),
                probe=probe,
            )
            return jnp.mean(cross_entropy(logits_BV, batch["label"]))

        return jax.value_and_grad(loss, argnums=(0, 1))(params, Exactness.probe())

    def _updated(self, state, grads, found):
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        exactness = jax.tree.map(jnp.add, state.exactness, found)
        params = optax.apply_updates(state.params, updates)
        return RunState(params, opt_state, state.key, state.step + 1, exactness)

    def _sums(self, params, batch):
        logits_BV = self.network.apply(params, batch["image"], backprop="store")
        weight_B = batch["weight"]
        return {
            "loss": jnp.sum(weight_B * cross_entropy(logits_BV, batch["label"])),
            "accuracy": jnp.sum(weight_B * is_correct(logits_BV, batch["label"])),
            "count": jnp.sum(weight_B),
        }


def compare_couplings(
    names: Sequence[str] = tuple(ROWS),
    *,
    data: str = "digits",
    dir: str | None = None,
    seeds: int = 3,
    num_steps: int = 200,
    batch_size: int = 50,
    channels: int = 18,
    hidden: int = 18,
    num_branches: int = 12,
    learning_rate: float = 0.1,
    weight_decay: float = 2e-4,
) -> dict[str, Any]:
    """Trains every named row with seeds 0, 1, ...; returns settings and a list of rows.

    Args:
      channels: see `CouplingNetwork`.
      hidden: see `CouplingNetwork`.
      num_branches: see `CouplingNetwork`.

    The optimizer is SGD with Nesterov momentum. Its learning rate is warmed up over a twentieth of
    the steps, and decays to 0 along a cosine. Cost: len(names) * seeds * num_steps steps, and two
    gradients compiled per row.

    Raises UserError for an unknown coupling or data set, and for data that cannot be used.
    """
    check_names(names)
    dataset, settings = load_images(data, dir)
    schedule, optimizer = make_recipe(learning_rate, weight_decay, num_steps)
    sizes = {"channels": channels, "hidden": hidden, "num_branches": num_branches}
    make = functools.partial(
        CouplingNetwork,
        **sizes,
        image_shape=dataset.image_shape,
        num_classes=dataset.num_classes,
        stem_stride=settings.pop("stem_stride"),
    )
    networks = [make(name) for name in dict.fromkeys(names)]
    trainers = [Trainer(network, optimizer, seeds) for network in networks]
    settings |= {
        "batch_size": batch_size,
        "affine": 0.0,
        "min_crop_area": 1.0,
        "num_threads": 1,
        "prefetch": 4,
    }
    progress = Progress(seeds * num_steps, examples_per_step=batch_size * len(trainers))
    for seed in range(seeds):
        for trainer in trainers:
            trainer.start(seed)
        with contextlib.closing(train_batches(dataset, seed=seed, start_step=0, **settings)) as it:
            for step in range(num_steps):
                batch = jax.device_put(next(it))
                loss = statistics.fmean([trainer.step(batch) for trainer in trainers])
                rate = float(jnp.asarray(schedule(step)))
                progress.update(seed * num_steps + step + 1, loss=loss, learning_rate=rate)
        for trainer in trainers:
            trainer.finish(dataset)
    progress.close()
    recipe = {"learning_rate": learning_rate, "weight_decay": weight_decay, "data": data}
    run = {"seeds": seeds, "num_steps": num_steps, "batch_size": batch_size}
    rows = [measure_coupling(trainer, batch, num_steps) for trainer in trainers]
    return {**recipe, **run, **sizes, "parameter_spread": parameter_spread(rows), "rows": rows}


def make_recipe(
    learning_rate: float, weight_decay: float, num_steps: int
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """Returns the learning-rate schedule and the optimizer, which all rows share."""
    schedule = make_schedule(
        name="cosine",
        learning_rate=learning_rate,
        num_steps=num_steps,
        warmup_steps=num_steps // 20,
        decay_steps=0,
        boundaries=(),
        factor=1.0,
    )
    # Arguments without a default: SGD reads no b1 and b2, and nothing is clipped.
    rest: dict[str, Any] = {"b1": 0.0, "b2": 0.0, "clip_norm": 0.0, "clip": "global"}
    rest |= {"state_dtype": "float32", "stacked": None}
    rest |= {"name": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": weight_decay}
    return schedule, make_optimizer(schedule, **rest)


def load_images(name: str, dir: str | None) -> tuple[Dataset, dict[str, Any]]:
    """Loads a data set, with its entry of `DATA_SETTINGS`. UserError for an unknown name."""
    if name not in DATA_SETTINGS:
        known = ", ".join(DATA_SETTINGS)
        raise UserError(f"got data {name!r}, expected one of {known}")
    try:
        # A copy, because the caller takes the stride out of it.
        return load_dataset(name, dir=dir or None), dict(DATA_SETTINGS[name])
    except UserError:
        raise
    except ValueError as error:  # a folder is missing, or given for data that need none
        raise UserError(f"data: {error}") from error


def measure_coupling(trainer: Trainer, batch: Batch, num_steps: int) -> dict[str, Any]:
    """Returns a row of the report. Compiles the gradient once for each strategy; runs nothing.

    The first step of each seed is left out of the times, because it compiles or warms caches.
    """
    network = trainer.network
    reverses = network.train_backprop == "reverse"
    # i % num_steps is 0 at a seed's first step. Seeds of a single step keep it, to have any time.
    seconds = [s for i, s in enumerate(trainer.step_seconds) if i % num_steps or num_steps == 1]
    memory = {
        "reverse": trainer.temporary_bytes(batch, "reverse") if reverses else None,
        "store": trainer.temporary_bytes(batch, "store"),
    }
    return {
        "coupling": network.name,
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(trainer.state.params)),
        "layers": network.num_layers,
        "hidden": network.hidden_width,
        "accuracies": trainer.accuracies,
        "accuracy_mean": statistics.fmean(trainer.accuracies),
        "accuracy_std": statistics.stdev(trainer.accuracies) if trainer.accuracies[1:] else None,
        "median_step_ms": 1e3 * statistics.median(seconds),
        "temporary_bytes": memory,
        "residue_bits_per_element": network.residue_bits(),
        "mismatches": sum(int(e.mismatches) for e in trainer.exactness) if reverses else None,
        "max_abs": max(float(e.max_abs) for e in trainer.exactness) if reverses else None,
        "note": network.row.note,
    }


def parameter_spread(rows: Sequence[dict[str, Any]]) -> float:
    """By which fraction the largest number of parameters of a row exceeds the smallest."""
    counts = [row["num_params"] for row in rows]
    return max(counts) / min(counts) - 1
