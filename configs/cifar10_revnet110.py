r"""RevNet-110 on CIFAR-10; arms: cifar100, laptop (half an epoch, for a CPU), or both.

    python scripts/train.py --config=configs/cifar10_revnet110.py \
        --config.data.dir=DIR --workdir=WORKDIR

DIR holds cifar-10-batches-bin or cifar-10-batches-py (cifar-100-...: `--config=FILE:cifar100`).
Published test error, CIFAR-10 / CIFAR-100: 5.76 / 25.40 % (Gomez et al. 2017).
"""

from revnet_jax.config import CIFAR100, CIFAR_LAPTOP, cifar, with_arms


def get_config(arm: str = ""):
    config = cifar()
    config.model.update(
        {
            "family": "revnet",
            # 110 = 2 + 3 stages x 9 units x 2 branches x 2 convolutions.
            "units": (9, 9, 9),
            # Both streams together, so each is as wide as ResNet-110, which has twice the units.
            "channels": (32, 32, 64, 128),
            "bottleneck": False,
        }
    )
    return with_arms(config, arm, {"cifar100": CIFAR100, "laptop": CIFAR_LAPTOP})
