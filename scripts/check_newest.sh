#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The tests with the newest release of everything, as `pip install moellava` brings it today, where scripts/test.sh has the
# versions of constraints.txt. Arguments go to pytest: `bash scripts/check_newest.sh -m "not slow"`.
#   NEWEST_VENV   the environment, made anew each time (.venv-newest)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export VENV=${NEWEST_VENV:-$PWD/.venv-newest} CONSTRAINTS=/dev/null
rm -rf -- "$VENV"
exec bash scripts/test.sh "$@"
