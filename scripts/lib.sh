# What the scripts share; sourced from the repository's root, never run. bash, `set -euo pipefail` by the caller.

venv=${venv:-.venv} # where the project is installed

say() { printf '%s\n' "== $*"; }

# A Python that the project accepts: $PYTHON, else the newest of 3.12 and 3.11 that can make environments.
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.12 python3.11 python3 python}; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "unigen needs Python 3.11 or 3.12 with its venv module (on Debian and Ubuntu: apt-get install python3-venv)." >&2
  echo "Where it has another name: PYTHON=/path/to/python $0" >&2
  return 1
}

# has MODULE: the environment has it (looked up, not imported: that would take seconds).
has() { "$venv/bin/python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$1"; }

# install EXTRAS ("" or "[dev]"): $venv with the project in it; does nothing when nothing changed since the last time.
install() {
  local extras=$1 stamp="$venv/.installed${1//[^a-z]/-}" wanted python
  if [ ! -x "$venv/bin/python" ]; then
    say "making $venv"
    python=$(find_python)
    "$python" -m venv "$venv"
  fi
  wanted=$(cat pyproject.toml constraints.txt | "$venv/bin/python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
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
