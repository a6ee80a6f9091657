"""The weights of experts as the library has them and as the oracle has them."""

import numpy as np

from moejax.kernels.grouped_mlp import Weights


def parted(gate_up, down):
    """SwiGLU weights as the library has them, of the oracle's gate_up [E,D,2,F] and down [E,F,D]."""
    return Weights(up=gate_up[:, :, 1], down=down, gate=gate_up[:, :, 0])


def joined(w):
    """The inverse of `parted`."""
    return np.stack([np.asarray(w.gate), np.asarray(w.up)], axis=2), np.asarray(w.down)


def padded(experts):
    """Classes of widths as one array each: hidden units of zero weights add nothing and get no gradient."""
    most = max(down.shape[1] for _, down in experts)

    def pad(a, axis):
        wide = [(0, most - a.shape[axis] if i == axis else 0) for i in range(a.ndim)]
        return np.pad(a, wide)

    return (np.concatenate(parts) for parts in zip(*((pad(up, 3), pad(down, 1)) for up, down in experts), strict=True))
