"""A sweep as JobSets of Kubernetes, one a run, that wait in a queue of Kueue. How a run ended decides what comes next:

* 75, or a pod that is taken away: the pod is made again and counts for nothing (podFailurePolicy, Ignore).
* 2, 3 and 4: the same would happen again, so the Job fails with reason PodFailurePolicy, and the JobSet with it (FailJobSet).
* anything else, such as 1 after a lost host: the Job fails, all its pods are made again, `restarts` times (the JobSet's default rule).

Fields as in jobset.x-k8s.io/v1alpha2 and batch/v1, labels as in Google's pages on TPUs in GKE.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from moejax.errors import ConfigError, DamagedError, DivergedError, PreemptedError, UserError
from moejax.sweep import spec
from moejax.sweep.members import Member
from moejax.sweep.plan import TRAIN, Plan

LONGEST = 63
"""Characters of a pod's name, whose end Kubernetes adds."""
JOB = "run"
"""The one replicated job of a JobSet."""
FINAL = sorted(error.exit_code for error in (UserError, DivergedError, DamagedError))


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobSet(spec.Options):
    """Options of --engine=jobset. A run has GPUs, or one TPU slice, or neither."""

    image: str
    """Container with moejax and what it needs."""
    queue: str
    """Local queue of Kueue, which says how many run at a time."""
    claim: str
    """PersistentVolumeClaim that all hosts can write to (ReadWriteMany)."""
    mount: str = "/runs"
    """Where the claim is mounted; --workdir is a folder in it."""
    folder: str = "/moejax"
    """moejax's, in the image."""
    python: str = "python"
    """Interpreter, in the image."""
    tpu: str = ""
    """Kind of TPU, such as tpu-v5p-slice (label cloud.google.com/gke-tpu-accelerator)."""
    topology: str = ""
    """Of the slice, such as 2x2x2."""
    chips: int = 4
    """TPU chips of each node."""
    gpu: str = ""
    """Kind of GPU, such as nvidia-h100-80gb (label cloud.google.com/gke-accelerator); empty for any."""
    gpus: int = 0
    """Of each node."""
    cpu: str = ""
    """Processors that each node must have free, such as 8."""
    memory: str = ""
    """That each node must have free, such as 64Gi."""
    spot: bool = False
    """Nodes that may be taken away."""
    restarts: int = 10
    """Starts from the last checkpoint after an error that may pass."""
    grace: int = 120
    """Seconds from SIGTERM to SIGKILL, in which a run saves; a spot node gives less."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, least in {"chips": 1, "gpus": 0, "restarts": 0, "grace": 1}.items():
            spec.at_least(self, key, least)
        for key in ("image", "queue", "claim"):
            if not getattr(self, key):
                raise ConfigError(f"--set={key}= is empty; name one")
        if self.tpu and (self.gpus or self.gpu):
            raise ConfigError(f"--set=tpu={self.tpu} and gpus={self.gpus}: a run has one kind; leave one out")
        if self.gpu and not self.gpus:
            raise ConfigError(f"--set=gpu={self.gpu} without a number: give --set=gpus=8")
        self._slice()

    def _slice(self) -> None:
        """Raises ConfigError for a slice that has not the hosts of a run."""
        if bool(self.tpu) != bool(self.topology):
            raise ConfigError(f"--set=tpu={self.tpu} with topology={self.topology}: give both, or neither")
        if not self.tpu:
            return
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", self.topology):
            raise ConfigError(f"--set=topology={self.topology}: 4x4 or 2x2x2")
        chips = math.prod(map(int, self.topology.split("x")))
        if chips != self.nodes * self.chips:
            raise ConfigError(
                f"topology={self.topology} has {chips} chips, nodes={self.nodes} with chips={self.chips} have "
                f"{self.nodes * self.chips}: a run is one slice; change --set=nodes=…, chips or topology"
            )


def files(plan: Plan, options: JobSet) -> spec.Files:
    """NAME.yaml, a JobSet a run."""
    spec.under(plan, options.mount)
    documents = [spec.document(member.name, _jobset(plan, options, member)) for member in plan.members]
    return {f"{spec.name(plan, options)}.yaml": "---\n".join(documents)}


def _jobset(plan: Plan, options: JobSet, member: Member) -> dict[str, Any]:
    name = spec.job(plan, options, member)
    pod = f"{name}-{JOB}-0-{options.nodes - 1}-abcde"
    if len(pod) > LONGEST:
        raise ConfigError(
            f"pods of {name} have names of {len(pod)} characters, and Kubernetes takes {LONGEST}: "
            f"{len(pod) - LONGEST} fewer with --set=name=…"
        )
    metadata: dict[str, Any] = {
        "name": name,
        "labels": {"kueue.x-k8s.io/queue-name": options.queue},
        "annotations": {"moejax/run": member.name},
    }
    if options.tpu and options.nodes > 1:  # else two runs could share the node pools of two slices
        metadata["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"] = "cloud.google.com/gke-nodepool"
    rule = {"name": "same_again", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": options.restarts, "rules": [rule]},
            "network": {"enableDNSHostnames": True},
            "replicatedJobs": [{"name": JOB, "replicas": 1, "template": {"spec": _job(plan, options, member)}}],
        },
    }


def _job(plan: Plan, options: JobSet, member: Member) -> dict[str, Any]:
    """A pod a host."""
    taken = {"type": "DisruptionTarget", "status": "True"}
    return {
        "completionMode": "Indexed",
        "completions": options.nodes,
        "parallelism": options.nodes,
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": {"operator": "In", "values": FINAL}},
                {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [PreemptedError.exit_code]}},
                {"action": "Ignore", "onPodConditions": [taken]},
            ]
        },
        "template": {"spec": _pod(plan, options, member)},
    }


def _pod(plan: Plan, options: JobSet, member: Member) -> dict[str, Any]:
    container = {
        "name": "train",
        "image": options.image,
        "workingDir": options.folder,
        "command": [options.python, TRAIN],
        "args": _arguments(plan, options, member),
        "env": [{"name": key, "value": value.replace("$", "$$")} for key, value in options.variables.items()],
        "resources": _resources(options),
        "volumeMounts": [{"name": "runs", "mountPath": options.mount}],
    }
    selected = {
        "cloud.google.com/gke-tpu-accelerator": options.tpu,
        "cloud.google.com/gke-tpu-topology": options.topology,
        "cloud.google.com/gke-accelerator": options.gpu,
        "cloud.google.com/gke-spot": "true" if options.spot else "",
    }
    selector = {key: value for key, value in selected.items() if value}
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.grace,
        **({"nodeSelector": selector} if selector else {}),
        "containers": [{key: value for key, value in container.items() if value}],
        "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": options.claim}}],
    }


def _arguments(plan: Plan, options: JobSet, member: Member) -> list[str]:
    """Of scripts/train.py. Kubernetes puts variables where it reads $(NAME), and one $ for two. Process 0 is found by the name that the
    JobSet's headless service keeps for its pod, on TPUs too."""
    found = [argument.replace("$", "$$") for argument in plan.arguments(member)]
    if options.nodes > 1:
        name = spec.job(plan, options, member)
        found += [f"--coordinator={name}-{JOB}-0-0.{name}:{options.port}", f"--processes={options.nodes}"]
        found += ["--process=$(JOB_COMPLETION_INDEX)"]
    return found


def _resources(options: JobSet) -> dict[str, Any]:
    requests = {"cpu": options.cpu, "memory": options.memory}
    chips = {"google.com/tpu": options.chips if options.tpu else 0, "nvidia.com/gpu": options.gpus}
    parts = {
        "requests": {key: value for key, value in requests.items() if value},
        "limits": {key: value for key, value in chips.items() if value},
    }
    return {key: value for key, value in parts.items() if value}
