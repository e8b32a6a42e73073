#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One stage on several hosts, started from one of them over ssh by DeepSpeed's launcher:
#
#     bash scripts/cluster/hostfile.sh hosts.txt --deepspeed scripts/zero2.json --version v1 …
#
# or, without ssh, on each of them:
#
#     NODE=0 MASTER=node1:29500 bash scripts/cluster/hostfile.sh hosts.txt --deepspeed scripts/zero2.json --version v1 …
#
#   NODE        this host's line in hosts.txt, from 0 on: nothing is started on the others
#   MASTER      HOST:PORT of the first host, where all find each other; unset: what `hostname -I` says there first
#
# Over ssh a host gets no environment but that of its own shell, and the lines NAME=VALUE of a file `.deepspeed_env` in
# this folder or at home. hosts.txt has a line for each host, as `ssh` knows it, and its number of GPUs: `node1 slots=8`. All hosts see the same
# data, code and --output_dir under the same paths.
#
# DeepSpeed's launcher passes no signal on to other hosts. To end a run with a checkpoint, signal the processes themselves:
# `pkill -TERM -f moellava.train.train` on one host is enough, since all of them agree to stop. Where jobs are preempted,
# slurm.sh and torchrun.sh serve better.
set -euo pipefail

say() { printf 'hostfile: %s\n' "$*" >&2; }

if [ $# -lt 2 ] || [ ! -r "$1" ]; then
  say "usage: bash scripts/cluster/hostfile.sh HOSTFILE FLAGS OF train.py …"
  exit 2
fi
hostfile=$1
shift
wrong=$(grep -nvE '^[[:space:]]*(#.*)?$|^[^[:space:]]+[[:space:]]+slots=[1-9][0-9]*[[:space:]]*$' "$hostfile" || true)
if [ -n "$wrong" ]; then
  say "$hostfile: a line is 'HOST slots=NUMBER', and this is none: $wrong"
  exit 2
fi
where=()
if [ -n "${MASTER:-}" ]; then
  where=(--master_addr "${MASTER%:*}" --master_port "${MASTER##*:}")
fi
if [ -n "${NODE:-}" ]; then
  : "${MASTER:?HOST:PORT of the first host, which NODE needs}"
  where+=(--no_ssh --node_rank "$NODE")
elif ! command -v pdsh >/dev/null; then
  say "DeepSpeed starts other hosts with pdsh, which is not here: apt-get install pdsh, or start each host by NODE"
  exit 2
fi
exec deepspeed --hostfile "$hostfile" "${where[@]}" --module moellava.train.train "$@"
