"""What the READMEs tell people to type exists: commands parse, Python lines run, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import danlu
from danlu.cli import build_app
from danlu.recipe.quickstart import RECIPE
from danlu.recipe.run import read_recipe
from danlu.verbs import VERBS, Verb

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", ROOT / "README.zh.md"]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.S | re.M)


def commands(path: Path) -> list[str]:
    """Every danlu command in the bash blocks, without its comments."""
    lines = [line for block in blocks(path, "bash") for line in block.splitlines()]
    parts = [part.strip() for line in lines if not line.startswith("#") for part in line.split("&&")]
    return [part for part in parts if part.startswith("danlu ")]


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_commands_exist(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pretrain.yaml").write_text("data: data\ntokenizer: tokenizer\nout: base\n")
    ran: list[str] = []
    monkeypatch.setattr(Verb, "function", lambda verb: lambda config: ran.append(verb.name))
    for line in commands(path):
        words = shlex.split(line)[1:]
        build_app(words)(words, standalone_mode=False)  # raises on options that do not exist and values that cannot be
    assert len(ran) == len(commands(path)) > 8
    assert {"quickstart", "data build", "tokenizer train", "pretrain", "finetune", "evaluate", "chat", "report"} <= set(
        ran
    )


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_python_lines_run(path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    from danlu import config as configs

    made: list[object] = []

    def record(config: object) -> Path:
        made.append(configs.validate(config))
        return Path(str(getattr(config, "out", "")))

    for verb in VERBS:
        monkeypatch.setitem(vars(danlu), verb.run.partition(":")[2], record)
    for block in blocks(path, "python"):
        if "smollm2" in block:
            request.getfixturevalue("smollm2")  # skips where it cannot be fetched
        exec(compile(block, str(path), "exec"), {})
    assert len(made) >= 3


def test_every_verb_stands_in_both_readmes() -> None:
    for path in READMES:
        text = path.read_text(encoding="utf-8")
        assert [verb.name for verb in VERBS if f"`danlu {verb.name}`" not in text] == []


def test_both_readmes_have_the_same_commands() -> None:
    english, chinese = map(commands, READMES)
    assert english == chinese


@pytest.mark.parametrize("path", [*READMES, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []


def test_the_recipe_the_readme_points_to_can_be_copied_and_run(tmp_path: Path) -> None:
    copy = tmp_path / "my-recipe.yaml"
    copy.write_text(RECIPE.read_text(encoding="utf-8"), encoding="utf-8")
    stages = read_recipe(copy, ("corpus=texts", "pretrain_minutes=10"))
    assert {stage.name: stage.config for stage in stages}["base"].minutes == 10
