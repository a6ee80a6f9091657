"""Rules by which hyperparameters tuned on a small model hold for a wider one: how each kind of parameter begins, and how fast it learns.

A parameter says its role and its fan_in as it is made (layers/init.py); a rule turns both into two factors, which are 1 where the fan_in is
the tuned model's. No rule multiplies in the forward pass: what was trained is an ordinary model.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from moejax import config
from moejax.errors import ConfigError


class Factors(NamedTuple):
    """Of one parameter."""

    init: float
    """Of its initial values."""
    rate: float
    """Of what Adam makes of its gradient; weight decay is left alone."""


Rule = Callable[[float], Factors]
"""fan_in over that of the tuned model -> factors, beside an initial standard deviation of 1 / sqrt(fan_in)."""


def same(fan: float) -> Factors:
    """Nothing changes."""
    return Factors(1.0, 1.0)


def kept(fan: float) -> Factors:
    """One input of many decides, as in an embedding: standard deviation and learning rate do not depend on the width."""
    return Factors(fan**0.5, 1.0)


def summed(fan: float) -> Factors:
    """Many inputs to many outputs: a step moves every weight by 1 / fan_in, and the sum by as much at any width."""
    return Factors(1.0, 1 / fan)


def read(fan: float) -> Factors:
    """Many inputs to few outputs: inputs learn along these weights, so they begin at 1 / fan_in, or the sum grows with sqrt(fan_in)."""
    return Factors(fan**-0.5, 1 / fan)


RULES: dict[str, dict[str, Rule] | None] = {
    "none": None,
    "mup": {
        "vector": same,
        "embedding": kept,
        "hidden": summed,
        "expert_in": summed,
        "expert_out": summed,
        # Not `read`: logits that shrink with the width would route, and balance, otherwise from the first step on.
        "router": summed,
        "output": read,
    },
}
"""By role. Yang et al. 2022, tables 3 and 8, for Adam; experts as hidden weights: Malasnicki et al. 2025. None leaves a model as it is."""

SIZES: dict[str, tuple[str, ...]] = {
    "width": ("width",),
    "heads": ("heads",),
    "hidden": ("hidden",),
    "expert_hidden": ("moe", "hidden"),
    "shared_hidden": ("moe", "shared_hidden"),
    "expert_latent": ("moe", "latent"),
    "latent_rank": ("latent", "rank"),
    "query_rank": ("latent", "query_rank"),
}
"""Where the model has what a size of the tuned model stands for."""


def tuned(model: config.Model, transfer: config.Transfer) -> config.Model:
    """The model whose hyperparameters are transferred."""
    for name, path in SIZES.items():
        if size := getattr(transfer, name):
            model = _replaced(model, path, size)
    return model


def _replaced(part: Any, path: Sequence[str], size: int) -> Any:
    """A section with another size at the end of the path."""
    name, *rest = path
    return dataclasses.replace(part, **{name: _replaced(getattr(part, name), rest, size) if rest else size})


def check(model: config.Model, transfer: config.Transfer) -> None:
    """The rules' name, and that every size of the tuned model has its like in this one."""
    if transfer.rules not in RULES:
        near = difflib.get_close_matches(transfer.rules, RULES, n=1, cutoff=0.3)
        remedy = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(RULES)}"
        raise ConfigError(f"transfer.rules={transfer.rules!r}: {remedy}")
    if RULES[transfer.rules] is not None and not any(getattr(transfer, name) for name in SIZES):
        raise ConfigError(
            f"transfer.rules={transfer.rules} without a size of the tuned model changes nothing; set transfer.width, and each of "
            f"{', '.join(name for name in SIZES if name != 'width')} that differed"
        )
    for name, path in SIZES.items():
        size, own = getattr(transfer, name), functools.reduce(getattr, path, model)
        if size < 0 or (size and not own):
            raise ConfigError(
                f"transfer.{name}={size} and model.{'.'.join(path)}={own}: a size of the tuned model is at least 1 where the model has "
                f"such a part, or 0 for the model's own"
            )
    if transfer.expert_hidden and model.moe.hidden_classes:
        raise ConfigError(
            f"transfer.expert_hidden={transfer.expert_hidden} with model.moe.hidden_classes={model.moe.hidden_classes}: which width it is "
            f"the tuned one of is not said; leave it at 0 and tune with these widths"
        )
