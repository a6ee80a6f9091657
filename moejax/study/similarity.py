"""How alike are the experts of a layer? By what they do to the same vectors, and by their weights in whatever order.

By outputs: cosine of all outputs on the same held-out vectors, 1 where two experts are one function up to a factor. By weights: cosine of
sum_f gate_f x up_f x down_f, the tensor that a sum over hidden units is, so that their order does not matter; two experts equal up to a
permutation have 1, and the plain cosine of their weights says about 0.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float64

from moejax import config
from moejax.kernels.grouped_mlp import Weights, grouped_mlp
from moejax.moe import experts

TWINS = 0.95
"""Cosine of outputs from which two experts count as one."""
Matrix = Float64[np.ndarray, "E E"]


def of_layers(parameters: Any, model: config.Model) -> list[dict[str, Any]]:
    """The channel parameters of every sparse layer in order of depth, on the host."""
    found = [own["channel"] for _, own in sorted(parameters.get("first", {}).items())]
    channels = [own["channel"] for _, own in sorted(parameters["blocks"]["layers"].items())]
    found += [jax.tree.map(lambda x, i=i: x[i], own) for i in range(model.repeats) for own in channels]
    found += [own["layer"]["channel"] for _, own in sorted(parameters.get("further", {}).items())]
    return [jax.device_get(own) for own in found if "experts" in own]


def outputs(channel: dict[str, Any], x: Float[np.ndarray, "P D"], moe: config.MoE) -> Float64[np.ndarray, "E P L"]:
    """Of every expert on all of the same vectors, in fp32."""
    x = x if channel.get("into") is None else x @ channel["into"]
    found = []
    for _, own in sorted(channel["experts"].items()):
        weights = Weights(**{name: jnp.asarray(w) for name, w in own.items()})
        number = own["down"].shape[0]
        rows, sizes = jnp.tile(jnp.asarray(x), (number, 1)), jnp.full(number, len(x), jnp.int32)
        y = grouped_mlp(rows, None, sizes, weights, activation=experts.activation_of(moe))
        found.append(np.asarray(y, np.float64).reshape(number, len(x), -1))
    return np.concatenate(found)


def by_outputs(y: Float64[np.ndarray, "E P L"]) -> Matrix:
    """Cosine of all outputs; 0 beside an expert that says nothing."""
    flat = y.reshape(len(y), -1)
    return _cosine(flat @ flat.T)


def by_weights(channel: dict[str, Any]) -> Matrix:
    """Cosine of sum_f gate_f x up_f x down_f, of experts of any widths; biases are not compared."""
    columns = [
        [
            np.swapaxes(own[name], 1, 2)[e] if name != "down" else own[name][e]
            for name in ("gate", "up", "down")
            if name in own
        ]
        for _, own in sorted(channel["experts"].items())
        for e in range(len(own["down"]))
    ]
    number = len(columns)
    gram = np.zeros((number, number))
    for i in range(number):
        for j in range(i, number):
            parts = [a.astype(np.float64) @ b.T.astype(np.float64) for a, b in zip(columns[i], columns[j], strict=True)]
            gram[i, j] = gram[j, i] = np.prod(parts, axis=0).sum()
    return _cosine(gram)


def twins(similarity: Matrix, threshold: float = TWINS) -> list[tuple[int, int, float]]:
    """Pairs (i, j, cosine), i < j, at the threshold or above, the nearest first."""
    pairs = np.argwhere(np.triu(similarity >= threshold, k=1))
    return sorted(((int(i), int(j), float(similarity[i, j])) for i, j in pairs), key=lambda pair: -pair[2])


def apart(similarity: Matrix) -> Float64[np.ndarray, " pairs"]:
    """The cosines of all pairs."""
    return similarity[np.triu_indices(len(similarity), k=1)]


def _cosine(gram: Float64[np.ndarray, "E E"]) -> Matrix:
    size = np.sqrt(gram.diagonal())
    scale = size[:, None] * size[None, :]
    return np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0)
