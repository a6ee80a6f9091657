"""The kill test at full length (B22): two processes, killed with -9 at random moments, end as the undisturbed run does, bit for bit.

python tests/hosts/soak.py [KILLS [STEPS [FOLDER]]]      50 kills, 6,000 steps, a temporary folder
"""

import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from hosts import faults
from train import small

LONG = {"checkpoint.every": 10, "train.eval_every": 100, "train.routing_every": 500, "train.log_every": 5}


def main(kills=50, steps=6000, folder=None):
    tmp = pathlib.Path(folder or tempfile.mkdtemp())
    tmp.mkdir(parents=True, exist_ok=True)
    text = small.prepared(tmp / "text")
    options = LONG | {"train.steps": steps}
    began = time.monotonic()
    say = lambda line: print(f"{time.monotonic() - began:7.1f} s  {line}", flush=True)  # noqa: E731
    whole = faults.finish(faults.start(text, tmp / "whole", **options), 1800)
    assert [code for code, *_ in whole] == [0, 0], whole
    say(f"undisturbed: {steps} steps")
    rows, last = faults.killed_often(text, tmp / "killed", kills, tell=say, **options)
    say(f"the last start ended with {[code for code, *_ in last]}")
    assert [code for code, *_ in last] == [0, 0], last
    same = (tmp / "killed" / "metrics.jsonl").read_bytes() == (tmp / "whole" / "metrics.jsonl").read_bytes()
    equal = faults.digests(tmp / "killed", steps) == faults.digests(tmp / "whole", steps)
    found = faults.events(tmp / "killed")
    lost = [line["lost_steps"] for line in found if "lost_steps" in line]
    resumed = sum(line["event"] == "resumed" for line in found)
    say(
        f"{len(rows)} kills; resumed {resumed} times from a checkpoint; {sum(lost)} steps lost and made again, at most {max(lost)} at once"
    )
    say(f"damaged checkpoints: {sum(line['event'] == 'damaged checkpoint' for line in found)}")
    say(f"metrics.jsonl is {'the same, byte for byte' if same else 'DIFFERENT'}")
    say(f"digests of all arrays of the last checkpoint are {'the same' if equal else 'DIFFERENT'}")
    if not (same and equal):
        sys.exit(1)


if __name__ == "__main__":
    main(*(int(a) for a in sys.argv[1:3]), *sys.argv[3:4])
