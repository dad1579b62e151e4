r"""A billion parameters: sequences of 8,192 tokens; arm: laptop, a few small steps.

    python scripts/plan.py --config=configs/lm_1b.py --topology=v5e:4x4
    python scripts/train.py --config=configs/lm_1b.py --config.data.dir=DIR --workdir=WORKDIR

Layers are updated inside the backward sweep, so that their gradients never exist together.
"""

from revnet_jax.config import LM_LAPTOP, language_model, with_arms


def get_config(arm: str = ""):
    config = language_model()
    # 64 x 8,192 tokens, half a million a step: 52 billion in all.
    config.num_steps = 100_000
    config.batch_size = config.eval_batch_size = 64
    config.log_every_steps = 20
    config.eval_every_steps = config.checkpoint_every_steps = 1_000
    config.data.update({"name": "shards", "vocab_size": 32_768, "context": 8192})
    config.data.eval_batches = 100
    config.mesh.fsdp = 16  # this number of devices holds the model once
    # 20 layers of 45 million, and an embedding of 67 million.
    config.model.update(
        {"layers": 20, "width": 2048, "heads": 16, "kv_heads": 4, "hidden": 5632, "tied": True}
    )
    config.model.rotary_base = 500_000.0
    config.model.compute_dtype = "bfloat16"
    # Clipped by layer: in lockstep a layer is updated before the norm of all is known.
    config.optimizer.update({"b2": 0.95, "lockstep": True, "clip_norm": 1.0, "clip": "layer"})
    config.schedule.update({"learning_rate": 3e-4, "warmup_steps": 2_000})
    return with_arms(config, arm, {"laptop": LM_LAPTOP})
