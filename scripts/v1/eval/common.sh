# SPDX-License-Identifier: Apache-2.0
# One way to score a model, for every task: sourced by the scripts beside this file, each of which names its task.
#
#     MODEL=checkpoints/qwen-moe bash scripts/v1/eval/pope.sh
#
# Flags of `moellava eval` may follow a script's name. Each value below is an environment variable's default:
#
#   MODEL         the model's folder                     DATA_FOLDER  what LLaVA's eval.zip was unpacked into
#   OUTPUT        where answers and results go (a folder a model in $OUTPUT_ROOT); started again, a run goes on there
#   NPROC         processes (one a GPU; 1 without a GPU) BATCH        questions that a process asks at once
#   SPLIT         another split of the task              AGAINST      an earlier OUTPUT to compare with
#   JUDGE_URL     OpenAI API of the judge, for llava-bench and mm-vet; its key is $OPENAI_API_KEY
#   JUDGE_MODEL   the judge's name there
#   DRY_RUN=1     print the command and stop

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../.." && pwd)
# shellcheck disable=SC1091
command -v moellava >/dev/null || source "$root/scripts/env.sh"

# evaluate TASK [FLAG…]
evaluate() {
  local task=$1 model=${MODEL:?names the folder of the model, as in MODEL=checkpoints/qwen-moe}
  shift
  local processes=1
  if command -v nvidia-smi >/dev/null; then
    processes=$(nvidia-smi -L 2>/dev/null | grep -c GPU) || processes=1
  fi
  local command=(
    moellava eval --model-path "$model" --task "$task"
    --output-dir "${OUTPUT:-${OUTPUT_ROOT:-eval_results}/$(basename "$model")}"
    --batch-size "${BATCH:-16}" --processes "${NPROC:-$processes}"
  )
  [ "$task" = easy-vqa ] || command+=(--data-folder "${DATA_FOLDER:-playground/data/eval}")
  [ -z "${SPLIT:-}" ] || command+=(--split "$SPLIT")
  [ -z "${AGAINST:-}" ] || command+=(--against "$AGAINST")
  case $task in
    llava-bench | mm-vet)
      [ -z "${JUDGE_URL:-}" ] || command+=(--judge-url "$JUDGE_URL" --judge-model "${JUDGE_MODEL:?names the judge}")
      ;;
  esac
  set -- "${command[@]}" "$@"
  if [ "${DRY_RUN:-0}" = 1 ]; then
    printf '%q ' "$@"
    echo
  else
    exec "$@"
  fi
}
