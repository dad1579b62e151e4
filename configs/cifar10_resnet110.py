r"""ResNet-110 on CIFAR-10; arms: cifar100, laptop (half an epoch, for a CPU), or both.

    python scripts/train.py --config=configs/cifar10_resnet110.py \
        --config.data.dir=DIR --workdir=WORKDIR

DIR holds cifar-10-batches-bin or cifar-10-batches-py (cifar-100-...: `--config=FILE:cifar100`).
Published test error, CIFAR-10 / CIFAR-100: 5.74 / 26.44 % (Gomez et al. 2017).
"""

from revnet_jax.config import CIFAR100, CIFAR_LAPTOP, cifar, with_arms


def get_config(arm: str = ""):
    config = cifar()
    config.model.update(
        {
            "family": "resnet",
            # 110 = 2 + 3 stages x 18 units x 2 convolutions; the 2 are the stem and the classifier.
            "units": (18, 18, 18),
            "channels": (16, 16, 32, 64),
            "bottleneck": False,
            "backprop": "store",
        }
    )
    return with_arms(config, arm, {"cifar100": CIFAR100, "laptop": CIFAR_LAPTOP})
