#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the documentation's site into build/site, and fails at any warning. `bash scripts/docs.sh serve` shows it instead.
#   SITE        where the site goes (build/site)
#   DOCS_VENV   the environment to build in (.venv-docs); it holds mkdocs alone, the code is read and not imported
#   PYTHON      the interpreter to make it with (python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export NO_MKDOCS_2_WARNING=1 # the theme's advertisement
venv=${DOCS_VENV:-.venv-docs}
if [ ! -x "$venv/bin/mkdocs" ]; then
  "${PYTHON:-python3}" -m venv "$venv"
  # The extra `docs` of setup.py, without what moellava itself needs to run.
  "$venv/bin/pip" install --quiet --disable-pip-version-check 'mkdocs-material>=9.5' 'mkdocstrings[python]>=0.26' 'ruff'
fi
case ${1:-build} in
  build) "$venv/bin/mkdocs" build --strict --clean --site-dir "$(realpath -m "${SITE:-build/site}")" ;;
  serve) "$venv/bin/mkdocs" serve ;;
  *)
    echo "usage: bash scripts/docs.sh [build | serve]" >&2
    exit 2
    ;;
esac
