"""Image networks as pure functions over trees of arrays."""

from revnet_jax.models.network import Architecture, Network, Variables, num_params

__all__ = ["Architecture", "Network", "Variables", "num_params"]
