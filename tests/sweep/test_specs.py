"""What schedulers are given is what is kept, and its scripts do what they say, where a cluster's commands only write down their calls."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pages
import pytest
import yaml
from sweep import specs

from moejax.errors import ConfigError, UserError
from moejax.sweep import engines

every_case = pytest.mark.parametrize("case", specs.CASES)
SCRIPTS = [file for case in specs.CASES for file in (specs.FOLDER / case).glob("*.sh")]
STUB = f"""#!{sys.executable}
import json, os, signal, sys, time
name = os.path.basename(sys.argv[0])
with open(os.environ["STUBS"] + "/calls.jsonl", "a") as out:
    out.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
if name == "scontrol" and sys.argv[1] == "show":
    print("alpha", "beta", sep="\\n")
if name == "srun":  # as SLURM does, leaves its tasks to scancel, and gives them numbers
    rest = [word for word in sys.argv[1:] if not word.startswith("--cpus") and not word.startswith("--kill")]
    os.environ["SLURM_PROCID"] = "1"
    with open(os.environ["STUBS"] + "/pid", "w") as out:
        out.write(str(os.getpid()))
    os.execvp(rest[0], rest)
if name == "scancel":
    os.kill(int(open(os.environ["STUBS"] + "/pid").read()), signal.SIGTERM)
if name.startswith("python"):
    signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), os._exit(75)))
    open(os.environ["STUBS"] + "/running", "w").close()
    time.sleep(float(os.environ.get("SECONDS_TO_RUN", 0)))
    sys.exit(int(os.environ.get("CODE", 0)))
"""
"""Every command: writes down how it was called, and plays its part."""


@pytest.fixture
def cluster(tmp_path):
    """A folder of commands, and the environment in which they are found first."""
    for name in ("srun", "scontrol", "scancel", "sky", "python", "module"):
        (tmp_path / name).write_text(STUB)
        (tmp_path / name).chmod(0o755)
    return os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STUBS": str(tmp_path)}


def calls(cluster, name):
    """How a command was called, without its name."""
    file = Path(cluster["STUBS"], "calls.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line[1:] for line in lines if line[0] == name]


def bash(text, environment):
    return subprocess.run(["bash", "-c", text], env=environment, capture_output=True, text=True, timeout=30)


# ---- files --------------------------------------------------------------------------------------------------------


@every_case
def test_files_are_those_that_are_kept(case):
    """Byte by byte. A change that is meant is written with `python tests/sweep/specs.py`."""
    kept = {file.name: file.read_text() for file in (specs.FOLDER / case).iterdir()}
    assert specs.files(case) == kept


def test_every_folder_has_a_case():
    assert {folder.name for folder in specs.FOLDER.iterdir()} == set(specs.CASES)


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_scripts_are_bash(file):
    """By bash itself, and by shellcheck where it is installed."""
    checks = [["bash", "-n"]]
    checks += [["shellcheck", "--severity=warning"]] if shutil.which("shellcheck") else []
    for check in checks:
        done = subprocess.run([*check, file], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_writing(tmp_path):
    """The files and the command that takes the first; a second time writes the same."""
    settings = ["bucket=gs://results"]
    for _ in range(2):
        paths, submit = engines.write(specs.plan(), "skypilot", settings, {}, tmp_path / "my specs")
        assert sorted(paths) == sorted((tmp_path / "my specs").iterdir())
    assert submit == f"bash '{tmp_path}/my specs/small-sweep.sh'"


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--engine=slurm --set=time=01:00:00 --set=nodes=2 --at_once=3 --env=A=1 --out={out}", None),
        ("--engine=slurm --set=time=01:00:00", "--engine=slurm takes --out"),
        ("--engine=slurm --set=time=01:00:00 --out={out} --retry", "neither --retry nor --picture"),
        ("--engine=jobset --at_once=3 --out={out}", "at_once=3 is no option of JobSet"),
        ("--set=time=01:00:00", "--out and --set go with --engine=slurm, skypilot or jobset"),
        ("--workdir=gs://results/x", "mount the bucket and give its path"),
    ],
)
def test_the_command(tmp_path, capsys, monkeypatch, arguments, message):
    """Writes what the scheduler needs and says what to type; of the sweep's own folder it touches nothing."""
    monkeypatch.chdir(pages.ROOT)
    out = tmp_path / "specs"
    line = f"python scripts/sweep.py --config=configs/sweeps/experts.py --workdir={tmp_path}/runs {arguments.format(out=out)}"
    if message:
        with pytest.raises(UserError, match=re.escape(message)):
            pages.call(line)
        assert not list(tmp_path.iterdir())
        return
    pages.call(line)
    text = (out / "experts.sh").read_text()
    assert capsys.readouterr().out.endswith(f"  sbatch {out}/experts.sh\n") and list(tmp_path.iterdir()) == [out]
    assert "%3\n" in text and "--nodes=2\n" in text and "export A=1\n" in text and f"root={tmp_path}/runs\n" in text


