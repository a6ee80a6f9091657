"""Do the experts of a checkpoint specialise? By label, token class and position, with intervals, a shuffled control and a verdict.

    python scripts/specialisation.py --workdir=runs/tiny_sparse                                  the run's own held-out rows
    python scripts/specialisation.py --workdir=runs/tiny_sparse --source=languages               six languages, the label a language
    python scripts/specialisation.py --workdir=runs/tiny_sparse --earlier=600 --ablate=both --out=runs/experts.html

Files may be text, labelled by their suffix, or lines like {"text": "Once upon", "label": "story"}. docs/specialisation.md says what
is measured and when it is claimed.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from moejax import cli, config, memory
from moejax import mesh as meshes
from moejax.data import prepare, source
from moejax.errors import UserError
from moejax.study import told, whole
from moejax.study.reading import DocumentRows, require_choices
from moejax.train import saved

WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run")
STEP = flags.DEFINE_integer("step", None, "step of the checkpoint; the last one by default", 0)
EARLIER = flags.DEFINE_integer("earlier", None, "step of an earlier checkpoint: which choices were made already", 0)
FILES = flags.DEFINE_string("files", None, "glob of text or .jsonl files to read in place of the run's held-out text")
SOURCE = flags.DEFINE_enum("source", None, ["languages", "planted", "python"], "all of a source, in its place")
ROWS = flags.DEFINE_integer("rows", 256, "rows of text to read, evenly spaced; 0 for all", 0)
BATCH = flags.DEFINE_integer("batch", None, "rows at a time; as in training by default", 1)
ABLATE = flags.DEFINE_enum(
    "ablate",
    None,
    [*whole.REMOVALS, "both"],
    "the loss of each label without each expert: chosen by nobody, or with an output of zero; a pass over the rows for each",
)
DRAWS = flags.DEFINE_integer("draws", 999, "shuffles of the control, and draws of documents for intervals", 99)
JSON = flags.DEFINE_bool("json", False, "print the numbers as JSON and nothing else")
OUT = flags.DEFINE_string("out", None, "also write a page: FILE.html")
PICTURE = flags.DEFINE_string("picture", None, "also draw the overview: FILE.png")


def main() -> None:
    if WORKDIR.value is None:
        raise UserError("--workdir is missing; for example --workdir=runs/tiny_sparse")
    if FILES.value is not None and SOURCE.value is not None:
        raise UserError(f"--files={FILES.value!r} with --source={SOURCE.value}: one text at a time; leave one out")
    workdir = Path(WORKDIR.value).expanduser()
    cfg = saved.read_config(workdir)
    require_choices(cfg.model)
    if BATCH.value is not None:
        cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch=BATCH.value))
    drawing = drawing_modules() if OUT.value is not None or PICTURE.value is not None else None
    memory.keep_freed()
    with tempfile.TemporaryDirectory() as scratch:
        found = studied(workdir, cfg, Path(scratch))
    if drawing is not None:
        page, pictures = drawing
        if OUT.value is not None:
            page.write(found, Path(OUT.value).expanduser())
        if PICTURE.value is not None:
            page.put(Path(PICTURE.value).expanduser(), pictures.overview(found), "--picture")
    print(json.dumps(found) if JSON.value else "\n".join(told.lines(found)))


def drawing_modules() -> tuple[Any, Any]:
    """What draws, which needs an optional package: asked for before the work, not after it."""
    from moejax.study import page, pictures

    return page, pictures


def studied(workdir: Path, cfg: config.Config, scratch: Path) -> dict[str, Any]:
    """The study, and what it is of."""
    rows, text = rows_of(cfg, scratch)
    model = saved.model(workdir, cfg, STEP.value)
    if EARLIER.value is not None and EARLIER.value >= model.step:
        raise UserError(f"--earlier={EARLIER.value} is not before step {model.step}; give a smaller one")
    before = None if EARLIER.value is None else saved.model(workdir, cfg, EARLIER.value).state
    ablate = tuple(whole.REMOVALS) if ABLATE.value == "both" else (ABLATE.value,) if ABLATE.value else ()
    label = "language" if (SOURCE.value or (FILES.value is None and cfg.data.source)) == "languages" else "label"
    options = whole.Options(ROWS.value or None, before, ablate, label, DRAWS.value)
    found = {"workdir": str(workdir), "step": model.step, "earlier": EARLIER.value, "text": text}
    found["devices"] = meshes.describe(model.built.mesh)
    return found | whole.study(model, rows, saved.tokens(cfg), options)


def rows_of(cfg: config.Config, scratch: Path) -> tuple[DocumentRows, str]:
    """The rows to read and what they are: the run's held-out text, or all of another source or of files."""
    if FILES.value is None and SOURCE.value in (None, cfg.data.source):
        return DocumentRows(prepare.ensure(cfg.data), "heldout", cfg.data.context), "held-out text"
    if FILES.value is not None:
        documents, text = source.file_documents(FILES.value), FILES.value
    else:
        documents, text = prepare.MAKERS[SOURCE.value].documents(cfg.data), SOURCE.value
    folder = prepare.whole(documents, scratch / "text", saved.tokens(cfg))
    return DocumentRows(folder, "heldout", cfg.data.context), text


if __name__ == "__main__":
    cli.run(main)
