from moejax.kernels.grouped_matmul.pallas_tpu.forward import matmul
from moejax.kernels.grouped_matmul.pallas_tpu.gated import dglu, glu
from moejax.kernels.grouped_matmul.pallas_tpu.gradient import weight_gradient
from moejax.kernels.grouped_matmul.pallas_tpu.rows import supports
from moejax.kernels.grouped_matmul.tiling import Tiles, neighbours

__all__ = ["Tiles", "dglu", "glu", "matmul", "neighbours", "supports", "weight_gradient"]
