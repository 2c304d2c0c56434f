# What the scripts share; sourced from the repository's root, never run. bash, `set -euo pipefail` by the caller.

venv=${venv:-.venv} # where the project is installed

say() { printf '%s\n' "== $*"; }

# The Pythons that the project accepts, newest first: those for which all pinned packages have wheels.
PYTHONS=(3.14 3.13 3.12 3.11)

# find_python: one of them that can make environments: $PYTHON, else the newest that is there.
find_python() {
  local candidate
  for candidate in ${PYTHON:-${PYTHONS[@]/#/python} python3 python}; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit("{}.{}".format(*sys.version_info) not in sys.argv[1:])' \
      "${PYTHONS[@]}" 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

# make_venv: $venv, by a Python that is there, or by one that uv fetches.
make_venv() {
  local python
  say "making $venv"
  if python=$(find_python); then
    "$python" -m venv "$venv"
  elif [ -z "${PYTHON:-}" ] && command -v uv >/dev/null; then
    uv venv --quiet --seed --python 3.13 "$venv"
  else
    echo "unigen needs Python ${PYTHONS[*]: -1} to ${PYTHONS[0]} with its venv module (on Debian and Ubuntu: apt-get install python3-venv)." >&2
    echo "Where it has another name: PYTHON=/path/to/python $0. With uv installed, one is fetched." >&2
    return 1
  fi
}

# has MODULE: the environment has it (looked up, not imported: that would take seconds).
has() { "$venv/bin/python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$1"; }

# install EXTRAS ("" or "[dev]"): $venv with the project in it; does nothing when nothing changed since the last time.
install() {
  local extras=$1 stamp="$venv/.installed${1//[^a-z]/-}" wanted
  if [ ! -x "$venv/bin/python" ]; then
    make_venv
  fi
  wanted=$(cat pyproject.toml setup.py constraints.txt | "$venv/bin/python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
  # The location is part of it: an environment that was copied elsewhere points at its old place.
  wanted="$wanted $PWD"
  if [ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ] && has torch && has unigen; then
    return
  fi
  say "installing unigen$extras (a few minutes the first time)"
  local options=(--quiet --constraint constraints.txt)
  # Without an NVIDIA driver the CPU build of torch is enough (and ten times smaller). PyTorch's own index has it; where that
  # cannot be reached, pip takes what its other sources have.
  if ! has torch; then
    if ! nvidia-smi >/dev/null 2>&1 && [ "$(uname -s)" = Linux ] && cpu_index_answers; then
      "$venv/bin/pip" install "${options[@]}" --index-url "$CPU_INDEX" torch || true
    fi
  fi
  "$venv/bin/pip" install "${options[@]}" --editable ".$extras" 2> >(grep -v 'is ignored: it is neither a file' >&2)
  echo "$wanted" >"$stamp"
}

CPU_INDEX=https://download.pytorch.org/whl/cpu
cpu_index_answers() {
  "$venv/bin/python" - "$CPU_INDEX/torch/" <<'PY' 2>/dev/null
import sys
import urllib.request

urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="HEAD"), timeout=5)
PY
}
