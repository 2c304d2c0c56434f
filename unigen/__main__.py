"""`python -m unigen` is `unigen`."""

from unigen.cli import run

run()
