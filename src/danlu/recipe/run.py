"""`danlu run`: the stages of a recipe, one after the other, each checked before the first one starts.

A recipe is a YAML file::

    vars:                               # given anew on the command line: danlu run small.yaml minutes=10
      minutes: 3
      corpus:                           # no value: has to be given
    stages:
      - verb: data build                # name: the verb with dashes, unless `name:` says otherwise
        with: {corpus: "${corpus}", out: runs/data}
      - name: tok
        verb: tokenizer train
        with: {data: "${stages.data-build}", out: runs/tok}
      - verb: pretrain
        with: {data: "${stages.data-build}", tokenizer: "${stages.tok}", out: runs/model, minutes: "${minutes}"}

``${name}`` is a var, ``${stages.name}`` the output folder of an earlier stage; ``$${`` stands for ``${`` itself. Paths
are relative to the working directory. A stage whose output is already there (same config, same inputs) is skipped.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from danlu import config as configs
from danlu.console import note
from danlu.errors import DanluError, Problems
from danlu.formats.card import CARD, RUN, Card, card_if_any
from danlu.recipe.config import RunConfig
from danlu.verbs import VERB_BY_NAME, Verb

_REFERENCE = re.compile(r"\$(\$\{)|\$\{([^}]*)\}")
_NAME = re.compile(r"[A-Za-z_][\w-]*")

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class RecipeStage:
    """One stage, checked: ``config`` is an instance of the verb's config dataclass."""

    name: str
    verb: Verb
    config: Any

    @property
    def out(self) -> Path | None:
        """The folder or file it makes, if its verb makes one."""
        out = getattr(self.config, "out", None)
        return out if isinstance(out, Path) else None


def find_recipe(recipe: Path) -> Path:
    """The file itself, or that of a recipe that comes with danlu, by its name.

    Raises:
        DanluError: there is neither.
    """
    if recipe.exists():
        return recipe
    own = {file.stem: file for file in sorted(RECIPES.glob("*.yaml"))}
    if str(recipe) not in own:
        raise DanluError(f"{recipe}: no such file; the recipes that come with danlu are {', '.join(own)}")
    return own[str(recipe)]


def run_recipe(config: RunConfig) -> Path | None:
    """Run a recipe's stages and return the last one's output.

    Raises:
        Problems: everything wrong with the recipe and with each stage's config, before anything runs.
        DanluError: a stage failed, or was stopped before it was finished.
    """
    config = configs.validate(config)
    stages = read_recipe(find_recipe(config.recipe), config.overrides)
    if config.until is not None:
        names = [stage.name for stage in stages]
        if config.until not in names:
            raise DanluError(f"{config.recipe}: has no stage {config.until!r}; its stages are {', '.join(names)}")
        stages = stages[: names.index(config.until) + 1]
    for number, stage in enumerate(stages, start=1):
        note(f"[{number}/{len(stages)}] {stage.name}: danlu {stage.verb.name}")
        _run(stage)
    return stages[-1].out


def _run(stage: RecipeStage) -> None:
    before = _card(stage.out)
    started = time.monotonic()
    stage.verb.function()(stage.config)
    out, after = stage.out, _card(stage.out)
    if out is not None and after is None and (out / RUN).exists():
        raise DanluError(
            f"{out}: stage {stage.name!r} was stopped before it was finished; the same command goes on with it"
        )
    if before is not None and before == after:
        note(f"  {stage.name}: was finished already, skipped ({out})")
    else:
        note(f"  {stage.name}: done in {time.monotonic() - started:.1f} s{f' ({out})' if out else ''}")


def _card(out: Path | None) -> Card | None:
    return card_if_any(out) if out is not None and (out / CARD).exists() else None


def read_recipe(path: Path, overrides: tuple[str, ...] = ()) -> list[RecipeStage]:
    """Read and check a whole recipe.

    Args:
        overrides: ``name=value`` for its vars.

    Raises:
        Problems: all that is wrong, each with the line of its stage.
    """
    content = configs.read_yaml_mapping(path)
    problems = [
        f"unknown key {key!r}; a recipe holds vars and stages" for key in content if key not in ("vars", "stages")
    ]
    known = _read_vars(content.get("vars"), overrides, problems)
    listed = content.get("stages")
    if not isinstance(listed, list) or not listed:
        problems.append("stages: must be a list of at least one stage, each with a verb")
        listed = []
    stages: list[RecipeStage] = []
    lines = _stage_lines(path)
    for index, entry in enumerate(listed):
        found: list[str] = []
        stage = _read_stage(entry, known, found)
        if stage is not None:
            clash = next((other.name for other in stages if stage.out is not None and other.out == stage.out), None)
            if clash is not None:
                found.append(f"out: {stage.out} is the output of stage {clash!r}; each stage needs its own")
            stages.append(stage)
        name = entry.get("name", entry.get("verb")) if isinstance(entry, dict) else entry
        line = f"line {lines[index]}, " if len(lines) == len(listed) else ""
        problems += [f"{line}stage {name!r}: {text}" for text in found]
    if problems:
        raise Problems(f"{path}: cannot be run ({len(problems)} problem{'s'[: len(problems) > 1]}):", problems)
    return stages


