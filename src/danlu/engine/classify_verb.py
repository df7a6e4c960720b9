"""`danlu classify`: label texts, or the words in them; JSON lines on standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danlu import console, files
from danlu.adapters.open import labeller_kind, open_adapted
from danlu.adapters.peft_config import is_adapter_folder
from danlu.config import validate
from danlu.data.corpus import ErrorPolicy, find_sources
from danlu.data.decoding import decode_lines, open_bytes
from danlu.data.labelled import Columns, objects, text_and_pair
from danlu.data.tagged import TABLES, entities, is_scheme, untagged_words, words_of
from danlu.engine.classify import classify_texts, tag_words
from danlu.engine.classify_config import ClassifyConfig
from danlu.errors import DanluError
from danlu.formats.card import card_if_any
from danlu.hardware import DTYPES, pick_device, pick_precision
from danlu.hub.pull import with_models
from danlu.models.family import family_for
from danlu.models.heads import SequenceClassifier, TokenClassifier
from danlu.models.load import load_model
from danlu.tokenizer.tokenizer import Tokenizer

TASKS: dict[str, type[SequenceClassifier] | type[TokenClassifier]] = {
    "sequence_classification": SequenceClassifier,
    "token_classification": TokenClassifier,
}


@dataclass(frozen=True)
class Given:
    """What is to be labelled: a text (or two), or words."""

    text: str
    pair: str | None = None
    words: tuple[str, ...] | None = None

    def fields(self) -> dict[str, Any]:
        """As it goes into the answer."""
        if self.words is not None:
            return {"tokens": list(self.words)}
        return {"text": self.text} if self.pair is None else {"text": self.text, "text2": self.pair}


def classify(config: ClassifyConfig) -> list[dict[str, Any]]:
    """Label texts, print a JSON object for each, and return these.

    Returns:
        For each text, with the text itself: ``label``, ``probability`` and ``probabilities`` of all labels; where
        several labels can hold, ``labels`` in place of the first two; of a regression ``value``; of a model that tags
        words ``entities`` (``label``, ``text``, ``start``, ``end`` in characters, or in words where words were given;
        ``probability`` of its least certain word), or ``tags`` where the tags mark no entities.

    Raises:
        DanluError: no text, a row that cannot be used, or a model without labels.
    """
    config = with_models(validate(config), "model")
    model, tokenizer = open_labeller(config.model, config.device, config.precision)
    is_tagger = isinstance(model, TokenClassifier)
    rows = list(_given(config, is_tagger))
    if not rows:
        raise DanluError("nothing to label: give --text TEXT, --file FILE, or lines on standard input")
    with console.progress("labelling", len(rows), "texts") as advance:
        if isinstance(model, TokenClassifier):
            answers = _tag(model, tokenizer, rows, config.batch_size)
            advance(len(rows))
        else:
            answers = _label(model, tokenizer, rows, config.batch_size, advance)
    found = [{**row.fields(), **answer} for row, answer in zip(rows, answers, strict=True)]
    for line in found:
        print(json.dumps(line, ensure_ascii=False), flush=True)
    return found


def open_labeller(folder: Path, device: str, precision: str) -> tuple[SequenceClassifier | TokenClassifier, Tokenizer]:
    """A model folder with labels, by what its `config.json` says it is, or an adapter folder with labels.

    Raises:
        DanluError: it has no labels.
    """
    card = card_if_any(folder) if folder.is_dir() else None
    if card is not None and card.kind not in ("model", "adapter"):
        raise DanluError(f"{folder}: is a {card.kind} folder; expected a model folder")
    place = pick_device(device)
    dtype = DTYPES[pick_precision(precision, place)]
    if is_adapter_folder(folder):
        labeller = labeller_kind(folder)
        if labeller is None:
            raise DanluError(f"{folder}: has no labels; it is an adapter that writes text")
        return open_adapted(folder, labeller, device=place, dtype=dtype, merged=True)
    path = folder / "config.json"
    content = files.read_json_object(path)
    family = family_for(content, str(path))
    names = [name for name in content.get("architectures") or () if isinstance(name, str)]
    tasks = [family.architectures.get(name, "") for name in names]
    kind = next((TASKS[task] for task in tasks if task in TASKS), None)
    if kind is None:
        raise DanluError(
            f"{folder}: has no labels (it is a {', '.join(names) or 'bare model'}); teach it some with: "
            "danlu finetune --task classify, or --task tag"
        )
    model = load_model(folder, kind, device=place, dtype=dtype)
    return model, Tokenizer.load(folder)


def _given(config: ClassifyConfig, is_tagger: bool) -> Iterator[Given]:
    if config.text is not None:
        yield Given(config.text, config.text2)
        return
    if config.file is None:
        if not sys.stdin.isatty():
            try:
                yield from (Given(line) for line in sys.stdin.buffer.read().decode().splitlines() if line.strip())
            except UnicodeDecodeError as error:
                raise DanluError(f"standard input: is not UTF-8 text (byte {error.start})") from error
        return
    columns, stop = Columns(config.text_column, config.text2_column), ErrorPolicy("stop")
    for source in find_sources([str(config.file)], (), (), stop):
        for file in source.files:
            if file.format in TABLES:
                for row, where in objects(file, stop):
                    if is_tagger:
                        text, words = untagged_words(row, columns, where)
                        yield Given(text, words=words)
                    elif (texts := text_and_pair(row, columns, where, stop)) is not None:
                        yield Given(*texts)
            elif config.text_column or config.text2_column:
                raise DanluError(f"{file.path}: is read line by line and has no columns")
            else:
                with open_bytes(file.path, file.compression) as stream:
                    lines = decode_lines(file.path, stream, "utf-8")
                    yield from (Given(line.rstrip("\r")) for line in lines if line.strip())


def _label(
    model: SequenceClassifier, tokenizer: Tokenizer, rows: list[Given], batch_size: int, advance: Any
) -> list[dict[str, Any]]:
    texts, pairs = [row.text for row in rows], [row.pair for row in rows]
    found = classify_texts(model, tokenizer, texts, pairs, batch_size=batch_size, progress=advance).tolist()
    if model.problem_type == "regression" or (model.problem_type is None and len(model.labels) == 1):
        if len(model.labels) == 1:
            return [{"value": value} for (value,) in found]
        return [{"values": dict(zip(model.labels, row, strict=True))} for row in found]
    answers = []
    for row in found:
        probabilities = dict(zip(model.labels, row, strict=True))
        if model.problem_type == "multi_label_classification":
            chosen: dict[str, Any] = {"labels": [label for label, p in probabilities.items() if p > 0.5]}
        else:
            best = max(probabilities, key=probabilities.__getitem__)
            chosen = {"label": best, "probability": probabilities[best]}
        answers.append({**chosen, "probabilities": probabilities})
    return answers


def _tag(model: TokenClassifier, tokenizer: Tokenizer, rows: list[Given], batch_size: int) -> list[dict[str, Any]]:
    places = [
        words_of(row.text) if row.words is None else [(w, i, i + 1) for i, w in enumerate(row.words)] for row in rows
    ]
    tagged = tag_words(model, tokenizer, [[word for word, _, _ in row] for row in places], batch_size=batch_size)
    if not is_scheme(model.labels):
        return [{"tags": [tag for tag, _ in tags], "probabilities": [p for _, p in tags]} for tags in tagged]
    answers = []
    for row, words, tags in zip(rows, places, tagged, strict=True):
        found = []
        for label, first, last in entities([tag for tag, _ in tags]):
            start, end = words[first][1], words[last][2]
            text = row.text[start:end] if row.words is None else " ".join(row.words[first : last + 1])
            least = min(p for _, p in tags[first : last + 1])
            found.append({"label": label, "text": text, "start": start, "end": end, "probability": least})
        answers.append({"entities": found})
    return answers
