"""Planted experts are found: four sources, four experts, and a loss that comes to the known entropy."""

import json

import numpy as np
import pytest
from train import small

from moejax.report import health, runs, table

SEEDS = ("train.seed", "data.planted_seed")


def trained(workdir, cache, *options, quick=True):
    """Trains configs/planted.py as a user does and loads what is left. `quick` compiles faster, and runs slower."""
    flags = (f"--config={small.ROOT / 'configs/planted.py'}", f"--workdir={workdir}", f"--config.data.cache={cache}")
    code, _, err = small.finish(small.start("train", *flags, *options, quick=quick), 900)
    assert (code, err) == (0, "")
    return runs.load(workdir)


@pytest.mark.slow
def test_the_floor_reaches_the_table(tmp_path):
    """A few steps on a little text: run.json has the floor of the prepared text, and no loss lies below it."""
    run = trained(
        tmp_path / "run", tmp_path, "--config.data.planted_documents=400", "--config.train.steps=4",
        "--config.train.warmup=1", "--config.model.width=8",
    )  # fmt: skip
    (index,) = (json.loads(file.read_text()) for file in tmp_path.glob("planted-*/index.json"))
    numbers = table.numbers([run])["runs"][0]
    assert numbers["floor"] == run.facts["heldout_floor"] == index["splits"]["heldout"]["ideal_bits_per_byte"]
    assert numbers["above_floor"] == numbers["heldout/bits_per_byte"] - numbers["floor"] > 1


@pytest.mark.soak
@pytest.mark.parametrize("seed", [5, 6])
def test_planted_experts_are_found(tmp_path, seed):
    """Within 0.02 bits of the floor, and the report names another expert for each source."""
    run = trained(tmp_path / "run", tmp_path, *(f"--config.{key}={seed}" for key in SEEDS), quick=False)
    assert -0.002 < table.numbers([run])["runs"][0]["above_floor"] < 0.02
    labels = run.routing["sparse"]["labels"][0]
    assert sorted(labels.argmax(axis=1)) == [0, 1, 2, 3]
    assert (labels.max(axis=1) > 0.5 * labels.sum(axis=1)).all()
    assert np.trace(labels[:, labels.argmax(axis=1)]) > 0.8 * labels.sum()
    (note,) = health.notes(run)
    assert all(f"source {s} to expert {labels[s].argmax()}" in note for s in range(4))
