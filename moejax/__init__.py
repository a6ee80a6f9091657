"""moejax: sparse models in JAX whose answers do not depend on the mesh."""

__version__ = "0.1.0"
