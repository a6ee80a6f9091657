from moejax.kernels.grouped_mlp.api import grouped_mlp
from moejax.kernels.grouped_mlp.weights import Weights

__all__ = ["Weights", "grouped_mlp"]
