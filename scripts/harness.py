"""Evaluates a run on tasks of EleutherAI's lm-evaluation-harness; prints their results as JSON.

    python scripts/harness.py --workdir=runs/imported --tasks=lambada_openai,arc_easy

Needs the package lm_eval (pip install lm_eval), which downloads the data of the tasks.
"""

import json
from pathlib import Path

from absl import flags

from revnet_jax.config import cli
from revnet_jax.config.ranges import whole

WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run.")
TASKS = flags.DEFINE_list("tasks", [], "Names of tasks.")
WHICH = cli.define_checkpoint_flag()
TOKENIZER = flags.DEFINE_string("tokenizer", None, "The tokenizer's file, if not in the workdir.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Sequences that are scored at a time.")
cli.limit(BATCH_SIZE, whole(1))
NUM_FEWSHOT = flags.DEFINE_integer(
    "num_fewshot", None, "Examples in a prompt; by default the task's."
)
cli.limit(NUM_FEWSHOT, whole(0))
LIMIT = flags.DEFINE_integer("limit", None, "Examples of each task; by default all.")
cli.limit(LIMIT, whole(1))


def main(argv):
    del argv
    from revnet_jax.training.harness import harness_model, load_harness

    model = harness_model(
        Path(WORKDIR.value),
        WHICH.value,
        tokenizer=Path(TOKENIZER.value) if TOKENIZER.value else None,
        batch_size=BATCH_SIZE.value,
    )
    found = load_harness("lm_eval").simple_evaluate(
        model=model, tasks=TASKS.value, num_fewshot=NUM_FEWSHOT.value, limit=LIMIT.value
    )
    # The rest, such as every sample with its answers, is long.
    print(json.dumps(found["results"], indent=2))


if __name__ == "__main__":
    cli.run(main, required=("workdir", "tasks"))
