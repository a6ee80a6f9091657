"""Runs a script for many command lines, each in a fork of one process that has imported what the script needs: the imports take seconds.

echo '{"script": "…/plan.py", "modules": ["moejax.plan.pods"], "cases": [{"arguments": ["--json"], "before": "python that runs first"}]}' \
  | python forked.py        prints [[exit code, stdout, stderr], …]
"""

import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]


def answers(script, modules, cases, seconds=120):
    """(exit code, stdout, stderr) of every case, in order. A case has `arguments`, and may have Python code that runs `before`."""
    asked = json.dumps({"script": str(ROOT / "scripts" / f"{script}.py"), "modules": modules, "cases": cases})
    left_out = ("XLA_FLAGS", "COLUMNS")
    environment = {k: v for k, v in os.environ.items() if k not in left_out} | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, __file__]
    done = subprocess.run(
        command, input=asked, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [tuple(answer) for answer in json.loads(done.stdout)]


def run(script, case):
    """In the child: the script as `python script.py …` runs it. Returns its exit code."""
    try:
        exec(case.get("before", ""), {})
        sys.argv = [script, *case["arguments"]]
        sys.path[0] = str(Path(script).parent)
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def forked(script, case):
    """(exit code, stdout, stderr) of one case."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            code = run(script, case)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for file in (out, err):
            file.seek(0)
        return code, out.read(), err.read()


if __name__ == "__main__":
    given = json.load(sys.stdin)
    for name in given["modules"]:
        importlib.import_module(name)
    warnings.simplefilter(
        "ignore", DeprecationWarning
    )  # of threads: none of them holds anything that a script waits for
    print(json.dumps([forked(given["script"], case) for case in given["cases"]]))
