#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Compares the expert kernels of ScatterMoE with our own, outputs and all gradients, in an environment of their own:
#
#     bash scripts/check_kernels.sh
#
# Without a GPU the kernels run in Triton's interpreter, for half a minute. Prints a table, writes JSON into $OUT, and
# exits with 1 if anything differs.
#
#   SCATTERMOE     what pip installs as ScatterMoE: its release 0.3.0 on GitHub, or a folder that holds it
#   KERNELS_VENV   the virtual environment (.venv-kernels; made in a minute, 1 GB, reused while it is current)
#   OUT            where everything goes (playground/runs/kernels)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck disable=SC1091
source scripts/checks/engine_env.sh
SCATTERMOE=${SCATTERMOE:-git+https://github.com/shawntan/scattermoe@47b5e1502e5a10e82c8e5945d761b877849871e7}
KERNELS_VENV=${KERNELS_VENV:-$PWD/.venv-kernels} OUT=${OUT:-playground/runs/kernels}
mkdir -p "$OUT"

# Beside the packages that are installed here, torch among them: what is compared runs in one process.
prepare() {
  local path='import sysconfig; print(sysconfig.get_path("purelib"))'
  [ "$1" = after ] || python -c "$path" >"$("$2/bin/python" -c "$path")/moellava.pth"
}
engine_env "$KERNELS_VENV" prepare triton "$SCATTERMOE"

device=cuda
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  device=cpu
  export TRITON_INTERPRET=1
fi
PYTHONPATH=$PWD "$KERNELS_VENV/bin/python" scripts/checks/kernel_parity.py scattermoe --device $device \
  --output "$OUT/scattermoe.json"