# ---- SLURM --------------------------------------------------------------------------------------------------------


@pytest.fixture
def task(cluster, tmp_path):
    """Starts one task of the array as SLURM does."""

    def start(case, number, **environment):
        text = specs.files(case, python="python", folder=None, setup=None)["small-sweep.sh"]
        text = text.replace("'/runs/small sweep'", f"'{tmp_path}/small sweep'")
        slurm = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_JOB_ID": "2007", "SLURM_JOB_NODELIST": "n[1-2]"}
        return subprocess.Popen(["bash", "-c", text], env=cluster | slurm | environment, stdout=subprocess.DEVNULL)

    return start


def arguments(number, root):
    plan = specs.plan()
    return [
        argument.replace("/runs/small sweep", f"{root}/small sweep")
        for argument in plan.arguments(plan.members[number])
    ]


@pytest.mark.parametrize("number", range(len(specs.GRID)))
def test_slurm_gives_every_run_its_arguments(task, cluster, tmp_path, number):
    """To the character, whatever is in them."""
    assert task("slurm_1", number).wait(30) == 0
    assert calls(cluster, "python") == [["scripts/train.py", *arguments(number, tmp_path)]]
    assert (tmp_path / "small sweep" / specs.plan().members[number].folder / "output.txt").exists()
    assert not calls(cluster, "scontrol")


def test_slurm_on_two_hosts(task, cluster, tmp_path):
    """The first host and a port by the job's number; every task its own."""
    assert task("slurm_2", 1).wait(30) == 0
    hosts = ["--coordinator=alpha:8483", "--processes=2", "--process=1"]
    assert calls(cluster, "python") == [["scripts/train.py", *arguments(1, tmp_path), *hosts]]


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (3, False), (75, True)])
def test_slurm_ends_as_the_run_does(task, cluster, code, requeued):
    assert task("slurm_1", 1, CODE=str(code)).wait(30) == code
    assert calls(cluster, "scontrol") == ([["requeue", "2007"]] if requeued else [])


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_slurm_asks_a_run_to_save(task, cluster, tmp_path, number, requeued):
    """Before the time limit, and comes back; before a cancellation, and does not."""
    process = task("slurm_1", 0, SECONDS_TO_RUN="30")
    until = time.monotonic() + 20
    while not (tmp_path / "running").exists() and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(number)
    process.send_signal(number)
    assert process.wait(20) == 75
    assert ["--signal=TERM", "2007"] in calls(cluster, "scancel")
    assert calls(cluster, "scontrol") == ([["requeue", "2007"]] if requeued else [])


def test_slurm_has_no_other_task(task):
    assert task("slurm_1", 3).wait(30) == 2


# ---- SkyPilot -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "hosts"), [("skypilot_1", 1), ("skypilot_2", 2)])
def test_skypilot_gives_every_run_its_arguments(cluster, case, hosts):
    plan = specs.plan()
    texts = list(specs.files(case, python="python").values())[1:]
    nodes = {"SKYPILOT_NUM_NODES": str(hosts), "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"}
    several = ["--coordinator=10.0.0.1:8476", "--processes=2", "--process=1"] if hosts > 1 else []
    for text in texts:
        done = bash(yaml.safe_load(text)["run"], cluster | nodes | {"CODE": "3"})
        assert done.returncode == 3, done.stderr
    assert calls(cluster, "python") == [["scripts/train.py", *plan.arguments(m), *several] for m in plan.members]


def test_skypilot_counts_its_hosts(cluster):
    """A slice may have more than was thought: refused before they write over each other."""
    run = yaml.safe_load(list(specs.files("skypilot_1", python="python").values())[1])["run"]
    done = bash(run, cluster | {"SKYPILOT_NUM_NODES": "4"})
    assert done.returncode == 2 and "4 hosts where --set=nodes=1 was meant" in done.stderr
    assert not calls(cluster, "python")


def test_skypilot_launches_every_run(cluster):
    done = subprocess.run(["bash", specs.FOLDER / "skypilot_1/small-sweep.sh"], env=cluster, capture_output=True)
    assert done.returncode == 0
    names = sorted(file.name for file in (specs.FOLDER / "skypilot_1").glob("*.yaml"))
    assert sorted(os.path.basename(call[-1]) for call in calls(cluster, "sky")) == names
    assert all(call[:2] == ["jobs", "launch"] and os.path.exists(call[-1]) for call in calls(cluster, "sky"))


