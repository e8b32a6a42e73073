#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Lets lmms-eval drive a model of the demo, over questions that lie here, and compares its score with `moellava eval`:
#
#     bash scripts/check_lmms_eval.sh [MODEL]
#
# MODEL is stage 3 of scripts/demo.sh unless another folder is named. Two tasks: free answers (generate_until), and the
# likeliest of all answers (log likelihoods). Prints a table, writes JSON into $OUT, and exits with 1 if the scores of
# the free answers differ.
#
#   LMMS_VENV   a virtual environment over the project's, with lmms-eval (.venv-lmms; made in 20 s)
#   QUESTIONS   of easy-VQA's test split (40)
#   OUT         where everything goes (playground/runs/lmms)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck disable=SC1091
source scripts/checks/engine_env.sh
model=${1:-playground/runs/demo/default/stage3}
check_folders "$model" "$model"
LMMS_VENV=${LMMS_VENV:-$PWD/.venv-lmms} OUT=${OUT:-playground/runs/lmms} QUESTIONS=${QUESTIONS:-40}
rm -rf "$OUT"
mkdir -p "$OUT"

# lmms-eval asks for an older av, a CUDA build of torch and much else that its core does not import: it is installed
# without what it depends on, beside what it does import; the rest is seen in the project's environment.
prepare() {
  [ "$1" = before ] || return 0
  local purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
  python -c "$purelib" >"$("$2/bin/python" -c "$purelib")/project.pth"
}
engine_env "$LMMS_VENV" prepare --no-deps lmms-eval==0.7.3 \
  loguru pytablewriter DataProperty typepy mbstrdecoder tabledata tcolorpy pathvalidate sacrebleu portalocker evaluate \
  tenacity jsonlines chardet python-dotenv colorama tabulate lxml \
  aiohttp multidict attrs yarl propcache aiohappyeyeballs aiosignal frozenlist

python scripts/checks/lmms_tasks.py write --output "$OUT/tasks" --questions "$QUESTIONS"
moellava eval --model-path "$model" --limit "$QUESTIONS" --output "$OUT/own.json"
# The tasks are found in one folder, and the package itself on the path, also where it is installed as an editable one.
if ! PYTHONPATH=$PWD "$LMMS_VENV/bin/python" -m lmms_eval --model moellava --model_args "pretrained=$model" \
  --tasks moellava_easy_vqa,moellava_easy_vqa_choice --include_path "$OUT/tasks" --batch_size 8 \
  --output_path "$OUT/results" >"$OUT/lmms.log" 2>&1; then
  tail -n 30 "$OUT/lmms.log" >&2
  exit 1
fi
python scripts/checks/lmms_tasks.py compare --own "$OUT/own.json" --theirs "$OUT/results" --output "$OUT/scores.json"
