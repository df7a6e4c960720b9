"""Cards and stages: finished work is not done again, interrupted work goes on, and nobody's folder is emptied."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from danlu.config import option
from danlu.errors import DanluError
from danlu.formats.card import CARD, RUN, Card, Stage, fingerprint_of


@dataclass(frozen=True)
class Config:
    steps: int = option(10, "Steps.")
    out: str = option("out", "Output.", affects_result=False)


def start(
    out: Path, config: Config | None = None, inputs: dict[str, Path] | None = None, overwrite: bool = False
) -> Stage:
    return Stage.open(out, kind="model", verb="train", config=config or Config(), inputs=inputs, overwrite=overwrite)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A finished folder."""
    stage = start(tmp_path / "model")
    (stage.out / "model.bin").write_text("weights")
    (stage.out / "checkpoints").mkdir()
    stage.finish({"loss": 1.5}, {"device": "cpu"})
    return stage.out


def test_a_finished_stage_is_recognised(made: Path) -> None:
    again = start(made)
    assert again.finished
    assert not again.resumed
    assert again.card.metrics == {"loss": 1.5}
    assert not (made / RUN).exists()


def test_the_card_tells_what_how_and_with_what(made: Path) -> None:
    card = Card.load(made)
    assert (card.kind, card.verb, card.config["steps"], card.details) == ("model", "train", 10, {"device": "cpu"})
    assert card.files["model.bin"]["bytes"] == len("weights")
    assert set(card.files) == {"model.bin"}
    assert {"python", "danlu"} <= set(card.versions)
    assert Card.from_dict(json.loads((made / CARD).read_text())) == card


def test_an_option_that_does_not_affect_the_result_does_not_undo_it(made: Path) -> None:
    assert start(made, replace(Config(), out="elsewhere")).finished


def test_an_interrupted_stage_goes_on(tmp_path: Path) -> None:
    first = start(tmp_path / "model")
    (first.out / "checkpoint").write_text("half way")
    second = start(tmp_path / "model")
    assert second.resumed
    assert not second.finished
    assert (second.out / "checkpoint").read_text() == "half way"


def test_an_abandoned_stage_leaves_the_folder_free(tmp_path: Path) -> None:
    start(tmp_path / "model").abandon()
    assert not start(tmp_path / "model", Config(steps=11)).resumed


@pytest.mark.parametrize("finished", [True, False])
def test_another_run_is_refused_and_replaced_only_when_asked(tmp_path: Path, finished: bool) -> None:
    stage = start(tmp_path / "model")
    (stage.out / "old").write_text("x")
    (stage.out / "checkpoints").mkdir()
    if finished:
        stage.finish()
    with pytest.raises(DanluError, match=r"holds another run .* replace it with --overwrite"):
        start(tmp_path / "model", Config(steps=11))
    assert (stage.out / "old").exists()
    fresh = start(tmp_path / "model", Config(steps=11), overwrite=True)
    assert not fresh.finished
    assert not fresh.resumed
    assert [p.name for p in fresh.out.iterdir()] == [RUN]


def test_overwrite_does_not_undo_the_same_result(made: Path) -> None:
    assert start(made, overwrite=True).finished
    assert (made / "model.bin").exists()


def test_overwrite_unlinks_links_and_leaves_what_they_point_to(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    stage = start(tmp_path / "model")
    (stage.out / "link").symlink_to(precious)
    start(tmp_path / "model", Config(steps=11), overwrite=True)
    assert (precious / "thesis.txt").exists()


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_strangers_folder_is_never_emptied(tmp_path: Path, overwrite: bool) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("x")
    with pytest.raises(DanluError, match=r"is not empty \(thesis.txt, ...\) and was not made by danlu"):
        start(home, overwrite=overwrite)
    assert [p.name for p in home.iterdir()] == ["thesis.txt"]


def test_a_changed_input_makes_it_another_run(tmp_path: Path) -> None:
    data = tmp_path / "data.txt"
    data.write_text("one")
    start(tmp_path / "model", inputs={"data": data}).finish()
    assert start(tmp_path / "model", inputs={"data": data}).finished
    data.write_text("two")
    with pytest.raises(DanluError, match="other config or inputs"):
        start(tmp_path / "model", inputs={"data": data})


def test_the_lineage_outlives_the_inputs(tmp_path: Path, made: Path) -> None:
    child = start(tmp_path / "child", inputs={"model": made})
    child.finish()
    grandchild = start(tmp_path / "grandchild", inputs={"model": child.out})
    grandchild.finish()
    nested = Card.load(grandchild.out).inputs[0]
    assert nested.card is not None
    assert nested.fingerprint == Card.load(child.out).fingerprint
    assert nested.card["inputs"][0]["card"]["metrics"] == {"loss": 1.5}


def test_what_comes_from_elsewhere_is_known_by_names_and_contents(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.txt").write_text("a")
    before = fingerprint_of(folder)
    assert fingerprint_of(folder) == before
    (folder / "sub" / "a.txt").rename(folder / "sub" / "b.txt")
    renamed = fingerprint_of(folder)
    (folder / "sub" / "b.txt").write_text("b")
    assert len({before, renamed, fingerprint_of(folder)}) == 3


@pytest.mark.parametrize("field", ["kind", "config", "metrics", "details", "files", "seconds", "inputs"])
def test_a_card_of_the_wrong_shape_is_told(made: Path, field: str) -> None:
    content = json.loads((made / CARD).read_text())
    content[field] = None
    (made / CARD).write_text(json.dumps(content))
    with pytest.raises(DanluError, match="is not a danlu card"):
        Card.load(made)


@pytest.mark.parametrize("content", ["[]", "{}", "3", '{"kind": "model"}', '{"inputs": [{"no": 1}]}', "{"])
def test_a_broken_card_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / CARD).write_text(content)
    with pytest.raises(DanluError, match=CARD):
        Card.load(tmp_path)


def test_missing_things_are_told(tmp_path: Path) -> None:
    with pytest.raises(DanluError, match="was not made by danlu or is not finished"):
        Card.load(tmp_path)
    with pytest.raises(DanluError, match="does not exist"):
        start(tmp_path / "model", inputs={"data": tmp_path / "nothing"})
    assert not (tmp_path / "model").exists()


def test_a_broken_run_marker_is_told(tmp_path: Path) -> None:
    (tmp_path / RUN).write_text("[1]")
    with pytest.raises(DanluError, match="holds another run"):
        start(tmp_path)


def test_a_result_that_lost_a_file_is_not_taken_for_finished(made: Path) -> None:
    (made / "model.bin").write_text("cut")
    with pytest.raises(DanluError, match=r"model\.bin: is missing or was changed"):
        start(made)
    assert (made / "model.bin").exists()  # perhaps the user's own change: nothing is deleted unasked
    again = start(made, overwrite=True)
    assert not again.finished
    assert not (made / "model.bin").exists()