def _read_vars(declared: Any, overrides: tuple[str, ...], problems: list[str]) -> dict[str, Any]:
    """The vars with their values; a var may refer to those above it."""
    if declared is None:
        declared = {}
    if not isinstance(declared, dict) or not all(isinstance(name, str) and _NAME.fullmatch(name) for name in declared):
        problems.append("vars: must be a mapping of names (letters, digits, - and _) to values")
        declared = {}
    given: dict[str, Any] = {}
    for text in overrides:
        name, separator, raw = text.partition("=")
        if not separator or name not in declared:
            there_are = f"its vars are {', '.join(declared)}" if declared else "it has no vars"
            problems.append(f"{text!r} sets no var of this recipe; {there_are}")
        elif isinstance(declared[name], str):
            given[name] = raw  # a text stays a text, even 1.10 or yes
        else:
            try:
                given[name] = yaml.safe_load(raw)
            except yaml.YAMLError:
                given[name] = raw
    known: dict[str, Any] = {}
    for name, value in declared.items():
        found: list[str] = []
        known[name] = given[name] if name in given else _fill_in(value, known, found)
        if value is None and name not in given:
            found.append(f"has no value; give one as {name}=...")
        problems += [f"vars: {name}: {text}" for text in found]
    return known


def _read_stage(entry: Any, known: dict[str, Any], problems: list[str]) -> RecipeStage | None:
    """Check one entry of `stages`; its output becomes known as ``stages.NAME``."""
    if not isinstance(entry, dict) or "verb" not in entry:
        problems.append("must be a mapping with a verb, and optionally name and with")
        return None
    problems += [
        f"unknown key {key!r}; a stage has name, verb and with" for key in entry if key not in ("name", "verb", "with")
    ]
    verb = VERB_BY_NAME.get(str(entry["verb"]))
    if verb is None or verb.name == "run":
        names = ", ".join(name for name in VERB_BY_NAME if name != "run")
        problems.append(f"verb {entry['verb']!r} cannot be a stage; the verbs are {names}")
        return None
    name = entry.get("name", verb.name.replace(" ", "-"))
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        problems.append(f"name {name!r} must be made of letters, digits, - and _")
        return None
    if f"stages.{name}" in known:
        problems.append("another stage has the same name; give this one a name of its own")
    given = entry.get("with") or {}
    if not isinstance(given, dict):
        problems.append("with: must be a mapping of the verb's options")
        return None
    values = {str(key): _fill_in(value, known, problems) for key, value in given.items()}
    # Known to later stages even if this one has problems, so that they are not blamed for them.
    known[f"stages.{name}"] = values.get("out")
    try:
        config = configs.load(verb.config_type(), values=values)
    except Problems as error:
        problems += error.problems
        return None
    stage = RecipeStage(name, verb, config)
    known[f"stages.{name}"] = str(stage.out) if stage.out is not None else None
    return stage


def _fill_in(value: Any, known: Mapping[str, Any], problems: list[str]) -> Any:
    """``value`` with its references replaced; a text that is one reference and nothing else keeps the var's type."""
    if isinstance(value, list):
        return [_fill_in(item, known, problems) for item in value]
    if isinstance(value, dict):
        return {key: _fill_in(item, known, problems) for key, item in value.items()}
    if not isinstance(value, str):
        return value

    def look_up(name: str) -> Any:
        if name not in known:
            kind = "no earlier stage" if name.startswith("stages.") else "no var"
            problems.append(f"${{{name}}}: there is {kind} of this name; there are {', '.join(known) or 'none'}")
        elif known[name] is None and name.startswith("stages."):
            problems.append(f"${{{name}}}: that stage makes no folder")
        found = known.get(name)
        return f"${{{name}}}" if found is None else found  # told once, not again as "None is not a path"

    whole = _REFERENCE.fullmatch(value)
    if whole is not None and whole[2] is not None:
        return look_up(whole[2])
    return _REFERENCE.sub(lambda match: "${" if match[1] else str(look_up(match[2])), value)


def _stage_lines(path: Path) -> list[int]:
    """Line of each stage in the file, counted from 1."""
    root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    listed = [value for key, value in pairs if key.value == "stages" and isinstance(value, yaml.SequenceNode)]
    return [item.start_mark.line + 1 for item in listed[-1].value] if listed else []
