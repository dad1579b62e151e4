r"""ResNet-32 on CIFAR-10; arms: cifar100, laptop (half an epoch, for a CPU), or both.

    python scripts/train.py --config=configs/cifar10_resnet32.py \
        --config.data.dir=DIR --workdir=WORKDIR

DIR holds cifar-10-batches-bin or cifar-10-batches-py (cifar-100-...: `--config=FILE:cifar100`).
Published test error, CIFAR-10 / CIFAR-100: 7.14 / 29.95 % (Gomez et al. 2017).
"""

from revnet_jax.config import CIFAR100, CIFAR_LAPTOP, cifar, with_arms


def get_config(arm: str = ""):
    config = cifar()
    config.model.update(
        {
            "family": "resnet",
            # 32 = 2 + 3 stages x 5 units x 2 convolutions; the 2 are the stem and the classifier.
            "units": (5, 5, 5),
            "channels": (16, 16, 32, 64),
            "bottleneck": False,
            "backprop": "store",
        }
    )
    return with_arms(config, arm, {"cifar100": CIFAR100, "laptop": CIFAR_LAPTOP})
