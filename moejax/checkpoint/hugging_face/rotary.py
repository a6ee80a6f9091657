"""Rotary positions in config.json: the section `rope_parameters`, or in older files `rope_theta` beside `rope_scaling`."""

from __future__ import annotations

import math
from typing import Any

from moejax import config
from moejax.checkpoint.hugging_face.fields import Fields
from moejax.config_attention import Rope
from moejax.errors import UserError

SCALINGS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}


def read(fields: Fields, *, interleaved: bool = False, fraction: float = 1.0) -> dict[str, Any]:
    """`rope_theta` and `rope` of a Model. `fraction` is what the family turns unless it says otherwise."""
    new, old = fields.section("rope_parameters"), fields.section("rope_scaling")
    theta = _either(fields, new, "rope_theta", None)
    if theta is None:
        raise UserError(f"{fields.where} has no rope_theta, at the top or in rope_parameters; add it")
    fraction = _either(fields, new, "partial_rotary_factor", fraction)
    rope = Rope(fraction=float(fraction), interleaved=interleaved)
    for section in (new, old):
        kind = section.get("rope_type", "type", default="default")
        if kind not in SCALINGS:
            raise UserError(f"{section.where}: rope_type={kind!r}; moejax computes {', '.join(SCALINGS)}")
        if kind != "default":
            rope = _scaled(rope, SCALINGS[kind], section)
        section.done()
    return {"rope_theta": float(theta), "rope": rope}


def _either(fields: Fields, section: Fields, name: str, default: Any) -> Any:
    """A field of the section, or beside it."""
    beside = fields.get(name, default=None)
    inside = section.get(name, default=beside)
    if beside is not None and inside != beside:
        raise UserError(f"{fields.where}: {name}={beside!r} at the top and {inside!r} in rope_parameters; correct one")
    return default if inside is None else inside


def _scaled(rope: Rope, kind: str, section: Fields) -> Rope:
    number = lambda name, default: float(section.get(name, default=default))  # noqa: E731
    common = {
        "fraction": rope.fraction,
        "interleaved": rope.interleaved,
        "scaling": kind,
        "factor": float(section.get("factor")),
    }
    if kind == "linear":
        return Rope(**common)
    common["original_context"] = int(section.get("original_max_position_embeddings"))
    if kind == "llama3":
        return Rope(
            **common,
            low_frequency=float(section.get("low_freq_factor")),
            high_frequency=float(section.get("high_freq_factor")),
        )
    scale, scale_all = number("mscale", 0.0), number("mscale_all_dim", 0.0)
    magnitude = section.get("attention_factor", default=None)
    if magnitude is None and bool(scale) != bool(
        scale_all
    ):  # the published quotient counts only with both of its parts
        magnitude = 0.1 * math.log(common["factor"]) + 1 if common["factor"] > 1 else 1.0
    return Rope(
        **common, beta_fast=number("beta_fast", 32.0), beta_slow=number("beta_slow", 1.0), truncate=section.get("truncate", default=True),
        magnitude=None if magnitude is None else float(magnitude), mscale=scale, mscale_all=scale_all,
    )  # fmt: skip


def write(model: config.Model) -> dict[str, Any]:
    """`rope_parameters` of config.json."""
    rope = model.rope
    kind = next(name for name, ours in SCALINGS.items() if ours == rope.scaling)
    found: dict[str, Any] = {"rope_type": kind, "rope_theta": model.rope_theta}
    if rope.fraction != 1:
        found["partial_rotary_factor"] = rope.fraction
    if kind != "default":
        found["factor"] = rope.factor
    if kind in ("llama3", "yarn"):
        found["original_max_position_embeddings"] = rope.original_context
    if kind == "llama3":
        found |= {"low_freq_factor": rope.low_frequency, "high_freq_factor": rope.high_frequency}
    if kind == "yarn":
        found |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        found |= {"mscale": rope.mscale} if rope.mscale else {}
        found |= {"mscale_all_dim": rope.mscale_all} if rope.mscale_all else {}
        found |= {} if rope.magnitude is None else {"attention_factor": rope.magnitude}
    return found
