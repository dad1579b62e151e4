r"""Eight billion parameters and sequences of 32,768 tokens; arm: laptop, a few small steps.

    python scripts/plan.py --config=configs/lm_8b_32k.py --topology=v5p:4x4x4
    python scripts/train.py --config=configs/lm_8b_32k.py --config.data.dir=DIR --workdir=WORKDIR

Layers are updated inside the backward sweep; Lion keeps one average of gradients where AdamW keeps
two.
"""

from revnet_jax.config import LM_LAPTOP, language_model, with_arms


def get_config(arm: str = ""):
    config = language_model()
    # 64 x 32,768 tokens, two million a step: 210 billion in all.
    config.num_steps = 100_000
    config.batch_size = config.eval_batch_size = 64
    config.log_every_steps = 20
    config.eval_every_steps = config.checkpoint_every_steps = 1_000
    config.data.update({"name": "shards", "vocab_size": 131_072, "context": 32_768})
    config.data.eval_batches = 100
    config.mesh.fsdp = 16  # this number of devices holds the model once
    config.model.update({"layers": 32, "width": 4096, "heads": 32, "kv_heads": 8, "hidden": 14_336})
    # In one part, gate and up of a sequence would be 1.75 GiB in bfloat16.
    config.model.update({"feed_forward_chunks": 8, "rotary_base": 5e6})
    config.model.compute_dtype = "bfloat16"
    # Clipped by layer: in lockstep a layer is updated before the norm of all is known.
    config.optimizer.update({"name": "lion", "lockstep": True, "clip_norm": 1.0, "clip": "layer"})
    # Lion's steps are signs; its rate is 3 to 10 times smaller than AdamW's (arXiv:2302.06675).
    config.schedule.update({"learning_rate": 1e-4, "warmup_steps": 2_000})
    return with_arms(config, arm, {"laptop": LM_LAPTOP})
