"""The notebooks as a reader has them: as they are kept, run from a clean kernel, and stopped where moejax cannot run."""

import base64
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys

import matplotlib.image
import nbformat
import pages
import pytest
from nbclient.exceptions import CellExecutionError

NOTEBOOKS = sorted((pages.ROOT / "notebooks").glob("*.ipynb"))
RUN = pages.ROOT / "notebooks/run.py"
LARGEST = 400_000
"""Bytes of a file: what a page that shows notebooks still draws."""

each = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


def read(file):
    return json.loads(file.read_text())


def code(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def outputs(notebook):
    return [output for cell in code(notebook) for output in cell["outputs"]]


def said(output):
    """The text of an output, of whatever kind."""
    return "".join(output.get("text", ())) + "".join(output.get("data", {}).get("text/plain", ()))


def shape(notebook):
    """Of every code cell the kinds of its outputs."""
    return [
        (
            cell["execution_count"],
            [(o["output_type"], o.get("name"), sorted(o.get("data", ()))) for o in cell["outputs"]],
        )
        for cell in code(notebook)
    ]


def pictures(notebook):
    encoded = [o["data"]["image/png"] for o in outputs(notebook) if "image/png" in o.get("data", {})]
    return [matplotlib.image.imread(io.BytesIO(base64.b64decode("".join(png)))) for png in encoded]


def sound(notebook):
    """Every cell ran once, in order; nothing was said that a reader would stumble over; pictures have something in them."""
    assert [cell["execution_count"] for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    for output in outputs(notebook):
        assert output["output_type"] != "error" and output.get("name") != "stderr", output
        assert not re.search("warning|deprecated", said(output), re.IGNORECASE), output
    drawn = pictures(notebook)
    assert len(drawn) >= 2 and all(picture.std() > 0.01 for picture in drawn)


def test_there_are_three():
    assert len(NOTEBOOKS) == 3


@each
def test_what_is_kept(file):
    """A notebook can be read without running it, and names nothing of the machine that ran it."""
    notebook = read(file)
    sound(notebook)
    assert file.stat().st_size < LARGEST
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert [cell["id"] for cell in notebook["cells"]] == [f"cell-{i:02}" for i in range(1, len(notebook["cells"]) + 1)]
    assert not any(cell["metadata"] for cell in notebook["cells"])
    text = "\n".join([*map(source, notebook["cells"]), *map(said, outputs(notebook))])
    assert not re.search(r"(^|[\s\"'(=])(/(home|root|tmp|work|usr|content|Users)/|[A-Z]:\\)", text)


def test_the_first_cell_is_the_same():
    assert len({source(code(read(file))[0]) for file in NOTEBOOKS}) == 1


@pytest.mark.slow
@each
def test_runs_from_a_clean_kernel(file, tmp_path):
    """What notebooks/run.py makes of the file is what is kept, kind by kind: no error, no warning, every output and picture."""
    copy = shutil.copy(file, tmp_path)
    settings = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PYTHONWARNINGS")}
    settings |= {
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JAX_COMPILATION_CACHE_DIR": os.environ["MOEJAX_TEST_PROGRAMS"],
    }
    done = subprocess.run(
        [sys.executable, RUN, copy], cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    fresh = read(tmp_path / file.name)
    sound(fresh)
    assert shape(fresh) == shape(read(file))


# ---- the first cell -----------------------------------------------------------------------------------------------


def first():
    """What the first cell defines: where moejax is there, running it installs nothing."""
    names = {}
    exec(source(code(read(NOTEBOOKS[0]))[0]), names)
    return names


def test_the_first_cell_leaves_what_is_there(monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was installed"))
    first()
    assert capsys.readouterr().out.startswith("moejax ")


@pytest.mark.parametrize("jax", ["", "0.10.2", "0.10.10", "0.11.0.dev20260101", "0.12.0.1", "1.0.0"])
def test_new_enough(jax):
    first()["require"]((3, 11, 0), jax)


@pytest.mark.parametrize(
    ("python", "jax", "says"),
    [
        ((3, 10, 12), "0.10.2", "this is Python 3.10.12, and moejax needs 3.11 or newer"),
        ((3, 12, 3), "0.10.1", "this is jax 0.10.1, and moejax needs 0.10.2 or newer"),
        ((3, 12, 3), "0.9.2", "this is jax 0.9.2, and moejax needs 0.10.2 or newer"),
    ],
)
def test_too_old(python, jax, says):
    names = first()
    with pytest.raises(names["Stop"], match=re.escape(says)) as stopped:
        names["require"](python, jax)
    assert len("".join(stopped.value._render_traceback_()).splitlines()) == 1


def test_installing_leaves_jax_alone(monkeypatch, tmp_path):
    """On a machine without moejax: the repository is cloned, and pip may not choose another jax."""
    cell, commands = source(code(read(NOTEBOOKS[0]))[0]), []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = {}
    with pytest.raises(Exception, match="moejax is not installed; set REPOSITORY"):
        exec(cell, names)

    def remember(words, **_):
        commands.append(words)
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(subprocess, "run", remember)
    exec(cell.replace('REPOSITORY = ""', 'REPOSITORY = "address"', 1), names)
    assert commands[0][:2] == ("git", "clone") and "address" in commands[0]
    assert "pip" in commands[1] and "--constraint=pins.txt" in commands[1] and "--upgrade" not in commands[1]
    pins = (tmp_path / "pins.txt").read_text().splitlines()
    assert pins == [f"{name}=={importlib.metadata.version(name)}" for name in ("jax", "jaxlib")]


def test_a_command_that_fails_stops_in_one_line():
    names = first()
    with pytest.raises(names["Stop"], match="failed: .*no such") as stopped:
        names["command"](sys.executable, "-c", "import sys; sys.exit('no such address')")
    assert "\n" not in str(stopped.value)


@pytest.mark.slow
def test_a_kernel_with_an_old_jax_stops_in_one_line(tmp_path):
    """As IPython shows it: one line in place of a traceback, and no further cell."""
    run = pages.load(RUN, "run_notebooks")
    old = "import importlib.metadata\nimportlib.metadata.version = lambda package: '0.9.2'"
    cells = [nbformat.v4.new_code_cell(text) for text in (old, source(code(read(NOTEBOOKS[0]))[0]), "print('went on')")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    with pytest.raises(CellExecutionError):
        run.client(notebook, tmp_path).execute()
    (shown,) = notebook.cells[1].outputs
    assert shown.output_type == "error" and len(shown.traceback) == 1
    assert shown.traceback[0].startswith("Stopped: this is jax 0.9.2, and moejax needs 0.10.2 or newer")
    assert notebook.cells[2].outputs == []
