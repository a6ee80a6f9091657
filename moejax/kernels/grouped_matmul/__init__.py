from moejax.kernels.grouped_matmul.api import BACKENDS, grouped_matmul, grouped_matmul_dw, pick
from moejax.kernels.grouped_matmul.backend import Groups

__all__ = ["BACKENDS", "Groups", "grouped_matmul", "grouped_matmul_dw", "pick"]
