# The commands of daily work. Each calls a script that also runs without make.

.PHONY: setup test lint format docs notebooks ci

setup:  ## make .venv with all that development needs, and install the git hooks
	bash -euo pipefail -c '. scripts/lib.sh; install "[dev]"'
	.venv/bin/pre-commit install

test:  ## the fast tests; make test ARGS="tests/test_cli.py -k chat"
	scripts/test.sh $(ARGS)

lint:  ## ruff and mypy
	scripts/lint.sh

format:  ## let ruff rewrite the files
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

docs:  ## the site, into site/
	scripts/docs.sh

notebooks:  ## run the notebooks of examples/ and keep what their cells show
	.venv/bin/jupyter execute --inplace examples/*.ipynb

ci:  ## everything that must hold before a change is merged
	.ci/run
