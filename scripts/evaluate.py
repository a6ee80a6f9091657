"""Judges a checkpoint of any run: the loss on held-out text, or questions whose answers are given.

    python scripts/evaluate.py --workdir=runs/tiny_sparse                              the run's own held-out rows
    python scripts/evaluate.py --workdir=runs/tiny_sparse --step=400 --files='*.md'    all of these files, at an earlier step
    python scripts/evaluate.py --workdir=runs/tiny_sparse --choices=questions.jsonl    accuracy; text too where --files is given

Only parameters and routing state are read, onto the run's mesh or, where there are fewer devices, onto one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import jax
from absl import flags

from moejax import cli, config, memory
from moejax import mesh as meshes
from moejax.data import batches, prepare, source
from moejax.data.pipeline import Rows
from moejax.errors import UserError
from moejax.train import choices, saved
from moejax.train.evaluate import Evaluator
from moejax.train.scoring import Scorer

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
STEP = flags.DEFINE_integer("step", None, "step of the checkpoint; the last one by default", 0)
ROWS = flags.DEFINE_integer("rows", None, "rows of text to read, evenly spaced; all by default", 1)
BATCH = flags.DEFINE_integer("batch", None, "rows at a time; as in training by default", 1)
FILES = flags.DEFINE_string("files", None, "glob of text or .jsonl files to read in place of the run's held-out text")
CHOICES = flags.DEFINE_string("choices", None, f"file of questions, a line each: {choices.EXAMPLE}")
JSON = flags.DEFINE_bool("json", False, "print the numbers as JSON and nothing else")


def main() -> None:
    if WORKDIR.value is None:
        raise UserError("--workdir is missing; for example --workdir=runs/tiny_sparse")
    text = CHOICES.value is None or FILES.value is not None
    if ROWS.value is not None and not text:
        raise UserError(
            f"--rows={ROWS.value} does nothing with --choices alone; it is for text: give --files too, or leave it out"
        )
    workdir = Path(WORKDIR.value).expanduser()
    cfg = saved.read_config(workdir)
    if BATCH.value is not None:
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch=BATCH.value))
    questions = [] if CHOICES.value is None else choices.read(Path(CHOICES.value).expanduser())
    memory.keep_freed()
    with tempfile.TemporaryDirectory() as scratch:
        rows = rows_of(cfg, Path(scratch)) if text else None
        model = saved.model(workdir, cfg, STEP.value)
        found = {"workdir": str(workdir), "step": model.step, "devices": meshes.describe(model.built.mesh)}
        if rows is not None:
            found["text"] = judge_text(model, rows)
        if questions:
            found["choices"] = judge_choices(model, questions)
    print(json.dumps(found) if JSON.value else said(found))


def rows_of(cfg: config.Config, scratch: Path) -> Rows:
    """The run's held-out rows, or those of --files, tokenised into a folder that is left behind for nobody."""
    if FILES.value is None:
        return Rows(prepare.ensure(cfg.data), "heldout", cfg.data.context)
    documents = source.file_documents(FILES.value)
    return Rows(prepare.whole(documents, scratch / "text", saved.tokens(cfg)), "heldout", cfg.data.context)


def judge_text(model: saved.Model, rows: Rows) -> dict[str, Any]:
    """The numbers of an evaluation, named as in the run's metrics, with the perplexity and how many rows were read."""
    built = model.built
    prefix = "heldout" if FILES.value is None else "files"
    with jax.set_mesh(built.mesh):
        numbers, _ = Evaluator(built, model.state, rows).run(model.state, ROWS.value, prefix)
    read = len(rows) if ROWS.value is None else min(ROWS.value, len(rows))
    padded = batches.padded_rows(built.config, built.mesh, built.config.data.batch)
    perplexity = {f"{prefix}/perplexity": math.exp(numbers[f"{prefix}/loss"])}
    return numbers | perplexity | {f"{prefix}/rows": read, f"{prefix}/padding_rows": -read % padded}


def judge_choices(model: saved.Model, questions: list[choices.Question]) -> dict[str, Any]:
    """Accuracies, and how many rows were computed to fill batches."""
    asked = choices.requests(questions, saved.tokens(model.built.config))
    scores = Scorer(model.built, model.state)(asked)
    return choices.accuracy(questions, scores.nats) | {"padding_rows": scores.padding_rows}


def said(found: dict[str, Any]) -> str:
    """What was found, for people."""
    lines = [f"{found['workdir']}, step {found['step']}, on {found['devices']}"]
    if "text" in found:
        prefix = "heldout" if "heldout/loss" in found["text"] else "files"
        text = {name.removeprefix(f"{prefix}/"): value for name, value in found["text"].items()}
        lines += [
            f"loss {text['loss']:.4f} nats a token, perplexity {text['perplexity']:.2f}, {text['bits_per_byte']:.4f} bits per byte",
            f"{text['rows']:,} rows, {text['targets']:,} tokens, {text.get('bytes', text['targets']):,} bytes",
        ]
        labels = {name.partition("/")[2]: value for name, value in text.items() if name.startswith("bits_per_byte/")}
        lines += [f"  {name:20} {value:.4f} bits per byte" for name, value in labels.items()]
    if "choices" in found:
        numbers = found["choices"]
        lines.append(
            f"{numbers['questions']:,} questions, {numbers['choices']:,} choices, chance {numbers['chance']:.3f}"
        )
        for name, by in (("accuracy", "by likelihood"), ("accuracy_per_byte", "by likelihood per byte")):
            error = numbers[f"{name}_error"]
            lines.append(f"accuracy {numbers[name]:.3f}{'' if error is None else f' ± {error:.3f}'} {by}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
