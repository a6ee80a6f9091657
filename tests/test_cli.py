"""The commands as a user meets them: what is wrong is one line on stderr that starts with `error:`, and exit code 2 (B31)."""

import concurrent.futures

import pytest
from train import small

pytestmark = pytest.mark.slow

CONFIG = "--config=configs/tiny.py"
WORKDIR = "--workdir={tmp}/w"
QUICK = [CONFIG, "--config.model.unroll=1", "--config.train.steps=2", "--config.train.warmup=0"]


def data(source, files):
    return [f"--config.data.source={source}", f"--config.data.files={files}"]


CASES = {
    "unknown key": ("train", [CONFIG, WORKDIR, "--config.model.moe.num_expert=3"], "num_experts"),
    "ill-typed key": ("train", [CONFIG, WORKDIR, "--config.train.steps=many"], "many"),
    "unknown flag": ("train", [CONFIG, WORKDIR, "--workdri=x"], "workdri"),
    "stray argument": ("train", [CONFIG, WORKDIR, "steps=3"], "'steps=3'"),
    "more choices than experts": (
        "train",
        [*QUICK, "--config.model.moe.num_experts=3", "--config.model.moe.top_k=4", WORKDIR],
        "top_k=4",
    ),
    "a router that is not there": (
        "train",
        [*QUICK, WORKDIR, "--config.model.moe.router=softmax_topk"],
        "topk, switch",
    ),
    "replay of nothing": ("train", [*QUICK, WORKDIR, "--config.train.replay={tmp}"], "train.record_every=1"),
    "no config": ("train", [WORKDIR], "--config is missing"),
    "missing config": ("train", ["--config={tmp}/none.py", WORKDIR], "none.py"),
    "missing data": ("train", [*QUICK, WORKDIR, *data("files", "{tmp}/none*.txt")], "none*.txt"),
    "empty data": (
        "train",
        [*QUICK, WORKDIR, *data("files", "{tmp}/empty.txt"), "--config.data.cache={tmp}/c"],
        "empty.txt",
    ),
    "no prepared data": ("train", [*QUICK, WORKDIR, *data("prepared", "{tmp}")], "prepare.py"),
    "workdir below a file": (
        "train",
        [*QUICK, "--workdir={tmp}/empty.txt/w", *data("prepared", "{folder}")],
        "choose another --workdir",
    ),
    "mesh does not divide": ("train", [*QUICK, WORKDIR, "--config.mesh.expert=3"], "mesh.expert=3"),
    "mesh without devices": (
        "train",
        [*QUICK, WORKDIR, *data("prepared", "{folder}"), "--config.mesh.fsdp=4"],
        "there are 1;",
    ),
    "no bench": ("bench", [], "name one bench"),
    "bench of a wrong config": ("bench", ["layer", CONFIG, "--config.model.moe.top_k=99"], "top_k=99"),
    "prepare without text": ("prepare", ["--out={tmp}/o"], "--files"),
    "prepare of nothing": ("prepare", ["--files={tmp}/none*", "--out={tmp}/o"], "matches no file"),
    "prepare of an empty file": ("prepare", ["--files={tmp}/empty.txt", "--out={tmp}/o"], "holds no text"),
    "prepare over a folder": ("prepare", ["--files={tmp}/broken.py", "--out={folder}"], "exists"),
    "prepare below a file": (
        "prepare",
        ["--files={tmp}/t*.txt", "--out={tmp}/empty.txt/o", "--heldout=0.5"],
        "cannot be written",
    ),
    "surgery on nothing": ("surgery", [CONFIG, WORKDIR, "--operation=grow", "--from={tmp}/none"], "no config.json"),
    "surgery of no kind": ("surgery", [CONFIG, WORKDIR, "--operation=shrink", "--from={tmp}"], "prune, merge"),
    "an option that a surgery does not read": (
        "surgery",
        [CONFIG, WORKDIR, "--operation=grow", "--from={tmp}", "--noise=0.1"],
        "--noise does nothing",
    ),
    "no comparison": ("compare_upcycled", [], "--workdir is missing"),
    "tune on a cpu": ("tune", [], "nothing to tune on 'cpu'"),
    **{
        f"help of {script}": (script, ["--help"], None)
        for script in ("train", "bench", "prepare", "report", "tune", "surgery")
    },
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """(exit code, stdout, stderr) of every case, two processes at a time."""
    tmp = tmp_path_factory.mktemp("cli")
    (tmp / "empty.txt").write_text("")
    (tmp / "broken.py").write_text("def get_config(:\n")
    for i in range(8):
        (tmp / f"t{i}.txt").write_text(f"text number {i} of several that differ\n" * (i + 1))
    folder = small.prepared(tmp / "folder")

    def answer(case):
        script, arguments, _ = case
        return small.finish(small.start(script, *(a.format(tmp=tmp, folder=folder) for a in arguments)))

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield dict(zip(CASES, pool.map(answer, CASES.values()), strict=True))
    assert not (tmp / "w" / "config.json").exists(), "a refused run left a claimed workdir"


@pytest.mark.parametrize("name", CASES)
def test_cli(answers, name):
    """One line, no traceback, exit code 2; --help says an example and exits 0."""
    code, out, err = answers[name]
    words = CASES[name][2]
    if words is None:
        assert code == 0 and "Example: python scripts/" in out, (code, out, err)
        return
    lines = err.strip().splitlines()
    assert code == 2, (code, out, err)
    assert len(lines) == 1 and lines[0].startswith("error:"), err
    assert words in lines[0] and "Traceback" not in out + err
