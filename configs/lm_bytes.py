"""Bytes of the English text that comes with Python; nothing to download.

python scripts/train.py --config=configs/lm_bytes.py --workdir=WORKDIR
python scripts/generate.py --workdir=WORKDIR --prompt='The for statement'
"""

from revnet_jax.config import language_model, with_arms


def get_config(arm: str = ""):
    config = language_model()
    config.num_steps = 450
    config.batch_size = 12
    config.eval_every_steps = config.checkpoint_every_steps = 450
    config.data.context = 96
    config.data.vocab_size = 256
    config.model.update({"layers": 4, "width": 128, "heads": 4, "kv_heads": 2, "hidden": 344})
    config.schedule.learning_rate = 3e-3
    return with_arms(config, arm, {"laptop": {}})  # it is one already
