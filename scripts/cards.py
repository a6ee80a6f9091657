"""Copies the numbers of the benches into the cards of docs/ and draws their pictures.

Example: python scripts/cards.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from absl import flags

from moejax import cli
from moejax.errors import UserError

DOCS = Path(__file__).parents[1] / "docs"
ROUTERS = flags.DEFINE_string("routers", "benchmarks/routers_cpu.json", "result of scripts/bench.py routers --json")
BALANCERS = flags.DEFINE_string(
    "balancers", "benchmarks/balancers_cpu.json", "result of scripts/bench.py balancers --json"
)


def main() -> None:
    from moejax.report import cards  # matplotlib is an extra

    results = {"routers": _read(ROUTERS), "balancers": _read(BALANCERS)}
    for name, result in results.items():
        page = DOCS / f"{name}.md"
        page.write_text(cards.fill(page.read_text(), result))
    cards.pictures(results["routers"], DOCS / cards.PICTURES)
    print(f"docs/routers.md, docs/balancers.md and {len(results['routers']['rows'])} pictures are up to date")


def _read(flag: flags.FlagHolder) -> dict[str, Any]:
    try:
        return json.loads(Path(flag.value).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"--{flag.name}={flag.value} cannot be read ({error}); make it with scripts/bench.py"
        ) from error


if __name__ == "__main__":
    cli.run(main)
