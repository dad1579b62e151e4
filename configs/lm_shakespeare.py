"""Characters of Shakespeare's plays; arm: laptop, two CPU cores.

    python scripts/train.py --config=configs/lm_shakespeare.py:laptop --config.data.dir=FILE \\
        --workdir=WORKDIR
"""

from revnet_jax.config import language_model, with_arms

LAPTOP = {
    "num_steps": 2_000,
    "batch_size": 12,
    "eval_batch_size": 100,
    "eval_every_steps": 500,
    "checkpoint_every_steps": 500,
    "data.context": 64,
    "model.layers": 4,
    "model.width": 128,
    "model.heads": 4,
    "model.kv_heads": 4,
    "model.hidden": 344,
    "model.dropout": 0.0,
    "schedule.learning_rate": 2e-3,
}


def get_config(arm: str = ""):
    config = language_model()
    config.num_steps = 5_000
    config.batch_size = 64
    config.eval_every_steps = config.checkpoint_every_steps = 500
    config.log_every_steps = 50
    # The plays have 65 different characters.
    config.data.update({"name": "characters", "vocab_size": 65, "context": 256})
    config.model.update({"layers": 6, "width": 384, "heads": 6, "kv_heads": 6, "hidden": 1024})
    config.model.dropout = 0.2
    config.schedule.learning_rate = 1e-3
    return with_arms(config, arm, {"laptop": LAPTOP})
