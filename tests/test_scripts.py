"""The programs in scripts/ that are not shell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import bench, results
from unigen.config import write_report


def test_the_table_of_benches(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {"batch", "decode", "generate"} <= set(bench.benches()) and all(bench.benches().values())
    assert bench.main(["--help"]) == 0 and "decode" in capsys.readouterr().out
    assert bench.main(["nothing"]) == 2
    assert capsys.readouterr().err.strip().splitlines() == [
        "bench: error: no bench 'nothing'; there are: batch, decode, generate"
    ]
    assert bench.main(["decode", "--models", "huge"]) == 2


def test_results_are_written_from_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(results, "PAGE", tmp_path / "results.md")
    assert results.main() == 2
    (tmp_path / "runs").mkdir()
    rows = [
        {"name": "tiny guided", "value": 301.25, "unit": "tokens/s", "baseline": 100.0, "ratio": 3.0125, "batch": 1}
    ]
    write_report(
        tmp_path / "runs" / "decode.json", command="bench", model="m", overall=0.5, tasks={"a": 0.25}, rows=rows
    )
    assert results.main() == 0
    page = (tmp_path / "results.md").read_text()
    assert "Overall **0.500**" in page and "| 0.250 |" in page
    assert "| tiny guided | 301.2 | tokens/s | 100.0 | 3.013 | 1 |" in page


def test_ship_refuses_what_is_no_model(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(root / "scripts" / "ship.py"), str(tmp_path / "none"), "unigen-x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 2 and done.stderr.startswith("ship: error: unknown model")
