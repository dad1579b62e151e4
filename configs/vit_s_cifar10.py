r"""RevViT-S with patches of 4 pixels on CIFAR-10; arm: laptop, RevViT-Ti's width and half an epoch.

    python scripts/train.py --config=configs/vit_s_cifar10.py \
        --config.data.dir=DIR --workdir=WORKDIR
"""

from revnet_jax.config import CIFAR_LAPTOP, cifar, vision_transformer, with_arms

LAPTOP = CIFAR_LAPTOP | {
    "model.layers": 6,
    "model.width": 192,
    "model.heads": 3,
    "model.hidden": 384,
    # CIFAR_LAPTOP sets it for SGD, and AdamW has none.
    "optimizer.nesterov": False,
}


def get_config(arm: str = ""):
    config = vision_transformer("S")
    config.data = cifar().data
    # 8 x 8 patches; the default of 16 would leave 4 of an image of 32 x 32.
    config.model.patch = 4
    config.num_steps = 100_000  # 256 epochs
    config.batch_size = 128
    config.eval_batch_size = 500
    config.log_every_steps = 100
    config.eval_every_steps = 2_000
    config.checkpoint_every_steps = 1_000
    config.data.crop_padding = 4
    config.mixup = 0.2
    config.label_smoothing = 0.1
    config.schedule.warmup_steps = 4_000
    return with_arms(config, arm, {"laptop": LAPTOP})
