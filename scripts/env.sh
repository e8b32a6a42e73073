# SPDX-License-Identifier: Apache-2.0
# Makes the environment that everything here runs in, and enters it:
#
#     source scripts/env.sh
#
# The virtual environment is .venv, or $VENV where that is set. It is reused while setup.py, constraints.txt and the
# Python it was made with are unchanged, so a second call takes well under a second.
#
#   PYTHON   the interpreter to make it with (otherwise the first of python3, python3.13 … python3.10 that will do)
#   EXTRAS   what is installed beside the core (otherwise train,demo,test)
#   CONSTRAINTS   pip's file of versions (otherwise constraints.txt, those that are tested)
#
# Made to be sourced: nothing here changes the options of the calling shell, and a failure returns 1.

moellava_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

moellava_constraints=${CONSTRAINTS:-$moellava_root/constraints.txt}

moellava_say() { printf 'env: %s\n' "$*" >&2; }

# Python 3.10 or newer.
moellava_find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.10; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      printf '%s\n' "$candidate"
      return 0
    fi
  done
  moellava_say "Python 3.10 or newer is needed, and python3 is $(python3 --version 2>&1 || true)." \
    "Install one and say where it is: PYTHON=/path/to/python3.11 source scripts/env.sh"
  return 1
}

moellava_check_machine() {
  local python=$1
  if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    moellava_say "$python cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv"
    return 1
  fi
}

moellava_has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }

# What the environment was made from; the same text means that it is current.
moellava_stamp() {
  printf '%s %s %s\n' "$moellava_root" "$("$1" --version 2>&1)" "${EXTRAS:-train,demo,test}"
  cksum <"$moellava_root/setup.py"
  cksum <"$moellava_constraints"
}

moellava_cpu_builds=https://download.pytorch.org/whl/cpu

# Whether pip would fetch a build of torch for CUDA, several GB. pip is asked, since indexes and mirrors differ.
moellava_takes_cuda() {
  "$VENV/bin/python" -m pip install --disable-pip-version-check --quiet --dry-run --ignore-installed --no-deps \
    --report - -c "$moellava_constraints" torch 2>/dev/null | grep -Eq '"(nvidia|cuda)-'
}

moellava_install() {
  local python=$1 start=$SECONDS index=${PIP_EXTRA_INDEX_URL:-}
  moellava_say "installing into $VENV (one to two minutes; $VENV/install.log says what it does)"
  if ! "$VENV/bin/python" -c 'import pip' 2>/dev/null; then
    "$python" -m venv --clear "$VENV" || return 1
  fi
  if ! moellava_has_gpu && moellava_takes_cuda; then
    moellava_say "there is no GPU: torch is taken from $moellava_cpu_builds, where its builds for CPUs are"
    index="$moellava_cpu_builds $index"
  fi
  if ! PIP_EXTRA_INDEX_URL=$index "$VENV/bin/python" -m pip install --disable-pip-version-check -c "$moellava_constraints" \
    -e "$moellava_root[${EXTRAS:-train,demo,test}]" >"$VENV/install.log" 2>&1; then
    grep -v 'neither a file nor a directory' "$VENV/install.log" | tail -n 20 >&2
    return 1
  fi
  moellava_say "installed in $((SECONDS - start)) s"
}

moellava_prepare() {
  local python stamp
  python=$(moellava_find_python) || return 1
  export VENV=${VENV:-$moellava_root/.venv}
  case $VENV in
    # The system takes an interpreter's path up to the first space, and deepspeed's command names one in its first line.
    *[[:space:]]*)
      moellava_say "deepspeed's command cannot begin in an environment whose path has a space: $VENV." \
        "Say where else it shall be: VENV=$HOME/moellava-venv source scripts/env.sh"
      return 1
      ;;
  esac
  stamp=$(moellava_stamp "$python")
  local current=no
  [ "$(cat "$VENV/moellava.stamp" 2>/dev/null)" = "$stamp" ] && current=yes
  if [ $current = no ]; then
    moellava_check_machine "$python" || return 1
    moellava_install "$python" || { moellava_say "the installation failed; the lines above say why"; return 1; }
  fi
  # shellcheck disable=SC1091
  source "$VENV/bin/activate" || return 1
  export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$VENV/torch_extensions}
  moellava_has_gpu || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
  if [ $current = no ]; then
    printf '%s\n' "$stamp" >"$VENV/moellava.stamp"
  fi
}

moellava_prepare
