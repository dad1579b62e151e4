"""A small RevNet on the digits that come with the package; arm: laptop (the same).

    python scripts/train.py --config=configs/digits.py --workdir=WORKDIR

On two CPU cores: about 97 % test accuracy in 33 seconds.
"""

from revnet_jax.config import digits, with_arms


def get_config(arm: str = ""):
    return with_arms(digits(), arm, {"laptop": {}})
