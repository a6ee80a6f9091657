"""What is watched beside the loss: experts that go hungry, and choices that oscillate."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moejax import config
from moejax.errors import DamagedError
from moejax.moe import diagnostics
from moejax.train.metrics import Numbers
from moejax.train.progress import Reporter
from moejax.train.workdir import Workdir

State = dict[str, dict[str, np.ndarray]]
"""The routing state on the host."""
Probe = dict[str, np.ndarray]
PROBES = "routing/probe_*.npz"


class Alarm:
    """Says when experts go hungry, once for each set of them."""

    def __init__(self, moe: config.MoE, files: Workdir, reporter: Reporter):
        self._moe, self._files, self._reporter = moe, files, reporter
        self._said: list[str] = []

    def sound(self, routing: State, step: int) -> Numbers:
        """Lines to events.jsonl and the console where they are new; the number of hungry experts."""
        lines = alarms(routing, step, self._moe)
        for line in lines:
            if line not in self._said:
                self._files.event("collapse", step=step, alarm=line)
                self._reporter.say(line)
        self._said = lines
        return {"moe/starved": starved(routing, step, self._moe)} if routing else {}


def alarms(routing: State, step: int, moe: config.MoE) -> list[str]:
    """One line for each layer with experts that were not fed for `alarm_after` steps: which, and since when."""
    return [
        f"collapse: {kind} layer {layer} below {moe.alarm_share:g} of a fair load: "
        + ", ".join(f"expert {expert} since step {since}" for expert, since in experts.items())
        for kind, state in routing.items()
        for layer, experts in diagnostics.starved(np.asarray(state["last_fed"]), step, moe.alarm_after)
    ]


def starved(routing: State, step: int, moe: config.MoE) -> int:
    """Experts that were not fed for `alarm_after` steps, in all layers."""
    return sum(int((step - np.asarray(state["last_fed"]) >= moe.alarm_after).sum()) for state in routing.values())


def churn(folder: Path, step: int, probe: Probe) -> Numbers:
    """Against the probe of the evaluation before: share of tokens whose experts changed, mean and worst layer. Nothing at the
    first evaluation."""
    before = [file for file in sorted(folder.glob(PROBES)) if step_of(file) < step]
    if not before or not probe:
        return {}
    with np.load(before[-1]) as old:
        changed = diagnostics.churn(old["experts"], probe["experts"], probe["valid"])
    return {"eval/churn": float(changed.mean()), "eval/churn_worst": float(changed.max())}


def agreement(reference: str, probe: Probe) -> Numbers:
    """Share of the reference router's choices that this one makes on the same tokens, mean and worst layer.

    Raises DamagedError where the reference is not a probe of the same held-out batch.
    """
    if not reference:
        return {}
    try:
        with open(Path(reference).expanduser(), "rb") as opened, np.load(opened) as known:
            experts, valid = known["experts"], known["valid"]
    except Exception as error:  # zipfile, zlib and NumPy each have their own
        raise DamagedError(f"train.reference={reference} cannot be read as a probe ({error})") from error
    if not probe or experts.shape[:2] != probe["experts"].shape[:2] or not np.array_equal(valid, probe["valid"]):
        raise DamagedError(
            f"train.reference={reference} is of {experts.shape[0]} layers and {len(valid)} other tokens; give a probe of a run on "
            f"the same data, context, batch and depth"
        )
    same = diagnostics.agreement(experts, probe["experts"], valid)
    return {"eval/agreement": float(same.mean()), "eval/agreement_worst": float(same.min())}


def saturation(folder: Path) -> list[tuple[int, np.ndarray]]:
    """(step, agreement of every layer with the last probe's choices) of all probes of a workdir (Muennighoff et al. 2024, OLMoE,
    section 5)."""
    files = sorted(folder.glob(PROBES))
    if not files:
        return []
    with np.load(files[-1]) as last:
        experts, valid = last["experts"], last["valid"]
    found = []
    for file in files:
        with np.load(file) as probe:
            found.append((step_of(file), diagnostics.agreement(experts, probe["experts"], valid)))
    return found


def step_of(file: Path) -> int:
    """routing/probe_00000200.npz -> 200."""
    return int(file.stem.rpartition("_")[2])
