r"""ResNet-50 on ImageNet; arm: laptop (the same network on small images, a few steps).

    python scripts/train.py --config=configs/imagenet_resnet50.py \
        --config.data.dir=DIR --workdir=WORKDIR

DIR holds train/ and val/, each with one folder of images per class.
"""

from revnet_jax.config import IMAGENET_LAPTOP, imagenet, with_arms


def get_config(arm: str = ""):
    config = imagenet()
    config.model.update(
        {
            "family": "resnet",
            # 50 = 2 + 16 units x 3 convolutions; the 2 are the stem and the classifier.
            "units": (3, 4, 6, 3),
            "channels": (64, 256, 512, 1024, 2048),
            "bottleneck": True,
            "backprop": "store",
        }
    )
    return with_arms(config, arm, {"laptop": IMAGENET_LAPTOP})
