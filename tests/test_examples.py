"""The notebooks of `examples/` run from top to bottom, and what is committed of their outputs is small and no error.

Run: pytest tests/test_examples.py
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
MAX_BYTES = 200_000
"""All notebooks together."""


def run_notebook(notebook: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run all cells in a new kernel of this Python, in the folder. An error in a cell is raised."""
    nbclient = pytest.importorskip("nbclient", reason="notebooks are run with nbclient and ipykernel: the extra dev")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    cells = nbformat.reads(json.dumps(notebook), as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    handler = signal.getsignal(signal.SIGINT)
    try:
        nbclient.NotebookClient(cells, timeout=240, kernel_name="python3", resources=resources).execute()
    finally:
        signal.signal(signal.SIGINT, handler)  # nbclient leaves the default, also where SIGINT was ignored


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_notebook(json.loads(path.read_text()), tmp_path, monkeypatch)


def test_a_notebook_that_fails_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": "1 / 0", "outputs": [], "execution_count": None}
    broken = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [cell]}
    with pytest.raises(Exception, match="ZeroDivisionError"):
        run_notebook(broken, tmp_path, monkeypatch)


def test_outputs_are_small_and_no_errors() -> None:
    assert len(NOTEBOOKS) == 2 and sum(path.stat().st_size for path in NOTEBOOKS) < MAX_BYTES
    for path in NOTEBOOKS:
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        outputs = [output for cell in cells for output in cell["outputs"]]
        assert len(outputs) >= len(cells) // 2 and all(output["output_type"] != "error" for output in outputs)