# ---- JobSet -------------------------------------------------------------------------------------------------------


def expanded(text, environment):
    """$(NAME) as Kubernetes puts it: $$ is one $, unknown names stay."""
    return re.sub(r"\$\$|\$\((\w+)\)", lambda m: "$" if m[0] == "$$" else environment.get(m[1], m[0]), text)


@pytest.mark.parametrize(("case", "hosts"), [("jobset_1", 1), ("jobset_2", 2)])
def test_jobset_gives_every_run_its_arguments(cluster, case, hosts):
    plan = specs.plan()
    for document, member in zip(yaml.safe_load_all(specs.files(case).popitem()[1]), plan.members, strict=True):
        (container,) = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
        set_here = {pair["name"]: expanded(pair["value"], {}) for pair in container["env"]}
        assert set_here["XLA_FLAGS"] == specs.ENV["XLA_FLAGS"]
        command = [expanded(word, {"JOB_COMPLETION_INDEX": "1"}) for word in container["command"] + container["args"]]
        assert subprocess.run(command, env=cluster | set_here).returncode == 0
        name = document["metadata"]["name"]
        several = [f"--coordinator={name}-run-0-0.{name}:8476", "--processes=2", "--process=1"] if hosts > 1 else []
        assert calls(cluster, "python")[-1] == ["scripts/train.py", *plan.arguments(member), *several]


# ---- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "other", "message"),
    [
        ("slurm_1", {"partitoin": "x"}, "--set=partitoin=x is no option of Slurm; did you mean partition?"),
        ("slurm_1", {"bucket": "gs://x"}, "is no option of Slurm"),
        ("slurm_1", {"time": None}, "--set=time=… is missing"),
        ("slurm_1", {"time": "04:00"}, "--set=time=04:00: HH:MM:SS"),
        ("slurm_1", {"nodes": "two"}, "--set=nodes=two: a whole number"),
        ("slurm_1", {"nodes": "0"}, "--set=nodes=0: at least 1"),
        ("slurm_1", {"at_once": "-1"}, "--set=at_once=-1: at least 0"),
        ("slurm_1", {"port": "80"}, "--set=port=80: from 1024 to 64000"),
        ("slurm_1", {"partition": "a b"}, "takes no spaces"),
        ("slurm_1", {"setup": "a\nb"}, "one line"),
        ("slurm_1", {"name": "Two words"}, "'Two words' cannot be the name of a job"),
        ("skypilot_1", {"spot": "yes"}, "--set=spot=yes: true or false"),
        ("skypilot_1", {"bucket": None}, "neither given"),
        ("skypilot_1", {"volume": "x"}, "both given"),
        ("skypilot_1", {"bucket": "results"}, "such as gs://results"),
        ("skypilot_1", {"nodes": "2"}, "give --set=volume="),
        ("skypilot_1", {"mount": "/other"}, "--workdir=/runs/small sweep is not in /other"),
        ("jobset_1", {"mount": "runs"}, "a path from /"),
        ("jobset_1", {"image": None}, "--set=image=… is missing"),
        ("jobset_1", {"queue": ""}, "--set=queue= is empty"),
        ("jobset_1", {"tpu": "tpu-v5p-slice", "topology": "2x2x1"}, "a run has one kind"),
        ("jobset_1", {"gpus": None}, "give --set=gpus=8"),
        ("jobset_1", {"name": "a" * 50}, "names of 73 characters, and Kubernetes takes 63: 10 fewer"),
        ("jobset_2", {"topology": None}, "give both, or neither"),
        ("jobset_2", {"topology": "2x2x0"}, "4x4 or 2x2x2"),
        ("jobset_2", {"nodes": "1"}, "2x2x2 has 8 chips, nodes=1 with chips=4 have 4"),
    ],
)  # fmt: skip
def test_what_cannot_be_submitted(case, other, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        specs.files(case, **other)


def test_settings_are_pairs_and_come_once():
    read, kind = engines.spec.read, engines.ENGINES["slurm"].options
    for settings, env, message in (
        (["time"], {}, "write --set=KEY=VALUE with KEY of"),
        (["time=01:00:00", "time=02:00:00"], {}, "--set=time is given twice"),
        (["time=01:00:00"], {"A": "{slot}"}, "only --engine=local has slots"),
        (["time=01:00:00"], {"A-B": "1"}, "letters, digits and _"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            read(kind, settings, env)
