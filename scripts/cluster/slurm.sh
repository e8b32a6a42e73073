#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#SBATCH --job-name=moellava
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
#
# One stage under Slurm, on one node or many; what is preempted, or runs out of time, goes on by itself:
#
#     sbatch --nodes 2 scripts/cluster/slurm.sh --deepspeed scripts/zero2.json --version v1 …
#
# Slurm starts one process per GPU itself, so that its signals reach each of them: 300 seconds before the time is up, or when
# the job is preempted, SIGTERM. Every process then finishes its step, saves a checkpoint together with the others, and exits
# with 143; the job is queued again, and the same command goes on from there. docs/CLUSTER.md has the rest.
#
#   RUN        what the processes are started in, such as "apptainer exec --nv moellava.sif" (nothing)
#   PYTHON     the interpreter (python); `source scripts/env.sh` before sbatch puts ours first
#   RESTARTS   how often a job is queued again at most (100)
set -euo pipefail

say() { printf 'slurm: %s\n' "$*" >&2; }

gpus=${SLURM_GPUS_ON_NODE:-0} tasks=${SLURM_NTASKS_PER_NODE:-1}
tasks=${tasks%%(*} # Slurm writes "8(x2)" for two nodes of 8
if [ "$gpus" -gt 0 ] && [ "$gpus" -ne "$tasks" ]; then
  say "--ntasks-per-node is $tasks, but a node gives $gpus GPUs: each process trains on one. Give both the same number."
  exit 2
fi

# The processes find each other at the first node; the port is the job's own, so that jobs on one node do not meet.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # no `head`: a pipe that closes would end this script
MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# Slurm may send this script the signal, too: it waits for the processes all the same.
trap 'say "asked to stop; waiting for the checkpoint"' TERM INT

# The variables in the quotes are those of each process.
# shellcheck disable=SC2016
start='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec "$@"'
# shellcheck disable=SC2086  # RUN is several words
srun --kill-on-bad-exit=1 bash -c "$start" moellava ${RUN:-} "${PYTHON:-python}" -m moellava.train.train "$@" &
child=$!
status=0
while true; do
  wait "$child" && status=0 || status=$?
  kill -0 "$child" 2>/dev/null || break # a signal has ended the wait, not the processes
done

restarts=${SLURM_RESTART_COUNT:-0}
case $status in
  0) say "complete" ;;
  130 | 143)
    if [ "$restarts" -ge "${RESTARTS:-100}" ]; then
      say "stopped with a checkpoint; not queued again, since that has happened $restarts times (RESTARTS)"
      exit "$status"
    fi
    say "stopped with a checkpoint; queued again"
    scontrol requeue "$SLURM_JOB_ID"
    ;;
  *)
    say "failed with status $status; not queued again"
    exit "$status"
    ;;
esac
