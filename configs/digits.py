"""A small RevNet on the digits that come with the package; arm: laptop (the same).

    python scripts/train.py --config=configs/digits.py --workdir=WORKDIR

On two busy CPU cores: 97.2 % test accuracy in 98 seconds.
"""

from revnet_jax.config import image_classification, with_arms


def get_config(arm: str = ""):
    config = image_classification()
    config.data.crop_padding = 1
    return with_arms(config, arm, {"laptop": {}})
