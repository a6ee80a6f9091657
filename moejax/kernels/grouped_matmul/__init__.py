from moejax.kernels.grouped_matmul.api import BACKENDS, backend, grouped_matmul, grouped_matmul_dw, pick
from moejax.kernels.grouped_matmul.backend import Groups

__all__ = ["BACKENDS", "Groups", "backend", "grouped_matmul", "grouped_matmul_dw", "pick"]
