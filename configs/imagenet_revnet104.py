r"""RevNet-104 on ImageNet; arm: laptop (the same network on small images, a few steps).

    python scripts/train.py --config=configs/imagenet_revnet104.py \
        --config.data.dir=DIR --workdir=WORKDIR

DIR holds train/ and val/, each with one folder of images per class.
Published top-1 validation error: 23.10 % (Gomez et al. 2017).
"""

from revnet_jax.config import IMAGENET_LAPTOP, imagenet, with_arms


def get_config(arm: str = ""):
    config = imagenet()
    config.model.update(
        {
            "family": "revnet",
            # 104 = 2 + 17 units x 2 branches x 3 convolutions.
            "units": (2, 2, 11, 2),
            "channels": (128, 512, 1024, 2048, 3328),
            "bottleneck": True,
        }
    )
    return with_arms(config, arm, {"laptop": IMAGENET_LAPTOP})
