"""Fine-tunes a pretrained vision transformer: the arm is the folder that it was imported to.

python scripts/import_weights.py --source=DIR --num_classes=CLASSES --workdir=runs/imported
python scripts/train.py --config=configs/vit_finetune.py:runs/imported --config.data.dir=IMAGES \
    --workdir=WORKDIR

Model, classes, image size and normalisation are those of that folder's config.json, and the run
starts from its weights. IMAGES holds a folder of images per class (docs/running.md). The arm can be
any other run of a vision transformer. Only an imported folder, or a run with data.mean and data.std
set, brings a normalisation: after others, such as one on cifar10, images are normalised as those of
ImageNet, and not as those that the weights were trained on.
"""

from pathlib import Path

from revnet_jax.config import IMAGENET_LAPTOP, imagenet, vision_transformer, with_arms
from revnet_jax.config.starting import start_from


def get_config(arm: str = ""):
    config = vision_transformer()
    config.data = imagenet().data
    config.data.min_crop_area = 0.5
    config.num_steps = 1_000
    config.batch_size = config.eval_batch_size = 64
    # Published models have one stream, which cannot be reversed as it is: see model.integrator.
    config.model.update({"reversible": False, "backprop": "remat"})
    config.optimizer.weight_decay = 0.0
    config.schedule.update({"learning_rate": 5e-5, "warmup_steps": 100})
    if arm in ("", "laptop"):  # an untrained model, to try the commands
        return with_arms(config, arm, {"laptop": IMAGENET_LAPTOP})
    start_from(config, Path(arm), "image_shape", "num_classes", "mean", "std")
    return config
