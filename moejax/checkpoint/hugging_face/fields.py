"""config.json of a published model, read strictly: every field is used, has the one value that moejax computes with, or is known not to
change what the model computes. Any other is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moejax.errors import UserError

REQUIRED: Any = object()

NEUTRAL = (
    "_name_or_path", "architectures", "attention_dropout", "auto_map", "aux_loss_alpha", "bos_token_id", "dtype", "eos_token_id", "ep_size",
    "initializer_range", "max_position_embeddings", "model_type", "output_router_logits", "pad_token_id", "pretraining_tp",
    "quantization_config", "router_aux_loss_coef", "router_jitter_noise", "seq_aux", "torch_dtype", "transformers_version", "unsloth_fixed",
    "use_cache",
)  # fmt: skip
"""Names of things, training, and how weights are stored (which quantized.py reads)."""


class Fields:
    """The fields of one config.json, or of a section of it; remembers which were asked for."""

    def __init__(self, tree: Mapping[str, Any], where: str):
        self._tree, self.where = tree, where
        self._asked: set[str] = set()

    def get(self, *names: str, default: Any = REQUIRED) -> Any:
        """The value of a field, by any of its names; names that are all there must agree. null counts as absent."""
        self._asked |= set(names)
        there = {name: self._tree[name] for name in names if self._tree.get(name) is not None}
        if any(value != next(iter(there.values())) for value in there.values()):
            raise UserError(f"{self.where}: {there} are names of one field with several values; correct it")
        if there:
            return next(iter(there.values()))
        if default is REQUIRED:
            raise UserError(f"{self.where} has no {' or '.join(names)}, without which the model is not known; add it")
        return default

    def must(self, **wanted: Any) -> None:
        """Fields that, where they are there, have one value: moejax computes no other. A tuple lists several."""
        for name, value in wanted.items():
            self._asked.add(name)
            choices = value if isinstance(value, tuple) else (value,)
            found = self._tree.get(name)
            if found is not None and found not in choices:
                raise UserError(
                    f"{self.where}: {name}={found!r}; moejax computes this family with {' or '.join(map(repr, choices))} alone"
                )

    def pass_over(self, *names: str) -> None:
        """Fields that change nothing that the model computes."""
        self._asked |= set(names)

    def section(self, name: str) -> Fields:
        """A section as fields of its own; empty where there is none."""
        return Fields(self.get(name, default={}), f"{self.where}: {name}")

    def done(self) -> None:
        """Raises UserError for a field that nobody asked for."""
        left = sorted(self._tree.keys() - self._asked - set(NEUTRAL))
        if left:
            raise UserError(
                f"{self.where}: {', '.join(f'{name}={self._tree[name]!r}' for name in left[:3])} is not known for this family; if it "
                f"changes nothing that the model computes delete it from config.json, else moejax cannot compute it"
            )
