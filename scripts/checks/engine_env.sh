# SPDX-License-Identifier: Apache-2.0
# What the checks of engines share. Sourced by scripts/check_*.sh, in the root of the repository.

# shellcheck disable=SC1091
source scripts/env.sh
# One thread: an engine beside other processes on the same cores is slowed by more. Nothing is fetched from a hub.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

check_say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }

# check_stage2 and check_stage3: the folders to check, which the demo makes.
check_folders() {
  check_stage2=${1:-playground/runs/demo/default/stage2} check_stage3=${2:-playground/runs/demo/default/stage3}
  local folder
  for folder in "$check_stage2" "$check_stage3"; do
    if [ ! -f "$folder/config.json" ]; then
      check_say "there is no model in $folder: run scripts/demo.sh first, or name the folders of stage 2 and of stage 3"
      return 1
    fi
  done
}

# engine_env FOLDER PREPARE REQUIREMENT…: makes a virtual environment of an engine's own. It is reused while the
# requirements and the Python are the same. PREPARE is called with the folder, before and after pip.
engine_env() {
  local folder=$1 prepare=$2 stamp
  shift 2
  stamp="$(python --version) $VENV $*"
  [ "$(cat "$folder/moellava.stamp" 2>/dev/null)" = "$stamp" ] && return 0
  check_say "installing $* into $folder (two minutes at most; $folder/install.log says what it does)"
  python -m venv --clear "$folder" || return 1
  "$prepare" before "$folder" || return 1
  if ! "$folder/bin/python" -m pip install --disable-pip-version-check --no-compile "$@" >"$folder/install.log" 2>&1; then
    grep -v 'neither a file nor a directory' "$folder/install.log" | tail -n 20 >&2
    return 1
  fi
  "$prepare" after "$folder" || return 1
  printf '%s\n' "$stamp" >"$folder/moellava.stamp"
}

# exported STAGE TARGET FOLDER: a folder that the engine opens, made anew.
exported() {
  rm -rf "$3"
  moellava export --model-path "$1" --output-dir "$3" --to "$2"
}

# own_answers STAGE FILE, and compared TITLE OWN THEIRS FILE [FLAG…]: see scripts/checks/*.py.
own_answers() { python scripts/checks/own_answers.py --model-path "$1" --output "$2"; }
compared() { python scripts/checks/compare.py --title "$1" --own "$2" --theirs "$3" --output "$4" "${@:5}"; }
