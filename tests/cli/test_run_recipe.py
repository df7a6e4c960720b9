"""Recipes: everything is checked before anything runs, stages feed each other, finished ones are skipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from danlu.errors import DanluError, Problems
from danlu.formats.card import CARD, RUN, Card
from danlu.recipe.config import RunConfig
from danlu.recipe.run import RECIPES, find_recipe, read_recipe, run_recipe


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model folder to pull from."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen3"}')
    return tmp_path


def write(text: str, name: str = "recipe.yaml") -> Path:
    Path(name).write_text(text)
    return Path(name)


CHAIN = """
vars:
  source: ./model
  place: runs
stages:
  - verb: pull
    with: {source: "${source}", out: "${place}/first"}
  - name: second
    verb: pull
    with: {source: "${stages.pull}", out: "${place}/second"}
  - name: last
    verb: pull
    with:
      source: ${stages.second}
      out: ${place}/last
"""


def test_stages_feed_each_other(folder: Path) -> None:
    assert run_recipe(RunConfig(write(CHAIN))) == Path("runs/last")
    card = Card.load("runs/last")
    assert card.inputs[0].path == "runs/second"
    assert card.inputs[0].card is not None
    assert card.inputs[0].card["inputs"][0]["path"] == "runs/first"


def test_those_that_come_along_are_known_by_name(folder: Path) -> None:
    assert find_recipe(Path("reasoning")) == RECIPES / "reasoning.yaml"
    for file in RECIPES.glob("*.yaml"):
        assert file.stem in str(RunConfig.__dataclass_fields__["recipe"].metadata)
    own = write(CHAIN, "reasoning")
    assert find_recipe(own) == own
    with pytest.raises(DanluError, match=r"reason: no such file; .* are distil-classify, quickstart, reasoning"):
        run_recipe(RunConfig(Path("reason")))


def test_finished_stages_are_skipped_and_said_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write(CHAIN)
    run_recipe(RunConfig(recipe, until="second"))
    assert not Path("runs/last").exists()
    made = (Path("runs/first") / CARD).read_text()
    capsys.readouterr()
    run_recipe(RunConfig(recipe))
    told = capsys.readouterr().err
    assert "pull: was finished already, skipped (runs/first)" in told
    assert "second: was finished already, skipped (runs/second)" in told
    assert "last: done in" in told
    assert (Path("runs/first") / CARD).read_text() == made


def test_vars_are_given_anew_on_the_command_line(folder: Path) -> None:
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text("{}")
    assert run_recipe(RunConfig(write(CHAIN), ("place=elsewhere", "source=./other"))) == Path("elsewhere/last")
    assert (Path("elsewhere/last") / "config.json").read_text() == "{}"


def test_a_var_keeps_its_type_and_may_use_the_vars_above_it(folder: Path) -> None:
    recipe = write(
        """
vars: {name: demo, out: "runs/${name}", fresh: true, version: "1.10", steps: 3}
stages:
  - {verb: pull, with: {source: ./model, out: "${out}", overwrite: "${fresh}"}}
  - {verb: pull, name: b, with: {source: "./${version}-$${x}-${steps}", out: b, overwrite: "${fresh}"}}
"""
    )
    first, second = read_recipe(recipe)
    assert (first.config.out, first.config.overwrite) == (Path("runs/demo"), True)
    assert second.config.source == "./1.10-${x}-3"
    # A text stays a text, a switch stays a switch.
    first, second = read_recipe(recipe, ("version=2.0", "fresh=false", "steps=007"))
    assert (first.config.overwrite, second.config.source) == (False, "./2.0-${x}-7")


def test_everything_wrong_is_told_before_anything_runs(folder: Path) -> None:
    recipe = write(
        """
vars: {place: runs, corpus: }
extra: 1
stages:
  - verb: pull
    with: {source: ./model, out: "${place}/first"}
  - name: second
    verb: pul
  - verb: show
    with: {folder: "${stages.third}", jsn: true}
    when: never
  - name: pull
    verb: pull
    with: {out: "${place}/first", overwrite: maybe, source: "${palce}"}
  - name: fourth
    verb: show
    with: {folder: "${stages.show}"}
  - just text
  - {verb: run, with: {recipe: recipe.yaml}}
  - {name: "a b", verb: pull}
  - {name: fifth, verb: pull, with: {source: ./model, out: runs/first}}
