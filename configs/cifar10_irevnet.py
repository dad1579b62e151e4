r"""A fully invertible RevNet on CIFAR-10; arms: cifar100, laptop (half an epoch, for a CPU).

    python scripts/train.py --config=configs/cifar10_irevnet.py \
        --config.data.dir=DIR --workdir=WORKDIR

After i-RevNet (Jacobsen et al. 2018, arXiv:1802.07088), with the basic units of a RevNet. From the
image to the features nothing is stored and nothing is lost. On two busy CPU cores the laptop arm
reaches 52.7 % test accuracy in 3.7 minutes (pixels once through JPEG).
"""

from revnet_jax.config import CIFAR100, CIFAR_LAPTOP, cifar, with_arms


def get_config(arm: str = ""):
    config = cifar()
    config.model.update(
        {
            "family": "irevnet",
            # Zeros are added to the 3 channels, which loses nothing.
            "stem": "pad",
            "units": (3, 3, 1),
            # 32 x 32 x 16 = 16 x 16 x 64 = 8 x 8 x 256: no stage loses a number.
            "channels": (16, 16, 64, 256),
            "bottleneck": False,
        }
    )
    return with_arms(config, arm, {"cifar100": CIFAR100, "laptop": CIFAR_LAPTOP})
