"""The folders that the report reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from report_cards import make_life


@pytest.fixture
def life(tmp_path: Path) -> Path:
    """See :func:`report_cards.make_life`."""
    return make_life(tmp_path / "life")
