r"""RevViT-B/16 on ImageNet-1k in folders; arm: laptop, any folder of images in the same layout.

    python scripts/train.py --config=configs/vit_b_imagenet.py \
        --config.data.dir=DIR --workdir=WORKDIR

Random resized crops, flips, mixup and label smoothing; 300 epochs (arXiv:2012.12877, without its
further augmentation).
"""

from revnet_jax.config import IMAGENET_LAPTOP, imagenet, vision_transformer, with_arms


def get_config(arm: str = ""):
    config = vision_transformer("B")
    config.data = imagenet().data
    # 375,000 x 1,024 images are 300 epochs of 1,281,167; the warm-up takes 4.8 of them.
    config.num_steps = 375_000
    config.batch_size = config.eval_batch_size = 1024
    config.log_every_steps = 100
    config.eval_every_steps = config.checkpoint_every_steps = 5_000
    config.mixup = 0.8
    config.label_smoothing = 0.1
    config.model.compute_dtype = "bfloat16"
    config.optimizer.weight_decay = 0.05
    config.schedule.warmup_steps = 6_000
    return with_arms(config, arm, {"laptop": IMAGENET_LAPTOP})
