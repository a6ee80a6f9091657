"""Shows what runs learned, what that took and where routing sent the text: a table here, the pictures in a page.

Example: python scripts/report.py --workdir=runs/tiny_sparse --workdir=runs/tiny_dense

The first run is compared with each other one. The page is report.html in the first workdir, or --out. With --json the
numbers are printed as JSON and nothing else, and a page is written only to --out. With --watch the page is made again
while the runs go on, and an open one shows it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from absl import flags

from moejax import cli
from moejax.errors import UserError
from moejax.report import runs, table

WORKDIR = flags.DEFINE_multi_string("workdir", None, "folder of a run of scripts/train.py; again for each further run")
OUT = flags.DEFINE_string("out", None, "the page; report.html in the first workdir if not given")
WATCH = flags.DEFINE_integer(
    "watch", 0, "seconds between looks at runs that go on, until all have ended; 0 for one look", lower_bound=0
)
JSON = flags.DEFINE_bool("json", False, "print the numbers as JSON and nothing else")


def main() -> None:
    if not WORKDIR.value:
        raise UserError("--workdir is missing; for example --workdir=runs/tiny_sparse")
    folders = [Path(folder).expanduser() for folder in WORKDIR.value]
    while not _shown(folders) and WATCH.value:
        time.sleep(WATCH.value)


def _shown(folders: list[Path]) -> bool:
    """The runs as they are now, in a table and a page; whether all have ended. One that is watched may not have begun to log."""
    try:
        found = runs.load_all(folders)
    except runs.NotYetError as error:
        if not WATCH.value:
            raise
        print(error, flush=True)
        return False
    ended = all(run.finished for run in found)
    print(json.dumps(table.numbers(found), indent=2) if JSON.value else table.text(found), flush=True)
    if JSON.value and OUT.value is None:
        return ended
    from moejax.report import page  # matplotlib is an extra, and the table does not need it

    out = Path(OUT.value).expanduser() if OUT.value is not None else found[0].path / "report.html"
    page.write(found, out, refresh=0 if ended else WATCH.value)
    if not JSON.value:
        print(f"the pictures are in {out}", flush=True)
    return ended


if __name__ == "__main__":
    cli.run(main)
