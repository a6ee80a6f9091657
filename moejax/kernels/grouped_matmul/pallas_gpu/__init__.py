"""Kernels for Hopper in Pallas' Mosaic GPU: TMA, warp-specialised, wgmma."""

from moejax.kernels.grouped_matmul.pallas_gpu.forward import matmul
from moejax.kernels.grouped_matmul.pallas_gpu.gated import glu
from moejax.kernels.grouped_matmul.pallas_gpu.gradient import weight_gradient
from moejax.kernels.grouped_matmul.pallas_gpu.tiles import Tiles, neighbours, supports

__all__ = ["Tiles", "glu", "matmul", "neighbours", "supports", "weight_gradient"]
