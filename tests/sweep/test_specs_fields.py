"""Every field that is written, held to a table of what the schedulers' references say. tests/sweep/test_specs_published.py holds the same
files to the schedulers' own schemas, where those are installed."""

import re

import pytest
import yaml
from sweep import specs

TEXT, NAME = re.compile(r".+", re.DOTALL), re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
PATH = re.compile(r"/.*")

SLURM = {
    "job-name": NAME,
    "array": re.compile(r"0-\d+(%[1-9]\d*)?"),
    "nodes": re.compile(r"[1-9]\d*"),
    "ntasks-per-node": re.compile("1"),
    "cpus-per-task": re.compile(r"[1-9]\d*"),
    "gpus-per-node": re.compile(r"(\w+:)?[1-9]\d*"),
    "mem": re.compile(r"\d+[KMGT]?"),
    "time": re.compile(r"(\d+-)?\d+:\d\d:\d\d"),
    "partition": re.compile(r"\w+"),
    "account": re.compile(r"\w+"),
    "signal": re.compile(r"B:USR1@\d+"),
    "output": re.compile(r"%x-%A_%a\.log"),
    "open-mode": {"append", "truncate"},
    "requeue": re.compile(""),
}
"""sbatch(1) of SLURM 22.05: directive -> value."""

SKYPILOT = {
    "name": re.compile(r"[a-zA-Z0-9]+([._-]{1,2}[a-zA-Z0-9]+)*"),
    "workdir": TEXT,
    "num_nodes": int,
    "resources": {
        "infra?": re.compile(r"\w+(/[\w*-]+){0,2}"),
        "accelerators?": re.compile(r"[\w-]+(:[1-9]\d*)?"),
        "cpus?": re.compile(r"\d+\+?"),
        "memory?": re.compile(r"\d+\+?"),
        "image_id?": TEXT,
        "use_spot": bool,
        "job_recovery": {"recover_on_exit_codes": [int]},
    },
    "file_mounts?": {PATH: {"source": re.compile(r"[a-z0-9]+://.+"), "mode": {"MOUNT", "COPY", "MOUNT_CACHED"}}},
    "volumes?": {PATH: TEXT},
    "envs": {re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*"): str},
    "setup": TEXT,
    "run": TEXT,
}
"""A task of SkyPilot 0.14.1: sky/utils/schemas.py, and sky/task.py for its name."""

CODES = {"operator": {"In", "NotIn"}, "values": [int]}
POD = {
    "restartPolicy": {"Never"},  # the only one beside a podFailurePolicy
    "terminationGracePeriodSeconds": int,
    "nodeSelector?": {
        "cloud.google.com/gke-tpu-accelerator?": re.compile(r"tpu-[\w-]+"),
        "cloud.google.com/gke-tpu-topology?": re.compile(r"\d+(x\d+){1,2}"),
        "cloud.google.com/gke-accelerator?": re.compile(r"nvidia-[\w-]+"),
        "cloud.google.com/gke-spot?": {"true"},
    },
    "containers": [
        {
            "name": NAME,
            "image": TEXT,
            "workingDir": PATH,
            "command": [TEXT],
            "args": [TEXT],
            "env": [{"name": re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*"), "value": str}],
            "resources?": {
                "requests?": {"cpu?": re.compile(r"\d+m?"), "memory?": re.compile(r"\d+([KMGT]i?)?")},
                "limits?": {"google.com/tpu?": int, "nvidia.com/gpu?": int},
            },
            "volumeMounts": [{"name": NAME, "mountPath": PATH}],
        }
    ],
    "volumes": [{"name": NAME, "persistentVolumeClaim": {"claimName": NAME}}],
}
JOB = {
    "completionMode": {"Indexed", "NonIndexed"},
    "completions": int,
    "parallelism": int,
    "backoffLimit": int,
    "podFailurePolicy": {
        "rules": [
            {
                "action": {"FailJob", "FailIndex", "Ignore", "Count"},
                "onExitCodes?": CODES,
                "onPodConditions?": [{"type": {"DisruptionTarget"}, "status": {"True"}}],
            }
        ]
    },
    "template": {"spec": POD},
}
JOBSET = {
    "apiVersion": {"jobset.x-k8s.io/v1alpha2"},
    "kind": {"JobSet"},
    "metadata": {
        "name": NAME,
        "labels": {"kueue.x-k8s.io/queue-name": NAME},
        "annotations": {"moejax/run": TEXT, "alpha.jobset.sigs.k8s.io/exclusive-topology?": TEXT},
    },
    "spec": {
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [
                {
                    "name": re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?"),
                    "action": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"},
                    "onJobFailureReasons": [{"BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"}],
                }
            ],
        },
        "network": {"enableDNSHostnames": bool},
        "replicatedJobs": [{"name": NAME, "replicas": int, "template": {"spec": JOB}}],
    },
}
"""JobSet v1alpha2, batch/v1 and core/v1 of Kubernetes 1.31 or newer; labels of GKE and Kueue."""


def wrong(value, table, where=""):
    """Places that the table has not, or where it says otherwise. A key with ? may be missing, one that is a pattern stands for many."""
    if isinstance(table, dict) and isinstance(value, dict):
        known = {key.rstrip("?"): kind for key, kind in table.items() if isinstance(key, str)}
        missing = {key for key in table if isinstance(key, str) and not key.endswith("?")} - value.keys()
        yield from (f"{where}.{key} is missing" for key in sorted(missing))
        for key, inner in value.items():
            of_pattern = [kind for name, kind in table.items() if isinstance(name, re.Pattern) and name.fullmatch(key)]
            kinds = [known[key]] if key in known else of_pattern
            yield from wrong(inner, kinds[0], f"{where}.{key}") if kinds else [f"{where}.{key} is unknown"]
    elif isinstance(table, list) and isinstance(value, list) and value:
        for i, inner in enumerate(value):
            yield from wrong(inner, table[0], f"{where}[{i}]")
    elif not fits(value, table):
        yield f"{where}: {value!r}"


def fits(value, kind):
    if isinstance(kind, re.Pattern):
        return isinstance(value, str) and bool(kind.fullmatch(value))
    return value in kind if isinstance(kind, set) and isinstance(value, str) else type(value) is kind


def directives(text):
    lines = re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE)
    assert len(lines) == text.count("#SBATCH") == len(dict(lines))
    return dict(lines)


@pytest.mark.parametrize("case", specs.CASES)
def test_every_field_is_known(case):
    engine = specs.CASES[case][0]
    for name, text in specs.files(case).items():
        if engine == "slurm":
            assert not list(wrong(directives(text), {f"{key}?": value for key, value in SLURM.items()}))
        elif name.endswith(".yaml"):
            for document in yaml.safe_load_all(text):
                assert not list(wrong(document, {"skypilot": SKYPILOT, "jobset": JOBSET}[engine]))


def test_what_a_table_refuses():
    task = yaml.safe_load(list(specs.files("skypilot_1").values())[1])
    assert list(wrong(task | {"nodes": 1}, SKYPILOT)) == [".nodes is unknown"]
    assert list(wrong(task | {"num_nodes": "1"}, SKYPILOT)) == [".num_nodes: '1'"]
    assert list(wrong(task | {"file_mounts": {"runs": "x"}}, SKYPILOT)) == [".file_mounts.runs is unknown"]
    del task["run"]
    assert list(wrong(task, SKYPILOT)) == [".run is missing"]
    assert list(wrong([{"name": "a", "value": 1}, "b"], POD["containers"][0]["env"])) == ["[0].value: 1", "[1]: 'b'"]
    assert list(wrong([], [int])) == [": []"]


def spec_of(text):
    return [document["spec"] for document in yaml.safe_load_all(text)]


@pytest.mark.parametrize("case", ["jobset_1", "jobset_2"])
def test_rules_of_kubernetes(case):
    """What tables of fields do not say: rules that the API server and the JobSet webhook apply."""
    (text,) = specs.files(case).values()
    names = [document["metadata"]["name"] for document in yaml.safe_load_all(text)]
    assert len(set(names)) == len(names) == len(specs.GRID)
    for spec in spec_of(text):
        (replicated,) = spec["replicatedJobs"]
        job = replicated["template"]["spec"]
        pod = job["template"]["spec"]
        assert job["completions"] == job["parallelism"] == int(specs.CASES[case][1].get("nodes", 1))
        for rule in job["podFailurePolicy"]["rules"]:
            assert len(rule) == 2, "one of onExitCodes and onPodConditions"
            codes = rule.get("onExitCodes", {"values": [1]})["values"]
            assert codes == sorted(set(codes)) and 0 not in codes
        assert [mount["name"] for mount in pod["containers"][0]["volumeMounts"]] == [v["name"] for v in pod["volumes"]]


@pytest.mark.parametrize(("length", "fits"), [(40, True), (41, False)])
def test_the_longest_name_of_a_pod(length, fits):
    """NAME-ID-run-0-0-abcde: 63 characters, by hand."""
    try:
        (text,) = specs.files("jobset_1", name="a" * length).values()
    except specs.spec.ConfigError:
        assert not fits
        return
    (first, *_) = [document["metadata"]["name"] for document in yaml.safe_load_all(text)]
    assert len(f"{first}-run-0-0-abcde") == 63 and fits
