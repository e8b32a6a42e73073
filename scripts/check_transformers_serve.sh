#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Serves the demo's stages 2 and 3 by `transformers serve`, and compares 12 answers with moellava's own:
#
#     bash scripts/check_transformers_serve.sh [STAGE2 [STAGE3]]
#
# The folders are those of scripts/demo.sh unless others are named. Stage 3 is exported twice, in a class of Hugging
# Face's own and as code. Prints a table each, writes JSON into $OUT, and exits with 1 if anything differs.
#
#   SERVE_VENV   a virtual environment over the project's, with the server's packages (.venv-serve; made in 10 s)
#   OUT          where everything goes (playground/runs/engines/serve)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck disable=SC1091
source scripts/checks/engine_env.sh
check_folders "$@"
SERVE_VENV=${SERVE_VENV:-$PWD/.venv-serve} OUT=${OUT:-playground/runs/engines/serve}
mkdir -p "$OUT"

# What the project's environment has is seen from this one, and not installed again.
prepare() {
  [ "$1" = before ] || return 0
  local purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
  python -c "$purelib" >"$("$2/bin/python" -c "$purelib")/project.pth"
}
engine_env "$SERVE_VENV" prepare \
  "transformers[serving]==$(python -c 'from importlib.metadata import version; print(version("transformers"))')"

server=
trap 'if [ -n "$server" ]; then kill "$server"; fi' EXIT

# checked NAME OWN STAGE TARGET TITLE [FLAG]: one stage in one form; the flag goes to the server.
checked() {
  local made="$OUT/$1" port
  exported "$3" "$4" "$made" || return 1
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  "$SERVE_VENV/bin/python" -m transformers.cli.transformers serve "$made" --host 127.0.0.1 --port "$port" --device cpu \
    "${@:6}" >"$made.log" 2>&1 &
  server=$!
  "$SERVE_VENV/bin/python" scripts/checks/serve_answers.py --url "http://127.0.0.1:$port" --pid $server \
    --model-path "$made" --asked "$2" --output "$made-answers.json" || { tail -n 30 "$made.log" >&2; return 1; }
  kill $server
  wait $server || true
  server=
  compared "$5" "$2" "$made-answers.json" "$made.json"
}

status=0
own_answers "$check_stage2" "$OUT/stage2-own.json"
own_answers "$check_stage3" "$OUT/stage3-own.json"
checked stage2 "$OUT/stage2-own.json" "$check_stage2" native "Stage 2, dense, by transformers serve" || status=1
checked stage3 "$OUT/stage3-own.json" "$check_stage3" native "Stage 3, in a native class, by transformers serve" ||
  status=1
checked stage3-code "$OUT/stage3-own.json" "$check_stage3" code "Stage 3, as code, by transformers serve" \
  --trust-remote-code || status=1
exit $status
