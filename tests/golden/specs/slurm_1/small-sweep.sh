#!/bin/bash
# 3 runs of tests/sweep/default.py, a task each. For sbatch, called from moejax's folder; see docs/sweeps.md.
#SBATCH --job-name=small-sweep
#SBATCH --array=0-2%2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=a100:8
#SBATCH --time=04:00:00
#SBATCH --partition=main
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue

export PYTHONUNBUFFERED=1
export XLA_FLAGS='--a=$(b) --c'
root='/runs/small sweep'
common=(--config=tests/sweep/default.py --config.train.log_every=10)
case $SLURM_ARRAY_TASK_ID in
0) run=seed=0-f37abf3a; set -- --config.name=seed=0 --config.train.seed=0 ;;
1) run=seed=1_pattern=attention+dense-4ce6437b; set -- --config.name=seed=1_pattern=attention+dense --config.train.seed=1 '--config.model.pattern=('"'"'attention+dense'"'"',)' ;;
2) run=seed=2_files=a-b-s-HOME-x-.md-09443839; set -- --config.name=seed=2_files=a-b-s-HOME-x-.md --config.train.seed=2 '--config.data.files=a b'"'"'s/$(HOME) "$x".md' ;;
*) echo "error: no run $SLURM_ARRAY_TASK_ID; they are 0 to 2" >&2; exit 2 ;;
esac

mkdir -p "$root/$run" || exit 2
log=$root/$run/output.txt
echo "$run writes to $log"

# SIGUSR1 comes shortly before the time limit, SIGTERM before a preemption or a cancellation. scancel tells the run, which saves.
cancelled="" told=""
tell() { told=1; scancel --signal=TERM "$SLURM_JOB_ID"; }
trap tell USR1
trap 'cancelled=1; tell' TERM
srun --kill-on-bad-exit=0 --cpus-per-task=16 \
  .venv-3.11/bin/python scripts/train.py "${common[@]}" "$@" --workdir="$root/$run" >>"$log" 2>&1 &
while told=""; wait $!; code=$?; [[ $told ]]; do :; done

if [[ $code == 75 && ! $cancelled ]]; then
  echo "$run was saved; it goes on later"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