"""
    )
    with pytest.raises(Problems) as caught:
        run_recipe(RunConfig(recipe, ("minutes=3",)))
    told = str(caught.value)
    for expected in (
        "unknown key 'extra'",
        "'minutes=3' sets no var of this recipe; its vars are place, corpus",
        "vars: corpus: has no value; give one as corpus=...",
        "line 7, stage 'second': verb 'pul' cannot be a stage; the verbs are",
        "line 9, stage 'show': ${stages.third}: there is no earlier stage of this name; there are place, corpus, ",
        "line 9, stage 'show': unknown key 'jsn'; did you mean 'json'?",
        "line 9, stage 'show': unknown key 'when'; a stage has name, verb and with",
        "line 12, stage 'pull': another stage has the same name",
        "line 12, stage 'pull': overwrite: 'maybe' is not true or false",
        "line 12, stage 'pull': ${palce}: there is no var of this name",
        "line 15, stage 'fourth': ${stages.show}: that stage makes no folder",
        "line 18, stage 'just text': must be a mapping with a verb",
        "line 19, stage 'run': verb 'run' cannot be a stage",
        "line 20, stage 'a b': name 'a b' must be made of letters",
        "line 21, stage 'fifth': out: runs/first is the output of stage 'pull'",
    ):
        assert expected in told
    assert len(caught.value.problems) == 15
    assert not Path("runs").exists()


@pytest.mark.parametrize("text", ["", "stages:", "stages: {}", "stages: []", "stages: pull", "vars: [1]\nstages: 3"])
def test_a_recipe_without_stages(folder: Path, text: str) -> None:
    with pytest.raises(Problems, match="stages: must be a list of at least one stage"):
        read_recipe(write(text))


@pytest.mark.parametrize("value", ["../x", "{a: 1}", "[1, 2]", "${oops"])
def test_vars_of_any_shape_are_values_never_code(folder: Path, value: str) -> None:
    recipe = write("vars: {v: x}\nstages:\n  - {verb: pull, with: {source: '${v}'}}\n")
    assert read_recipe(recipe, (f"v={value}",))[0].config.source == value


def test_an_unknown_stage_to_stop_after(folder: Path) -> None:
    with pytest.raises(DanluError, match="has no stage 'third'; its stages are pull, second, last"):
        run_recipe(RunConfig(write(CHAIN), until="third"))
    assert not Path("runs").exists()


def test_a_failing_stage_stops_the_recipe(folder: Path) -> None:
    (folder / "runs" / "second").mkdir(parents=True)
    (folder / "runs" / "second" / "thesis.txt").write_text("x")
    with pytest.raises(DanluError, match="runs/second: is not empty"):
        run_recipe(RunConfig(write(CHAIN)))
    assert Path("runs/first").exists()
    assert not Path("runs/last").exists()


def test_a_stage_that_was_stopped_stops_the_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training that is stopped by Ctrl-C saves and returns; the next stage must not start from half a model."""

    def stopped(config: object) -> None:
        Path("runs/second").mkdir()
        (Path("runs/second") / RUN).write_text("{}")

    import danlu.hub.pull

    real = danlu.hub.pull.pull
    monkeypatch.setattr(danlu.hub.pull, "pull", lambda c: stopped(c) if c.out == Path("runs/second") else real(c))
    with pytest.raises(DanluError, match="stage 'second' was stopped before it was finished"):
        run_recipe(RunConfig(write(CHAIN)))
    assert not Path("runs/last").exists()


def test_a_recipe_over_real_data(folder: Path) -> None:
    """A corpus to a data folder, by the verbs themselves."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for index in range(30):
        words = " ".join(f"Word{index}x{number} stands beside its neighbour." for number in range(40))
        (corpus / f"{index}.txt").write_text(f"Chapter {index}.\n\n{words}\n")
    recipe = write(
        yaml.safe_dump(
            {
                "vars": {"corpus": "corpus", "heldout": 0.2},
                "stages": [
                    {
                        "verb": "data build",
                        "with": {
                            "corpus": ["${corpus}"],
                            "out": "runs/data",
                            "heldout": "${heldout}",
                            "filters": ["length"],
                        },
                    },
                    {"verb": "show", "with": {"folder": "${stages.data-build}", "json": True}},
                ],
            }
        )
    )
    assert run_recipe(RunConfig(recipe)) is None  # the last stage makes no folder
    card = json.loads((Path("runs/data") / CARD).read_text())
    assert card["kind"] == "data"
    assert card["config"]["heldout"] == 0.2
