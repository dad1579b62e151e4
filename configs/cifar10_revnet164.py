r"""RevNet-164 on CIFAR-10; arms: cifar100, laptop (half an epoch, for a CPU), or both.

    python scripts/train.py --config=configs/cifar10_revnet164.py \
        --config.data.dir=DIR --workdir=WORKDIR

DIR holds cifar-10-batches-bin or cifar-10-batches-py (cifar-100-...: `--config=FILE:cifar100`).
Published test error, CIFAR-10 / CIFAR-100: 5.17 / 23.69 % (Gomez et al. 2017).
"""

from revnet_jax.config import CIFAR100, CIFAR_LAPTOP, cifar, with_arms


def get_config(arm: str = ""):
    config = cifar()
    config.model.update(
        {
            "family": "revnet",
            # 164 = 2 + 3 stages x 9 units x 2 branches x 3 convolutions.
            "units": (9, 9, 9),
            "channels": (32, 128, 256, 512),
            "bottleneck": True,
        }
    )
    return with_arms(config, arm, {"cifar100": CIFAR100, "laptop": CIFAR_LAPTOP})
