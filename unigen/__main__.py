"""`python -m unigen` is `unigen`."""

from unigen.commands.main import run

run()
