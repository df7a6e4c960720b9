"""Configs: what goes in comes out, everything wrong is told at once, nothing is guessed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from danlu import config as configs
from danlu.config import REQUIRED, fingerprint, load, option, to_dict, validate
from danlu.errors import DanluError, Problems


@dataclass(frozen=True)
class Config:
    data: Path = option(REQUIRED, "Data folder.")
    lr: float = option(0.02, "Learning rate.", gt=0, le=1)
    steps: int = option(10, "Steps.", unit="steps", ge=1)
    seed: int = option(0, "Seed.", ge=0, lt=2**63)
    fast: bool = option(False, "Faster.")
    schedule: Literal["wsd", "cosine"] = option("wsd", "Schedule.")
    note: str = option("", "Remark.")
    revision: str | None = option(None, "Revision.")
    limit: int | None = option(None, "Limit.", ge=0)
    names: tuple[str, ...] = option((), "Names.")
    betas: tuple[float, ...] = option((0.9, 0.95), "Betas.", ge=0, lt=1)
    weights: dict[str, float] = option({}, "Weights.")
    out: Path = option(Path("out"), "Output.", affects_result=False)

    def problems(self) -> list[str]:
        return ["limit: is less than steps"] if self.limit is not None and self.limit < self.steps else []


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=20)
paths = texts.filter(lambda t: t and "\0" not in t and not t.startswith("~")).map(Path)
valid_configs = st.builds(
    Config,
    data=paths,
    lr=st.floats(1e-9, 1),
    steps=st.integers(1, 1000),
    seed=st.integers(0, 2**63 - 1),
    fast=st.booleans(),
    schedule=st.sampled_from(["wsd", "cosine"]),
    note=texts,
    revision=st.none() | texts,
    limit=st.none() | st.integers(1000, 10**12),
    names=st.lists(texts, max_size=4).map(tuple),
    betas=st.lists(st.floats(0, 0.999), max_size=3).map(tuple),
    weights=st.dictionaries(texts, st.floats(0, 1e6), max_size=3),
    out=paths,
)


@given(valid_configs)
def test_a_config_survives_dict_json_and_yaml(config: Config) -> None:
    plain = to_dict(config)
    assert load(Config, values=plain) == config
    assert load(Config, values=json.loads(json.dumps(plain))) == config
    assert load(Config, values=yaml.safe_load(yaml.safe_dump(plain, allow_unicode=True))) == config
    assert validate(config) == config


@given(valid_configs)
def test_a_config_survives_the_command_line(config: Config) -> None:
    """Scalars written as `key=value` give the same config: no text turns into a number on the way."""
    scalars = {k: v for k, v in to_dict(config).items() if isinstance(v, (str, int, float)) or v is None}
    typed = {key: str(value).lower() if isinstance(value, bool) else value for key, value in scalars.items()}
    overrides = [f"{key}={value}" for key, value in typed.items() if value is not None]
    rest = {key: getattr(config, key) for key in to_dict(config) if key not in scalars}
    assert load(Config, overrides=overrides, values=rest) == config


@pytest.mark.parametrize(
    "text", ["1.10", "yes", "null", "1e3", "a: b", "[x]", "'q'", "0123", "2026-01-01", "{", "a=b", ""]
)
def test_a_text_given_on_the_command_line_is_taken_as_it_stands(text: str) -> None:
    assert load(Config, overrides=["data=d", f"note={text}"]).note == text
    assert load(Config, overrides=["data=d", f"revision={text}"]).revision == text
    if text:
        assert load(Config, overrides=[f"data={text}"]).data == Path(text)


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("lr: -1\nsteps: 2.5\nscedule: wsd\nfast: 1\n")
    with pytest.raises(Problems) as caught:
        load(Config, file=file, overrides=["schedule=wds", "nonsense", "betas=[0.5, 1.5]"], values={"limit": True})
    told = "\n".join(caught.value.problems)
    for expected in (
        "data is missing",
        "lr: -1 is too small; more than 0",
        "steps: 2.5 is not a whole number",
        "unknown key 'scedule'; did you mean 'schedule'?",
        "fast: 1 is not true or false",
        "'wds' is not one of wsd, cosine; did you mean 'wsd'?",
        "'nonsense' is not an override",
        "betas: 1.5 is too large; less than 1",
        "limit: True is not a whole number",
    ):
        assert expected in told
    assert len(caught.value.problems) == 9
    assert f"{file}: steps" in told  # where it came from


def test_checks_between_fields_run_when_the_fields_are_right() -> None:
    with pytest.raises(Problems, match="limit: is less than steps"):
        load(Config, values={"data": "d", "limit": 3, "steps": 4})


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("data: from-file\nsteps: 1\nseed: 1\nnote: file\n")
    config = load(Config, file=file, overrides=["seed=2", "note=override"], values={"note": "value"})
    assert (str(config.data), config.steps, config.seed, config.note, config.lr) == ("from-file", 1, 2, "value", 0.02)


@pytest.mark.parametrize("key", ["steps", "lr", "limit", "seed"])
@pytest.mark.parametrize(
    "value",
    [
        *(True, False, math.nan, math.inf, -math.inf, "nan", "inf", "x", [1], {"a": 1}),
        *(pytest.param("1" * 400, id="long text"), pytest.param(10**400, id="10**400")),
    ],
)
def test_numbers_are_numbers(key: str, value: Any) -> None:
    """True is not 1; nan and inf are never meant; whole numbers of hundreds of digits are refused, not a crash."""
    with pytest.raises(Problems):
        load(Config, values={"data": "d", key: value})


def test_large_whole_numbers_stay_exact() -> None:
    largest = 2**63 - 1  # as a float it would be 2**63
    assert load(Config, overrides=["data=d", f"seed={largest}"]).seed == largest
    assert load(Config, values={"data": "d", "seed": str(largest)}).seed == largest
    assert load(Config, values={"data": "d", "steps": "1e3"}).steps == 1000


@pytest.mark.parametrize("value", [1, 0, "true", "yes", None])
def test_a_switch_takes_true_and_false_only(value: Any) -> None:
    with pytest.raises(Problems, match="is not true or false"):
        load(Config, values={"data": "d", "fast": value})


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a: 1\nb: [1, 2\nc: 3\n", r"c\.yaml:3: is not valid YAML"),
        (b"a: 1\n\tb: 2\n", r"c\.yaml:2: is not valid YAML"),
        (b"data: \xff\xfe\n", r"c\.yaml: is not UTF-8 text"),
        (b"- 1\n", r"must hold a mapping"),
        (b"1: x\n", r"must hold a mapping"),
        (b"data: !!python/object/apply:os.system [echo hi]\n", r"c\.yaml:1: is not valid YAML"),
    ],
)
def test_a_broken_file_is_told_with_its_line(tmp_path: Path, content: bytes, told: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    with pytest.raises(DanluError, match=told):
        load(Config, file=file)


def test_a_missing_file_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(DanluError, match="cannot be read"):
        load(Config, file=tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load(Config, file=tmp_path / "empty.yaml", values={"data": "d"}).steps == 10


@given(valid_configs, valid_configs)
def test_the_fingerprint_tells_configs_apart_by_what_affects_the_result(one: Config, other: Config) -> None:
    def result(config: Config) -> dict[str, Any]:
        return {key: value for key, value in to_dict(config).items() if key != "out"}

    assert (fingerprint(one) == fingerprint(other)) == (result(one) == result(other))
    assert fingerprint(one) != fingerprint(one, "another input")


def test_a_field_of_a_type_that_cannot_be_read_is_the_programmers_mistake() -> None:
    @dataclass(frozen=True)
    class Odd:
        when: complex = option(1j, "Odd.")

    with pytest.raises(TypeError):
        configs.load(Odd, values={"when": "1j"})
