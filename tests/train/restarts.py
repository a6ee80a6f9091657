"""A run that is started a hundred times in one process: nothing of it stays (memory, files, threads).

python tests/train/restarts.py [STARTS]
"""

import gc
import os
import pathlib
import resource
import sys
import tempfile
import threading

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
from train import small

from moejax.train import loop

ALLOWED = 1.0
"""MB a start that the process may grow by, once it has all that it needs."""


def now():
    """Resident megabytes, open files, threads."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return pages * resource.getpagesize() / 1e6, len(os.listdir("/proc/self/fd")), threading.active_count()


def main(starts=100):
    folder = pathlib.Path(tempfile.mkdtemp())
    text = small.prepared(folder / "text")
    options = {
        "data.source": "prepared",
        "data.files": str(text),
        "train.steps": 2,
        "train.warmup": 1,
        "checkpoint.every": 1,
    }
    cfg = small.configure(**options)
    rows = []
    for number in range(1, starts + 1):
        loop.train(cfg, str(folder / "run"), quiet=True)
        jax.clear_caches()
        gc.collect()
        rows.append(now())
        if number in (1, starts) or number % 10 == 0:
            print(
                f"start {number}: {rows[-1][0]:.0f} MB resident, {rows[-1][1]} open files, {rows[-1][2]} threads",
                flush=True,
            )
    half = rows[starts // 2]
    growth = (rows[-1][0] - half[0]) / (starts - starts // 2 - 1)
    print(
        f"over the second half: {growth:.2f} MB a start, {rows[-1][1] - half[1]} files, {rows[-1][2] - half[2]} threads"
    )
    if growth > ALLOWED or rows[-1][1] > half[1] or rows[-1][2] > half[2]:
        sys.exit(1)


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:]))
