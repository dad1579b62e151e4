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

import json
from pathlib import Path

from revnet_jax.config import LM_LAPTOP, ConfigError, language_model


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
        _start_from(config, Path(arm))
    return config


def _start_from(config, workdir):
    try:
        found = json.loads((workdir / "config.json").read_text())["config"]
        # JSON has no tuples: a list there is a tuple of settings here.
        model = {k: tuple(v) if isinstance(v, list) else v for k, v in found["model"].items()}
        config.model.update(model)
        # These data settings belong to the model; where the data are is a matter of this run.
        for name in ("vocab_size", "context", "end_token"):
            config.data[name] = found["data"][name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = " ".join(str(error).split())
        raise ConfigError(
            f"got arm {str(workdir)!r}, expected one of laptop, or the folder of a decoder's run "
            f"({what})"
        ) from error
    config.init_from = str(workdir)
