"""tests/golden/specs held to the schemas that SkyPilot and Kubeflow publish, where they are installed (make specs). Imports nothing of
moejax: that environment has no jax."""

import copy
from pathlib import Path

import pytest

sky = pytest.importorskip("sky", reason="make specs installs it")
jobset = pytest.importorskip("kubeflow_trainer_api.models.jobset_v1alpha2_job_set", reason="make specs installs it")

import jsonschema
import yaml
from sky.utils import schemas

FOLDER = Path(__file__).parents[1] / "golden" / "specs"
TASKS = sorted(FOLDER.glob("skypilot_*/*.yaml"))
JOBSETS = sorted(FOLDER.glob("jobset_*/*.yaml"))


def strict(schema):
    """Without room for keys that it does not name, which clients are given for their plugins."""
    if isinstance(schema, dict):
        closed = {"additionalProperties": False} if schema.get("additionalProperties") is True else {}
        return {key: strict(value) for key, value in schema.items()} | closed
    return [strict(item) for item in schema] if isinstance(schema, list) else schema


@pytest.mark.parametrize("file", TASKS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_skypilot(file):
    """By the schemas of task, resources and storage, and by SkyPilot's own reading of the file."""
    tree = yaml.safe_load(file.read_text())
    jsonschema.validate(tree, strict(schemas.get_task_schema()))
    jsonschema.validate(tree["resources"], strict(schemas.get_resources_schema()))
    for mounted in tree.get("file_mounts", {}).values():
        jsonschema.validate(mounted, strict(schemas.get_storage_schema()))
    offline = {
        key: copy.deepcopy(value) for key, value in tree.items() if key != "file_mounts"
    }  # else the bucket is looked up
    task = sky.Task.from_yaml_config(offline)
    assert (task.name, task.num_nodes, task.run) == (tree["name"], tree["num_nodes"], tree["run"])
    (resources,) = task.resources
    assert resources.job_recovery["recover_on_exit_codes"] == [75]


@pytest.mark.parametrize("key", ["job_recovry", "use_spots"])
def test_skypilot_refuses_what_it_does_not_know(key):
    tree = yaml.safe_load(TASKS[0].read_text())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree["resources"] | {key: 1}, strict(schemas.get_resources_schema()))


@pytest.mark.parametrize("file", JOBSETS, ids=lambda file: file.parent.name)
def test_jobset(file):
    """By the models that are made of the API's OpenAPI: types, and no key is lost on the way there and back."""
    for tree in yaml.safe_load_all(file.read_text()):
        assert jobset.JobsetV1alpha2JobSet.from_dict(tree).to_dict() == tree


def test_jobset_loses_what_it_does_not_know():
    tree = next(iter(yaml.safe_load_all(JOBSETS[0].read_text())))
    tree["spec"]["failurePolicy"]["maxRestart"] = 3
    assert jobset.JobsetV1alpha2JobSet.from_dict(tree).to_dict() != tree
