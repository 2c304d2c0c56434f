#!/usr/bin/env bash
# The test suite from a fresh clone: makes .venv, installs what the tests need, runs them.
#   scripts/test.sh                   the fast tests
#   scripts/test.sh --slow            the slow ones too
#   scripts/test.sh --serve           those that need vLLM, in .venv-serve (scripts/install_serve.sh), and nothing else
#   scripts/test.sh --processors      those that train or compare sums, as on two other kinds of processors, and nothing else
#   scripts/test.sh tests/test_cli.py -k chat       anything else goes to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

if [ "${1:-}" = --serve ]; then
  scripts/install_serve.sh
  exec .venv-serve/bin/python -m pytest -q -m serve tests/serving "${@:2}"
fi

install "[dev]"

# The rendered scenes are drawn with the system's emoji font; tests that need it skip themselves without it.
if ! .venv/bin/python -c 'from unigen.toyworld.world import find_font; find_font()' >/dev/null 2>&1; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing the emoji font (apt: fontconfig, fonts-noto-color-emoji)"
    { apt-get update -qq && apt-get install -y -qq fontconfig fonts-noto-color-emoji; } >/dev/null 2>&1 ||
      say "apt could not install the font: the tests that render scenes are left out"
  else
    say "no Noto Color Emoji font: the tests that render scenes are left out."
    say "  Debian, Ubuntu: sudo apt-get install fontconfig fonts-noto-color-emoji; Fedora: google-noto-emoji-color-fonts"
  fi
fi

if [ "${1:-}" = --processors ]; then
  numeric=(tests/nn tests/generators tests/tokenizers tests/parity tests/test_engine.py tests/test_connector.py tests/test_classes.py)
  say "as on a processor without AVX, one thread a process"
  OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41 \
    .venv/bin/python -m pytest -q -n 2 "${numeric[@]}" "${@:2}"
  say "as on a processor with AVX2, two threads"
  OMP_NUM_THREADS=2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 \
    exec .venv/bin/python -m pytest -q "${numeric[@]}" "${@:2}"
fi

options=()
for argument in "$@"; do
  if [ "$argument" = --slow ]; then options+=(-m "not serve"); else options+=("$argument"); fi
done
# One process a core, and one thread a process: faster than many threads on small tensors.
cores=$(.venv/bin/python -c 'import os; print(min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))')
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} exec .venv/bin/python -m pytest -q -n "$cores" ${options[@]+"${options[@]}"}
