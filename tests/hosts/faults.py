"""Runs of two real processes that something befalls, for tests and for `make soak`."""

import json
import os
import random
import signal
import socket
import time

from train import small

OPTIONS = {
    "train.steps": 24, "train.warmup": 2, "train.log_every": 1, "train.eval_every": 8, "train.eval_rows": 8, "train.routing_every": 12,
    "checkpoint.every": 4, "model.moe.router": "gshard", "model.moe.sign_bias": 0.01, "mesh.fsdp": 2, "mesh.expert": 2,
    "watchdog.step": 40, "train.replicas_every": 6,
}  # fmt: skip


def start(text, workdir, different=None, number=2, devices=2, **options):
    """Processes of so many devices each; `different` are options of the last alone."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    joined = [f"--workdir={workdir}"]
    joined += [f"--coordinator=localhost:{port}", f"--processes={number}"] if number > 1 else []
    of = [OPTIONS | options for _ in range(number)]
    of[-1] |= different or {}
    cache = small.PROGRAMS or text.parent / "compiled"
    return [
        small.start("train", *small.flags(text, **of[i]), *joined, f"--process={i}", devices=devices, cache=cache)
        for i in range(number)
    ]


def finish(processes, seconds=150):
    """[(exit code, stdout, stderr, seconds from the first end to this one's)]; what hangs is killed and says so."""
    first, ends = None, {}
    until = time.monotonic() + seconds
    while len(ends) < len(processes) and time.monotonic() < until:
        for i, process in enumerate(processes):
            if i not in ends and process.poll() is not None:
                first = first or time.monotonic()
                ends[i] = time.monotonic() - first
        time.sleep(0.02)
    found = []
    for i, process in enumerate(processes):
        if i not in ends:
            process.kill()
        out, err = process.communicate()
        found.append((process.returncode if i in ends else "hung", out, err, ends.get(i)))
    return found


def run(text, workdir, different=None, **options):
    """`finish` of `start`."""
    return finish(start(text, workdir, different, **options))


def steps(workdir):
    """Lines of metrics so far."""
    file = workdir / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def killed_often(text, workdir, kills, seed=0, tell=print, **options):
    """kill -9 of one or both processes at random moments until `kills` are done; then to the end. One kill in four is in the first
    seconds of a start, the others up to sixteen new lines after its first, and up to half a second after the last of those: in steps,
    evaluations and saves.

    Returns [(seconds alive, lines logged, exit codes)] of the killed ones, and the result of the last start.
    """
    rng, rows = random.Random(seed), []
    while len(rows) < kills:
        before, began = last_line(workdir), time.monotonic()
        processes = start(text, workdir, **options)
        alive = lambda: all(p.poll() is None for p in processes) and time.monotonic() - began < 300  # noqa: E731
        early, lines, delay = rng.random() < 0.25, rng.randrange(16), rng.random() / 2
        if early:
            delay *= 16
        else:
            while alive() and last_line(workdir) == before:
                time.sleep(0.005)
            lines += steps(workdir)
            while alive() and steps(workdir) < lines:
                time.sleep(0.005)
        until = time.monotonic() + delay
        while alive() and time.monotonic() < until:
            time.sleep(0.005)
        if all(p.poll() == 0 for p in processes):
            raise AssertionError(f"the run ended after {len(rows)} kills: give it more steps")
        victims = rng.choice(([0], [1], [0, 1]))
        for i in victims:
            if processes[i].poll() is None:
                os.kill(processes[i].pid, signal.SIGKILL)
        seconds = time.monotonic() - began
        found = finish(processes, 4)  # how long the other takes to leave is measured elsewhere
        rows.append((round(seconds, 2), steps(workdir), [code for code, *_ in found]))
        tell(f"kill {len(rows)} of processes {victims} after {seconds:.1f} s: {rows[-1][1]} lines logged")
    return rows, finish(start(text, workdir, **options), 600)


def last_line(workdir):
    """The last whole line of metrics."""
    file = workdir / "metrics.jsonl"
    return file.read_text().rpartition("\n")[0].rpartition("\n")[2] if file.exists() else ""


def events(workdir):
    return [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]


def digests(workdir, step):
    file = workdir / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"
    return json.loads(file.read_text())["custom_metadata"]["digests"]
