# SPDX-License-Identifier: Apache-2.0
# Starts a stage of a recipe: sourced by the scripts beside this file with the recipe's name and the stage's, and with
# flags of train.py, which may follow a script's name:
#
#     MODEL=/models/vicuna-7b IMAGE_FOLDER=/data/images bash scripts/v1/vicuna/pretrain.sh --max_steps 100
#
# What the stages are, and which environment variables set what, stands in moellava/recipes.py: MODEL, TOWER,
# JSON_FOLDER, IMAGE_FOLDER, DATA, OUTPUT_ROOT, OUTPUT, PRETRAIN_DIR, FINETUNE_DIR, ZERO and one for each
# hyper-parameter. And here:
#
#   NPROC           processes (all GPUs; 2 without a GPU)
#   LAUNCHER        deepspeed, or python for a single process  LAUNCHER_FLAGS  such as --hostfile FILE
#   PRECISION       bf16, fp16 or fp32 (bf16; fp32 without a GPU)
#   DRY_RUN=1       print the command and stop

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
command -v deepspeed >/dev/null || source "$root/scripts/env.sh"

if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
  processes=${NPROC:+--num_gpus $NPROC}
  export PRECISION=${PRECISION:-bf16}
else
  export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
  processes="--num_accelerators ${NPROC:-2}"
  export PRECISION=${PRECISION:-fp32}
fi

case ${LAUNCHER:-deepspeed} in
  # shellcheck disable=SC2206 # words on purpose
  deepspeed) launch=(deepspeed $processes ${LAUNCHER_FLAGS:-}) ;;
  *) launch=("$LAUNCHER") ;;
esac

# The stage's own flags, and what stood on the command line: of a flag given twice the last counts.
words=$(PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" python -m moellava.recipes "$1" "$2")
shift 2
mapfile -t flags <<<"$words"
set -- "${launch[@]}" "$root/train.py" "${flags[@]}" "$@"
if [ "${DRY_RUN:-0}" = 1 ]; then
  printf '%q ' "$@"
  echo
else
  exec "$@"
fi
