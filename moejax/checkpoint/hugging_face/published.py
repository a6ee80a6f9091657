"""A published checkpoint as a whole: its model, its tensors, the rules that they follow, and what is left behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax import config
from moejax.checkpoint import paths, planning
from moejax.checkpoint.hugging_face import outline, quantized
from moejax.checkpoint.hugging_face.families import FAMILIES, Family
from moejax.checkpoint.hugging_face.fields import Fields
from moejax.checkpoint.hugging_face.files import open_folder, read_json
from moejax.checkpoint.hugging_face.quantized import Tensor
from moejax.checkpoint.rules import Job, drop
from moejax.errors import UserError

Shapes = Mapping[str, Any]
"""Path of the train state -> anything with a shape and a type."""


@dataclasses.dataclass(frozen=True)
class Published:
    """A folder that was opened; no tensor has been read."""

    folder: Path
    name: str
    """model_type."""
    model: config.Model
    tensors: Mapping[str, Tensor]
    ignored: Mapping[str, str]
    """Pattern -> why its tensors are left behind."""

    @property
    def family(self) -> Family:
        return FAMILIES[self.name]

    def plan(self, targets: Shapes) -> dict[str, Job]:
        """How every target is made. Raises RuleError where names do not fit, UserError where a tensor has another shape than the config
        says or is not stored as a number: all from headers."""
        rules = self.family.rules(self.model)
        left = tuple(drop(pattern) for pattern in self.ignored)
        jobs = planning.plan((*rules, *left), self.tensors, targets)
        for name, shape in outline.shapes(rules, targets).items():
            tensor = self.tensors[name]
            quantized.require_float(name, tensor)
            if tensor.shape != shape:
                file = next(iter(tensor.parts.values())).file
                raise UserError(
                    f"{file}: tensor {name} has shape {list(tensor.shape)}, and config.json makes it {list(shape)}; correct config.json, "
                    f"or fetch both again"
                )
        return jobs

    def report(self, jobs: Mapping[str, Job]) -> list[dict[str, str]]:
        """What became of every stored tensor: `name`, `became` (paths, or nothing) and `why`."""
        became: dict[str, list[str]] = {}
        for target, job in jobs.items():
            for name in job.reads.values():
                became.setdefault(name, []).append(target)
        rows = []
        for name, tensor in self.tensors.items():
            why = self._why(name) if name not in became else f"dequantised from {tensor.how}" if tensor.how else "read"
            rows += [{"name": part, "became": " ".join(became.get(name, ())), "why": why} for part in tensor.parts]
        return rows

    def _why(self, name: str) -> str:
        return next(why for pattern, why in self.ignored.items() if paths.match(pattern, name) is not None)


def open_published(folder: Path) -> Published:
    """Reads config.json and headers. Raises UserError for a family or field that moejax does not know, DamagedError for damage."""
    tree = read_json(folder / "config.json")
    name = tree.get("model_type")
    if name not in FAMILIES:
        raise UserError(f"{folder / 'config.json'}: model_type={name!r} is not read; families: {', '.join(FAMILIES)}")
    fields = Fields(tree, str(folder / "config.json"))
    model, ignored = FAMILIES[name].read(fields), FAMILIES[name].ignored(fields)
    fields.done()
    return Published(folder, name, model, quantized.tensors(open_folder(folder), tree), ignored)


def load(folder: Path, shapes: Callable[[config.Model], Shapes]) -> tuple[config.Model, dict[str, np.ndarray]]:
    """A small checkpoint, whole, on the host: its model, and float32 arrays by path of the train state. `shapes` are those of the
    model's leaves. Larger ones: `stream`."""
    published = open_published(folder)
    targets = {path: jax.ShapeDtypeStruct(leaf.shape, np.float32) for path, leaf in shapes(published.model).items()}
    jobs = published.plan(targets)
    read = lambda name: published.tensors[name].array().astype(np.float32)  # noqa: E731
    return published.model, {path: np.ascontiguousarray(job.run(read, targets[path])) for path, job in jobs.items()}
