"""The other end of peer.py, for an interpreter that need not have this library.

python peer_process.py BLOCKS.py INPUTS.npz SETTINGS.json: says hello on its output, then does what each line of its input asks, one JSON
object a line. BLOCKS.py defines blocks(arrays, settings), which returns {name: {"forward", "both"}}, functions of no arguments that return
when all is done; a function that makes an fp32 array of an output; and the versions of what is run.
"""

import json
import os
import runpy
import sys
import time

del sys.path[0]  # this folder: it has a statistics.py too

import numpy as np  # noqa: E402


def main(blocks, inputs, settings):
    """Answers until its input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is not an answer

    def say(answer):
        print(json.dumps(answer), file=out, flush=True)

    with open(settings) as file:
        settings = json.load(file)
    calls, array, versions = runpy.run_path(blocks)["blocks"](dict(np.load(inputs)), settings)
    for functions in calls.values():  # the first call of each is not like the others
        for call in functions.values():
            call()
    say({"versions": versions, "names": list(calls)})
    for line in sys.stdin:
        asked = json.loads(line)
        call = calls[asked["name"]]
        if asked["kind"] == "output":
            file = os.path.join(os.path.dirname(inputs), "output.npy")
            np.save(file, array(call["forward"]()))
            say({"file": file})
            continue
        began = time.perf_counter()
        call[asked["kind"]]()
        say({"seconds": time.perf_counter() - began})


if __name__ == "__main__":
    main(*sys.argv[1:])
