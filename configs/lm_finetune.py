"""Fine-tunes a pretrained decoder: the arm is the folder that its weights were imported to.

python scripts/import_weights.py --source=DIR --workdir=runs/imported
python scripts/tokenize_text.py --input=FILE --tokenizer=runs/imported/tokenizer.json --out=TOKENS
python scripts/train.py --config=configs/lm_finetune.py:runs/imported --config.data.dir=TOKENS \
    --workdir=WORKDIR

With prompts and answers, the loss counts the answers only (docs/pretrained.md):

python scripts/tokenize_text.py --answers --input=FILE --tokenizer=runs/imported/tokenizer.json \
    --end_token='<|endoftext|>' --out=TOKENS

Model and vocabulary are those of that folder's config.json, and the run starts from its weights.
The arm can be any other run of a decoder that was trained on shards.
"""

from pathlib import Path

from revnet_jax.config import LM_LAPTOP, language_model
from revnet_jax.config.starting import start_from


def get_config(arm: str = ""):
    config = language_model()
    config.num_steps = 1_000
    config.batch_size = config.eval_batch_size = 8
    config.data.name = "shards"
    config.data.context = 1024
    # Published decoders have one stream, which cannot be reversed as it is.
    config.model.update({"reversible": False, "backprop": "remat"})
    config.optimizer.weight_decay = 0.0
    config.schedule.learning_rate = 2e-5
    if arm == "laptop":  # an untrained model, to try the commands
        config.update_from_flattened_dict(LM_LAPTOP)
    elif arm:
        start_from(config, Path(arm), "vocab_size", "context", "end_token")
    return config
