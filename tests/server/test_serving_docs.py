"""What docs/serving.md tells people to type is run as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from danlu.cli import build_app

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
OPTIONS = sorted(set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", TEXT)))
OTHERS = {"help", "config", "entrypoint", "no-install-recommends", "no-cache-dir", "create-home"}
"""Options of other programs, and of every verb."""


@pytest.mark.parametrize(
    "code", PYTHON, ids=[re.findall(r"from (\w+)", code)[0] + str(i) for i, code in enumerate(PYTHON)]
)
def test_the_clients(code: str, smollm2_url: str) -> None:
    code = code.replace("http://127.0.0.1:8000", smollm2_url)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_options_exist() -> None:
    verbs = (["serve"], ["keys", "create"], ["keys", "usage"])
    parameters = [parameter for words in verbs for parameter in _parameters(words)]
    known = {option.lstrip("-") for one in parameters for option in (*one.opts, *one.secondary_opts)}
    assert [option for option in OPTIONS if option not in known | OTHERS] == []


def _parameters(words: list[str]) -> list[Any]:
    command: Any = typer.main.get_command(build_app(words))
    for word in words:
        command = command.commands[word]
    return list(command.params)
