r"""RevNet-38 on CIFAR-10; arms: cifar100, laptop (half an epoch, for a CPU), or both.

    python scripts/train.py --config=configs/cifar10_revnet38.py \
        --config.data.dir=DIR --workdir=WORKDIR

DIR holds cifar-10-batches-bin or cifar-10-batches-py (cifar-100-...: `--config=FILE:cifar100`).
On two CPU cores the laptop arm reaches 57.0 % test accuracy in 4.8 minutes (pixels once through
JPEG). Published test error, CIFAR-10 / CIFAR-100: 7.24 / 28.96 % (Gomez et al. 2017).
"""

from revnet_jax.config import CIFAR100, CIFAR_LAPTOP, cifar, with_arms


def get_config(arm: str = ""):
    config = cifar()
    config.model.update(
        {
            "family": "revnet",
            # 38 = 2 + 3 stages x 3 units x 2 branches x 2 convolutions.
            "units": (3, 3, 3),
            # Both streams together. With 112 it has about the parameters of ResNet-32: 464,890 and
            # 464,154.
            "channels": (32, 32, 64, 112),
            "bottleneck": False,
        }
    )
    return with_arms(config, arm, {"cifar100": CIFAR100, "laptop": CIFAR_LAPTOP})
