r"""RevNet-56 on ImageNet; arm: laptop (the same network on small images, a few steps).

    python scripts/train.py --config=configs/imagenet_revnet56.py \
        --config.data.dir=DIR --workdir=WORKDIR

DIR holds train/ and val/, each with one folder of images per class.
"""

from revnet_jax.config import IMAGENET_LAPTOP, imagenet, with_arms


def get_config(arm: str = ""):
    config = imagenet()
    config.model.update(
        {
            "family": "revnet",
            # 56 = 2 + 9 units x 2 branches x 3 convolutions.
            "units": (2, 2, 3, 2),
            "channels": (128, 512, 1024, 2048, 3328),
            "bottleneck": True,
        }
    )
    return with_arms(config, arm, {"laptop": IMAGENET_LAPTOP})
