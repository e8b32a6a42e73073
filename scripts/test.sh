#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# All checks, as CI runs them: environment, lint, types, tests. Arguments go to pytest: `bash scripts/test.sh -k masking`.
#   WORKERS   test processes side by side (2)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

# One thread a process: the tests run side by side, and threads of several processes on the same cores slow all of them.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
# Nothing is fetched from a hub: a test that tries fails at once, and by name.
export HF_HUB_OFFLINE=1

pre-commit run --all-files --show-diff-on-failure # ruff, mypy, bash -n
exec python -m pytest -n "${WORKERS:-2}" --dist loadfile --durations 15 "$@"
