"""A sweep as managed jobs of SkyPilot: a task file a run, and a script that launches them. A run whose machines are taken away, or that
was asked to stop and saved (75), is started again on others; any other error ends it.

Fields as in sky.utils.schemas of SkyPilot 0.14.1.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from shlex import quote
from typing import Any

from moejax.errors import ConfigError, PreemptedError
from moejax.sweep import spec
from moejax.sweep.members import Member
from moejax.sweep.plan import TRAIN, Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkyPilot(spec.Options):
    """Options of --engine=skypilot. Runs write to a bucket or to a volume, one of the two."""

    accelerators: str = ""
    """Of each node, such as H100:8 or tpu-v5p-8; empty for none."""
    infra: str = ""
    """Where to look for machines, such as gcp/us-east5 or k8s; empty for the cheapest."""
    spot: bool = False
    """Machines that may be taken away."""
    cpus: str = ""
    """Of each node, such as 8+."""
    memory: str = ""
    """Of each node in GB, such as 64+."""
    image: str = ""
    """Of the machines, such as docker:IMAGE; empty for SkyPilot's."""
    bucket: str = ""
    """Such as gs://NAME, mounted with a cache on the node's disk; for runs on one host, since others see a file late."""
    volume: str = ""
    """A volume of `sky volumes` that all hosts of a run can write to; for runs on several."""
    mount: str = "/runs"
    """Where bucket or volume is mounted; --workdir is a folder in it."""
    setup: str = "make venv PYTHON=python3.11"
    """Shell command in moejax's folder before the first start on a machine. An accelerator needs its jax:
    'make venv PYTHON=python3.11 && .venv-3.11/bin/python -m pip install "jax[cuda12]"'."""
    python: str = ".venv-3.11/bin/python"
    """Interpreter that `setup` has made."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.bucket) == bool(self.volume):
            given = "both" if self.bucket else "neither"
            raise ConfigError(
                f"--set=bucket=… and --set=volume=…: {given} given; a run that goes on elsewhere needs one of them"
            )
        if self.bucket and not re.match(r"[a-z0-9]+://.", self.bucket):
            raise ConfigError(f"--set=bucket={self.bucket}: with its kind, such as gs://{self.bucket}")
        if self.bucket and self.nodes > 1:
            raise ConfigError(
                f"--set=nodes={self.nodes} with --set=bucket={self.bucket}: hosts see each other's files in a bucket too late for a common "
                "checkpoint; give --set=volume=…"
            )


def files(plan: Plan, options: SkyPilot) -> spec.Files:
    """NAME.sh, which launches all, and NAME-ID.yaml, a task a run."""
    spec.under(plan, options.mount)
    tasks = {
        f"{spec.job(plan, options, member)}.yaml": spec.document(member.name, _task(plan, options, member))
        for member in plan.members
    }
    return {f"{spec.name(plan, options)}.sh": "\n".join(_launch(plan, options)) + "\n", **tasks}


def _launch(plan: Plan, options: SkyPilot) -> Iterator[str]:
    """A line a run."""
    yield "#!/bin/bash"
    yield "# Call it from moejax's folder, which every job is given a copy of."
    yield "set -e"
    yield 'specs=$(dirname "$0")'
    for member in plan.members:
        file = f"{spec.job(plan, options, member)}.yaml"
        yield f'sky jobs launch --yes --async --detach-run "$specs/{file}"  # {member.name}'


def _task(plan: Plan, options: SkyPilot, member: Member) -> dict[str, Any]:
    resources = {
        "infra": options.infra,
        "accelerators": options.accelerators,
        "cpus": options.cpus,
        "memory": options.memory,
        "image_id": options.image,
        "use_spot": options.spot,
        "job_recovery": {"recover_on_exit_codes": [PreemptedError.exit_code]},
    }
    if options.bucket:
        kept = {"file_mounts": {options.mount: {"source": options.bucket, "mode": "MOUNT_CACHED"}}}
    else:
        kept = {"volumes": {options.mount: options.volume}}
    return {
        "name": spec.job(plan, options, member),
        "workdir": ".",
        "num_nodes": options.nodes,
        "resources": {key: value for key, value in resources.items() if value != ""},
        **kept,
        "envs": options.variables,
        "setup": options.setup,
        "run": "\n".join(_run(plan, options, member)) + "\n",
    }


def _run(plan: Plan, options: SkyPilot, member: Member) -> Iterator[str]:
    """Bash on every host. A TPU slice is one node of several hosts, which only the machines know."""
    arguments = [quote(argument) for argument in plan.arguments(member)]
    yield f"if (( SKYPILOT_NUM_NODES != {options.nodes} )); then"
    yield f'  echo "error: $SKYPILOT_NUM_NODES hosts where --set=nodes={options.nodes} was meant" >&2'
    yield "  exit 2"
    yield "fi"
    if options.nodes > 1:
        yield 'head=$(head -n 1 <<< "$SKYPILOT_NODE_IPS")'
        arguments += [f'--coordinator="$head:{options.port}"', f"--processes={options.nodes}"]
        arguments += ['--process="$SKYPILOT_NODE_RANK"']
    yield " \\\n  ".join([f"exec {quote(options.python)} {TRAIN}", *arguments])
