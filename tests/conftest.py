"""Fixtures that several test files share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # recipes and scripts are imported from the repository's root
    sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def emoji_font() -> Path:
    """The system's emoji font; the test is left out where it is missing."""
    from unigen.data.world import find_font

    try:
        return find_font()
    except ValueError as error:
        pytest.skip(str(error))
