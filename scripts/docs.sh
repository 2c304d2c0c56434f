#!/usr/bin/env bash
# The site, into site/, in the environment of scripts/test.sh. Stops at a broken link and at a name that is not there.
set -euo pipefail
cd "$(dirname "$0")/.."
NO_MKDOCS_2_WARNING=1 exec .venv/bin/mkdocs build --clean "$@"
