from moejax.kernels.grouped_matmul.pallas_tpu.forward import matmul
from moejax.kernels.grouped_matmul.pallas_tpu.gated import dglu, glu
from moejax.kernels.grouped_matmul.pallas_tpu.gradient import weight_gradient

__all__ = ["dglu", "glu", "matmul", "weight_gradient"]
