#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The whole of moellava on a small benchmark, from a fresh machine to a table of scores: environment, base models, data,
# the three stages, scores on easy-VQA's official test split, one question in chat: about 10 minutes on 2 cores.
#
#     bash scripts/demo.sh              the usual run
#     bash scripts/demo.sh --full       the longer recipe, for the best score (about half an hour)
#     bash scripts/demo.sh --smoke      a few steps and a few questions: shows that everything runs, scores mean nothing
#     bash scripts/demo.sh --make-base  makes the base models anew before it starts (10 minutes more)
#
# Started again, it goes on where it was stopped. The environment is .venv, or $VENV (see scripts/env.sh).
set -euo pipefail
started=$(date +%s)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck disable=SC1091
source scripts/env.sh
# Nothing is fetched from a hub: everything the demo reads is in the repository or in the environment.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec python -m moellava.cli demo --started "$started" --runs playground/runs "$@"
