r"""124 million parameters, of GPT-2's size and vocabulary; arm: laptop, a few small steps.

    python scripts/tokenize_text.py --input=TEXT --tokenizer=tokenizer.json --out=DIR
    python scripts/train.py --config=configs/lm_124m.py --config.data.dir=DIR --workdir=WORKDIR

With a tokenizer of another size: --config.data.vocab_size.
"""

from revnet_jax.config import LM_LAPTOP, language_model, with_arms


def get_config(arm: str = ""):
    config = language_model()
    # 480 x 1,024 tokens, half a million a step: 9.8 billion in all.
    config.num_steps = 20_000
    config.batch_size = config.eval_batch_size = 480
    config.log_every_steps = 20
    config.eval_every_steps = config.checkpoint_every_steps = 1_000
    config.data.update({"name": "shards", "vocab_size": 50_257, "context": 1024})
    config.data.eval_batches = 100
    # Three matrices of 768 x 2,048 (SwiGLU) have as many parameters as GPT-2's two of 768 x 3,072.
    # Tied, because the embedding has 39 of the 124 million.
    config.model.update(
        {"layers": 12, "width": 768, "heads": 12, "kv_heads": 12, "hidden": 2048, "tied": True}
    )
    config.model.compute_dtype = "bfloat16"
    config.optimizer.update({"b2": 0.95, "clip_norm": 1.0})
    config.schedule.update({"learning_rate": 6e-4, "warmup_steps": 700})
    return with_arms(config, arm, {"laptop": LM_LAPTOP})
