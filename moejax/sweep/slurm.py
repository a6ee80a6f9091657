"""A sweep as one SLURM job array: a task a run. What the script does on signals is SLURM's own rules:

* `--signal=B:USR1@SECONDS` tells the script alone that its time is nearly up. It asks the run to save (75) and requeues the task.
* SIGTERM comes before a preemption or a cancellation. The run saves, and the script requeues nothing: SLURM does, or nobody wants it.
* srun answers SIGTERM by killing its tasks, so they are told by scancel, which signals the steps of a job and not its script.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from shlex import quote

from moejax.errors import ConfigError, PreemptedError
from moejax.sweep import spec
from moejax.sweep.plan import TRAIN, Plan

TIME = re.compile(r"(\d+-)?\d+:\d\d:\d\d")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slurm(spec.Options):
    """Options of --engine=slurm. `port` is the first of a thousand: a run takes one by its job's number."""

    time: str
    """Limit of one start of a run, HH:MM:SS or D-HH:MM:SS; a run that needs longer is requeued."""
    at_once: int = 0
    """Runs at a time; 0 for no limit."""
    partition: str = ""
    """Where to run; empty for the cluster's default."""
    account: str = ""
    """Who pays; empty for the user's default."""
    gpus: str = ""
    """Of each node, such as 8 or a100:8."""
    cpus: int = 0
    """Processors of each node; 0 for the cluster's default."""
    memory: str = ""
    """Of each node, such as 64G."""
    grace: int = 120
    """Seconds before the limit at which a run is told to save."""
    folder: str = ""
    """moejax's, as the nodes see it; empty for where sbatch is called."""
    setup: str = ""
    """Shell command before a run, such as 'module load cuda'."""
    python: str = ".venv-3.11/bin/python"
    """Interpreter, as the nodes see it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        spec.at_least(self, "at_once", 0)
        spec.at_least(self, "cpus", 0)
        spec.at_least(self, "grace", 1)
        if not TIME.fullmatch(self.time):
            raise ConfigError(f"--set=time={self.time}: HH:MM:SS, such as 04:00:00, or D-HH:MM:SS")
        for key in ("partition", "account", "gpus", "memory"):
            if re.search(r"[\s'\"\\#]", getattr(self, key)):
                raise ConfigError(f"--set={key}={getattr(self, key)}: a line of #SBATCH takes no spaces, quotes or #")


def files(plan: Plan, options: Slurm) -> spec.Files:
    """NAME.sh, for sbatch."""
    parts = [_header(plan, options), _runs(plan, options), _body(options)]
    return {f"{spec.name(plan, options)}.sh": "\n\n".join("\n".join(part) for part in parts) + "\n"}


def _header(plan: Plan, options: Slurm) -> Iterator[str]:
    """What sbatch reads."""
    limit = f"%{options.at_once}" if options.at_once else ""
    directives = {
        "job-name": spec.name(plan, options),
        "array": f"0-{len(plan.members) - 1}{limit}",
        "nodes": options.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": options.cpus,
        "gpus-per-node": options.gpus,
        "mem": options.memory,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "signal": f"B:USR1@{options.grace}",
        "output": "%x-%A_%a.log",
        "open-mode": "append",
    }
    yield "#!/bin/bash"
    yield f"# {len(plan.members)} runs of {plan.config}, a task each. For sbatch, called from moejax's folder; see docs/sweeps.md."
    yield from (f"#SBATCH --{key}={value}" for key, value in directives.items() if value)
    yield "#SBATCH --requeue"


def _runs(plan: Plan, options: Slurm) -> Iterator[str]:
    """The sweep: what every run is given, and what task i is given."""
    if options.folder:
        yield f"cd {quote(options.folder)} || exit 2"
    if options.setup:
        yield f"{options.setup} || exit 2"
    yield from (f"export {key}={quote(value)}" for key, value in options.variables.items())
    yield f"root={quote(plan.root.rstrip('/') or '/')}"
    yield f"common=({' '.join(map(quote, [f'--config={plan.config}', *plan.common]))})"
    yield "case $SLURM_ARRAY_TASK_ID in"
    for task, member in enumerate(plan.members):
        yield f"{task}) run={quote(member.folder)}; set -- {' '.join(map(quote, member.options))} ;;"
    yield f'*) echo "error: no run $SLURM_ARRAY_TASK_ID; they are 0 to {len(plan.members) - 1}" >&2; exit 2 ;;'
    yield "esac"


def _body(options: Slurm) -> Iterator[str]:
    """One run, its signals and its end."""
    step = ["srun", "--kill-on-bad-exit=0", *([f"--cpus-per-task={options.cpus}"] if options.cpus else [])]
    train = f'{quote(options.python)} {TRAIN} "${{common[@]}}" "$@" --workdir="$root/$run"'
    if options.nodes > 1:
        yield 'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        yield f"port=$(({options.port} + SLURM_JOB_ID % 1000))"
        step += ["bash", "-c", """'exec "$@" --process="$SLURM_PROCID"'""", "bash"]
        train += f' --coordinator="$head:$port" --processes={options.nodes}'
    yield from f"""\
mkdir -p "$root/$run" || exit 2
log=$root/$run/output.txt
echo "$run writes to $log"

# SIGUSR1 comes shortly before the time limit, SIGTERM before a preemption or a cancellation. scancel tells the run, which saves.
cancelled="" told=""
tell() {{ told=1; scancel --signal=TERM "$SLURM_JOB_ID"; }}
trap tell USR1
trap 'cancelled=1; tell' TERM
{" ".join(step)} \\
  {train} >>"$log" 2>&1 &
while told=""; wait $!; code=$?; [[ $told ]]; do :; done

if [[ $code == {PreemptedError.exit_code} && ! $cancelled ]]; then
  echo "$run was saved; it goes on later"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code""".splitlines()
