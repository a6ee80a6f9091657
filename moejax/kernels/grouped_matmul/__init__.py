from moejax.kernels.grouped_matmul.api import BACKENDS, grouped_matmul, pick

__all__ = ["BACKENDS", "grouped_matmul", "pick"]
