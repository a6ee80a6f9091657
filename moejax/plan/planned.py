"""Between plans and what a command prints: experiment files by path, numbers for JSON."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from moejax import mesh as meshes
from moejax.errors import ConfigError
from moejax.plan import account
from moejax.plan.account import Account
from moejax.plan.introduction import Copies
from moejax.plan.search import Candidate

NAMED = (("mixtral_8x7b", 8, 7e9), ("mixtral_8x22b", 8, 22e9))
"""Models whose names multiply experts by a size: file under configs/models, experts, parameters."""
MODELS = Path(__file__).parents[2] / "configs" / "models"


def totals(counted: Account) -> dict[str, Any]:
    """The first numbers of an account, for JSON."""
    return {"total_parameters": counted.total_parameters, "active_parameters": counted.active_parameters}


def load(path: str) -> Any:
    """The ConfigDict of an experiment file. Raises ConfigError for a file that is none or that does not run."""
    file = Path(path).expanduser()
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise ConfigError(f"{path} is not an experiment file; give a Python file with get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file raises
        raise ConfigError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} has no get_config(); give an experiment file")
    return module.get_config()


def named_copies() -> list[Copies]:
    """The models of NAMED whose files are there: an installed library has no configs."""
    files = [(MODELS / f"{name}.py", experts, each) for name, experts, each in NAMED]
    return [Copies(f.stem, account.of_tree(load(str(f))), experts, each) for f, experts, each in files if f.is_file()]


def of_candidate(candidate: Candidate) -> dict[str, Any]:
    """For JSON."""
    return {
        "mesh": meshes.several(candidate.config.mesh), "microbatches": candidate.config.train.microbatches, "fits": candidate.fits,
        "compiled": candidate.compiled, "memory": candidate.memory, "reason": candidate.reason, "roofline": candidate.roofline.to_dict(),
    }  # fmt: skip
