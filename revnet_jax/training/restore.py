"""A trained model from the folder of its run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import jax

from revnet_jax.training.build import build_dataset, build_recipe
from revnet_jax.training.checkpoint import CheckpointError
from revnet_jax.training.compiler import jit
from revnet_jax.training.evaluation import evaluate
from revnet_jax.training.loop import open_checkpoints
from revnet_jax.training.sharding import abstract, data_mesh, replicated
from revnet_jax.training.step import init_state, make_eval_step
from revnet_jax.training.workdir import load_config


def evaluate_run(
    workdir: Path, which: Literal["newest", "best"] = "newest", data_dir: str | None = None
) -> dict[str, Any]:
    """Evaluates a checkpoint of a run on the whole test split; changes nothing in its folder.

    data_dir: where the data are now, if not where they were in training.

    Raises UserError in one line: no run or no checkpoint there, data missing.
    """
    config = load_config(workdir)
    if data_dir is not None:
        config.data.dir = data_dir
    network, _, optimizer = build_recipe(config)
    dataset = build_dataset(config)
    mesh = data_mesh()
    init = lambda: init_state(network, optimizer, config.seed)
    if not (workdir / "checkpoints").exists():
        raise CheckpointError(f"{workdir} holds no checkpoints: has its run saved any yet?")
    with open_checkpoints(workdir, read_only=True) as checkpoints:
        restored = checkpoints.restore(abstract(init, replicated(mesh)), which=which)
    if restored is None:
        raise CheckpointError(f"{workdir / 'checkpoints'} is empty: has its run saved any yet?")
    step, state = restored
    scores = evaluate(
        jit(make_eval_step(network)),
        state.variables,
        dataset,
        # Batches are padded anyway: rounded up, any number of devices can share them.
        batch_size=-(-config.eval_batch_size // jax.device_count()) * jax.device_count(),
        mesh=mesh,
        num_threads=config.data.num_threads,
        prefetch=config.data.prefetch,
    )
    return {"step": step, "checkpoint": which, **scores}
