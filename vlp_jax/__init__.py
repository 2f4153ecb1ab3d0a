"""Vision-language pretraining in JAX at a fraction of the usual cost."""

from vlp_jax.version import __version__

__all__ = ["__version__"]
