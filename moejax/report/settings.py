"""The configs of runs, and how they differ from the default and from each other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from moejax.report import table
from moejax.report.runs import Run
from moejax.train.workdir import with_defaults

Lines = list[list[str]]


def differing(runs: Sequence[Run]) -> tuple[Lines, Lines]:
    """Options that the runs have different values of; and those that they share, but not with the default. A line is the option, the
    default and a value per run."""
    default = dict(flat(with_defaults({})))
    each = [dict(flat(run.config)) for run in runs]
    between: Lines = []
    together: Lines = []
    for key in dict.fromkeys([*default, *(key for tree in each for key in tree)]):
        values = [tree.get(key, default.get(key, table.NONE)) for tree in each]
        line = [key, default.get(key, table.NONE), *values]
        if len(set(values)) > 1:
            between.append(line)
        elif values[0] != line[1]:
            together.append(line)
    return between, together


def flat(tree: Any, path: str = "") -> Iterable[tuple[str, str]]:
    """`model.moe.top_k`, `2` of every option."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from flat(value, f"{path}.{key}" if path else key)
    else:
        yield path, json.dumps(tree)
