"""Dense twins of a sparse model, in closed form: the same embeddings, mixers, norms and caches, one dense layer for each sparse one."""

from __future__ import annotations

import dataclasses

from moejax.plan import parts
from moejax.plan.account import Account
from moejax.plan.parts import Part

SPARSE = {"router", "latent", "experts", "constants", "shared"}
"""Parts of sparse layers, which one dense part replaces."""
ENCODER = "encoder "
"""What parts of an encoder are called before their own name (`plan.stacks`)."""


def is_sparse(account: Account) -> bool:
    """Whether a token meets some parameters and not others."""
    return any(part.active < part.parameters for part in account.parts)


def equal_total(account: Account) -> Account:
    """As many parameters in all; a token meets every one."""
    return _twin(account, "parameters")


def equal_active(account: Account) -> Account:
    """As many parameters in all as a token of the sparse model meets, counted with both embeddings (A)."""
    return _twin(account, "active")


def _twin(account: Account, size: str) -> Account:
    """Parts of sparse layers become one dense part of so many parameters, whatever hidden width that is; so do, under their own name,
    modules for further tokens with experts."""
    found = [_dense(part, getattr(part, size)) if _is_of_sparse_layers(part) else part for part in account.parts]
    return dataclasses.replace(account, parts=parts.merged(found))


def _is_of_sparse_layers(part: Part) -> bool:
    return part.active < part.parameters or part.name.removeprefix(ENCODER) in SPARSE


def _dense(part: Part, number: int) -> Part:
    """So many parameters, of which all are met, as many of them in matrices as there were, with as many scales to a weight."""
    prefix = ENCODER if part.name.startswith(ENCODER) else ""
    name = f"{prefix}dense" if part.name.removeprefix(ENCODER) in SPARSE else part.name
    share = number / part.parameters
    matrices, scales = round(part.matrices * share), round(part.scales * share)
    return Part(name, number, number, number, matrices, scales, part.decoding)
