#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One stage on several hosts, started on each of them:
#
#     NODES=2 MASTER=first-host:29500 bash scripts/cluster/torchrun.sh --deepspeed scripts/zero2.json --version v1 …
#
# All hosts see the same data, code and --output_dir under the same paths. SIGTERM to any of these scripts (what `docker stop`,
# systemd and most schedulers send) ends the whole run with a checkpoint; the same command on all hosts goes on from there.
#
#   NODES       how many hosts
#   MASTER      HOST:PORT of one of them, where they find each other
#   PROCESSES   processes on this host: auto (one per GPU, else one), or a number
#   JOB         a name that all hosts share (moellava); two runs at one MASTER need two
#   GRACE       seconds from a signal to the end of the checkpoint (600)
set -euo pipefail

: "${NODES:?how many hosts}" "${MASTER:?HOST:PORT of one of the hosts}"
processes=${PROCESSES:-auto}
found=$(nvidia-smi -L 2>/dev/null || true)
if [ "$processes" = auto ] && [[ $found != *GPU* ]]; then
  processes=1 # torchrun would start one per core
fi

grace=()
help=$(torchrun --help)
if [[ $help == *--shutdown-timeout* ]]; then
  grace=(--shutdown-timeout "${GRACE:-600}") # it kills processes after 30 seconds otherwise; older ones have no such flag
fi
exec torchrun --nnodes "$NODES" --nproc-per-node "$processes" --rdzv-backend c10d --rdzv-endpoint "$MASTER" \
  --rdzv-id "${JOB:-moellava}" "${grace[@]}" -m moellava.train.train "$@"
