"""Every family against its reference, each row with the mistake that must show."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from scripts.parity import family_names


@pytest.mark.parametrize("family", family_names())
def test_parity(family: str, tmp_path: Path) -> None:
    case = importlib.import_module(f"tests.parity.{family}")
    case.checkpoint(tmp_path)
    rows = list(case.rows(tmp_path))
    assert rows
    assert [row for row in rows if not row.passed and not row.skip_reason] == []
