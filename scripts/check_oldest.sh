#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The tests with the oldest releases that setup.py takes (its `>=`), which somebody may have who installs moellava beside
# other packages. Arguments go to pytest: `bash scripts/check_oldest.sh -m "not slow"`.
#   OLDEST_VENV   the environment, made anew each time (.venv-oldest)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export VENV=${OLDEST_VENV:-$PWD/.venv-oldest} CONSTRAINTS
CONSTRAINTS=$(mktemp)
trap 'rm -f -- "$CONSTRAINTS"' EXIT
# Of a package that is named twice (an extra may want a newer one) the older.
grep -oE '"[A-Za-z-]+(\[[a-z]+\])?>=[0-9.]+' setup.py | sed -E 's/"|\[[a-z]+\]//g; s/>=/==/' | sort -V | sort -u -t= -k1,1 \
  >"$CONSTRAINTS"
rm -rf -- "$VENV"
SKIP=mypy bash scripts/test.sh "$@" # whose types are those of newer releases
