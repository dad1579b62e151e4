r"""ResNet-101 on ImageNet; arm: laptop (the same network on small images, a few steps).

    python scripts/train.py --config=configs/imagenet_resnet101.py \
        --config.data.dir=DIR --workdir=WORKDIR

DIR holds train/ and val/, each with one folder of images per class.
Published top-1 validation error: 23.01 % (Gomez et al. 2017).
"""

from revnet_jax.config import IMAGENET_LAPTOP, imagenet, with_arms


def get_config(arm: str = ""):
    config = imagenet()
    config.model.update(
        {
            "family": "resnet",
            # 101 = 2 + 33 units x 3 convolutions; the 2 are the stem and the classifier.
            "units": (3, 4, 23, 3),
            "channels": (64, 256, 512, 1024, 2048),
            "bottleneck": True,
            "backprop": "store",
        }
    )
    return with_arms(config, arm, {"laptop": IMAGENET_LAPTOP})
