#!/usr/bin/env bash
# The main job from a fresh clone: makes .venv, installs, lets the shipped model draw, look and tell, and writes
# quickstart/index.html.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

install ""
.venv/bin/python scripts/quickstart.py "$@"
