"""Classifiers as students: what they learn from, what is told of them, and teachers that know other labels."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distil_folders import QUIET, same_weights
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig

from crashes import crash
from danlu.data.padded import Example, collate
from danlu.errors import DanluError
from danlu.formats.card import Card
from danlu.models.heads import SequenceClassifier
from danlu.models.load import load_model
from danlu.posttraining.distil import distil
from danlu.posttraining.distil_classify import LabelLesson, _as_long, share_above_chance
from danlu.posttraining.distil_config import DistilConfig
from danlu.posttraining.layer_matching import LayerMatching
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.training.config import FinetuneConfig
from danlu.training.finetune import finetune

TOPICS = {
    "animal": "dog cat horse rabbit sparrow tiger salmon beetle elephant pigeon wolf sheep",
    "food": "bread cheese soup rice pasta cake butter sausage noodles yoghurt omelette pancake",
    "weather": "rain snow fog wind hail frost sunshine thunder drizzle storm sleet breeze",
}
FRAMES = (
    "Yesterday we talked about the {} and the {}.",
    "They said {} was best, not {}.",
    "The {} came before the {}.",
)


def rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    draw, found = random.Random(seed), []
    for i in range(n):
        label = list(TOPICS)[i % 3]
        text = draw.choice(FRAMES).format(*draw.sample(TOPICS[label].split(), 2))
        found.append({"text": text, "label": label})
    return found


def write(path: Path, found: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def bert_folder(folder: Path) -> Path:
    folder.mkdir()
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    texts = [row["text"] for row in rows(400)]
    backend.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    backend.save(str(folder / "tokenizer.json"))
    roles = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=backend.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=40, initializer_range=0.1,
    )  # fmt: skip
    AutoModel.from_config(shape).save_pretrained(folder)
    return folder


def tuned(folder: Path, name: str, data: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "model": folder / "bert", "data": data, "out": folder / name, "task": "classify", "steps": 80,
        "matrix_lr": 2e-3, "embed_lr": 5e-3, "norm_lr": 2e-3, "head_lr": 5e-3, "heldout_share": 0.1,
        **QUIET,
    }  # fmt: skip
    return finetune(FinetuneConfig(**{**values, **changes}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classify")
    bert_folder(root / "bert")
    return root


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Path:
    return tuned(folder, "teacher", write(folder / "much.jsonl", rows(400)))


@pytest.fixture
def make(teacher: Path, tmp_path: Path) -> Callable[..., DistilConfig]:
    def made(name: str = "student", found: list[dict[str, Any]] | None = None, **changes: Any) -> DistilConfig:
        values: dict[str, Any] = {
            "teacher": teacher, "data": write(tmp_path / f"{name}.jsonl", found or rows(120, 5)),
            "out": tmp_path / name, "task": "classify", "keep_layers": 1, "steps": 30, "heldout_share": 0.4,
            "control": False, "matrix_lr": 1e-3, "embed_lr": 2e-3, "norm_lr": 1e-3, "head_lr": 2e-3, **QUIET,
        }  # fmt: skip
        return DistilConfig(**{**values, **changes})

    return made


Make = Callable[..., DistilConfig]


def test_a_small_student_keeps_what_the_teacher_knows(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    given = make(keep_layers=None, size=1, dim=16, n_heads=1, head_dim=16, ffn_dim=32, steps=100, control=True)
    out = distil(dataclasses.replace(given, matrix_lr=5e-3, embed_lr=2e-2, head_lr=1e-2, norm_lr=5e-3))
    found = Card.load(out).metrics
    assert found["smaller_by"] > 0.6
    common = found["baselines"]["majority"]["accuracy"]
    assert found["teacher"]["accuracy"] > common + 0.3
    assert found["heldout_accuracy"] > common + 0.2
    assert found["share_of_teacher"] == pytest.approx(
        (found["heldout_accuracy"] - common) / (found["teacher"]["accuracy"] - common)
    )
    assert 0 < found["control"]["accuracy"] <= 1
    assert found["faster_by"] == pytest.approx(found["rows_per_second"] / found["teacher_rows_per_second"])
    table = capsys.readouterr().err
    assert all(who in table for who in ("student", "teacher", "without teacher", "majority", "tfidf"))
    assert not (out / "control").exists()
    reference = AutoModelForSequenceClassification.from_pretrained(out)
    assert reference.config.id2label == dict(enumerate(TOPICS))
    assert sum(p.numel() for p in reference.parameters()) == found["parameters"]


def test_losses_are_those_of_their_formulas(teacher: Path, folder: Path) -> None:
    """The labels' loss and the divergence of each row, summed, in their shares."""
    student, other = (load_model(path, SequenceClassifier) for path in (teacher, teacher))
    with torch.no_grad():
        for weight in student.head.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    tokenizer = Tokenizer.load(teacher)
    texts = [tokenizer.encode_for_encoder(row["text"])[0] for row in rows(6, 3)]
    batch = collate([Example(ids, number) for number, ids in enumerate(texts)], tokenizer.pad_id)
    with torch.no_grad():
        theirs, mine = (model(batch.ids, batch.real, batch.types) for model in (other, student))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    lesson = LabelLesson("single", student, other, labels, theirs, 0.25, 3.0)
    p, q = (theirs / 3).softmax(-1), (mine / 3).softmax(-1)
    kl = 9 * (p * (p / q).log()).sum()
    nll = -mine.log_softmax(-1).gather(1, labels[:, None]).sum()
    assert lesson(batch).item() == pytest.approx((0.25 * nll + 0.75 * kl).item(), rel=1e-4)
    assert lesson.hard_loss(batch).item() == pytest.approx(nll.item(), rel=1e-5)
    itself = dataclasses.replace(lesson, student=other, hard_share=0.0)
    assert abs(itself(batch).item()) < 1e-5  # P = Q
    yes_no = dataclasses.replace(lesson, kind="multi", hard_share=0.0, labels=torch.zeros(6, 3))
    p, q = (theirs / 3).sigmoid(), (mine / 3).sigmoid()
    expected = 9 * -(p * q.log() + (1 - p) * (1 - q).log()).sum()
    assert yes_no(batch).item() == pytest.approx(expected.item(), rel=1e-4)
    number = dataclasses.replace(lesson, kind="number", hard_share=0.5, labels=torch.ones(6), logits_nl=theirs[:, :1])
    number.student.head.weight = torch.nn.Parameter(student.head.weight[:1])
    number.student.head.bias = torch.nn.Parameter(student.head.bias[:1])
    squares = 0.5 * (mine[:, 0] - 1).square() + 0.5 * (mine[:, 0] - theirs[:, 0]).square()
    assert number(batch).item() == pytest.approx(squares.sum().item(), rel=1e-4)


def test_rows_without_a_label_have_the_divergence_alone(teacher: Path) -> None:
    student, other = (load_model(path, SequenceClassifier) for path in (teacher, teacher))
    with torch.no_grad():
        student.head.weight.add_(0.3 * torch.randn_like(student.head.weight))
    tokenizer = Tokenizer.load(teacher)
    examples = [Example(tokenizer.encode_for_encoder(row["text"])[0], at) for at, row in enumerate(rows(6, 3))]
    batch = collate(examples, tokenizer.pad_id)
    with torch.no_grad():
        theirs = other(batch.ids, batch.real, batch.types)
        labels = torch.tensor([0, 1, 2, 0, 1, 2])
        known = LabelLesson("single", student, other, labels, theirs, 0.25, 2.0)
        some = dataclasses.replace(known, labels=labels[:4])

        def loss(lesson: LabelLesson, which: slice, **changes: Any) -> float:
            return dataclasses.replace(lesson, **changes)(collate(examples[which], tokenizer.pad_id)).item()

        expected = loss(known, slice(0, 4)) + loss(known, slice(4, 6), hard_share=0.0)
        assert some(batch).item() == pytest.approx(expected, rel=1e-4)
        assert some.hard_loss(batch).item() == pytest.approx(loss(known, slice(0, 4), hard_share=1.0), rel=1e-4)
        assert loss(some, slice(4, 6)) == pytest.approx(loss(known, slice(4, 6), hard_share=0.0), rel=1e-4)
        assert loss(some, slice(0, 4)) == pytest.approx(loss(known, slice(0, 4)), rel=1e-4)


def test_texts_without_labels_are_learned_from_and_held_out_ones_are_not(make: Make, tmp_path: Path) -> None:
    """The student without the teacher has only the labels, for as many steps."""
    labelled, kept = rows(8, 1), rows(6, 2)
    new = [{"text": f"{row['text']} {at}"} for at, row in enumerate(rows(40, 3))]
    heldout = write(tmp_path / "kept.jsonl", kept)
    texts = write(tmp_path / "texts.jsonl", [*new, {"text": kept[0]["text"], "label": 5}])
    given = make(
        "more", labelled, heldout=heldout, heldout_share=None, unlabelled=texts, steps=None, epochs=2.0, control=True,
        batch_size=8,
    )  # fmt: skip
    card = Card.load(distil(given))
    found = card.metrics
    assert (found["examples"], found["unlabelled_examples"], found["heldout_examples"]) == (8, 40, 6)
    assert found["steps"] == 12  # twice all 48 rows
    assert _as_long(given, 8, 40).steps == 12
    assert _as_long(given, 8, 0) == given
    assert [item.role for item in card.inputs] == ["teacher", "data", "heldout", "unlabelled"]
    empty = write(tmp_path / "empty.jsonl", [{"words": "a"}])
    with pytest.raises(DanluError, match=r"empty.jsonl:1: has no column 'text'"):
        distil(make("none", labelled, unlabelled=empty))


def test_layers_are_compared_over_what_is_no_padding(teacher: Path) -> None:
    """The loss of a row does not depend on how far it is padded; of oneself it is 0."""
    model, other = load_model(teacher, SequenceClassifier), load_model(teacher, SequenceClassifier)
    tokenizer = Tokenizer.load(teacher)
    ids = [tokenizer.encode_for_encoder(text)[0] for text in ("a dog", "the rain came before the wind and the fog")]
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    matching = LayerMatching(
        model, other, {}, hidden_weight=1.0, hidden_kind="mse", attention_weight=0.5, seed=0
    )  # fmt: skip

    def loss(student: SequenceClassifier, *which: int) -> float:
        batch = collate([Example(ids[i], number) for number, i in enumerate(which)], tokenizer.pad_id)
        nothing = torch.zeros(len(which), len(student.labels))
        lesson = LabelLesson(
            "single", student, other, torch.zeros(2, dtype=torch.long), nothing, 0.0, 1.0, matching
        )  # fmt: skip
        with torch.no_grad():
            plain = dataclasses.replace(lesson, matching=None)
            return (lesson(batch) - plain(batch)).item()

    assert loss(model, 0) > 0.01
    assert loss(model, 0, 1) == pytest.approx(loss(model, 0) + loss(model, 1), rel=1e-4)
    assert abs(loss(other, 0, 1)) < 1e-5


@pytest.mark.parametrize("changes", [{}, {"hidden_weight": 1.0, "attention_weight": 0.1}], ids=["labels", "layers"])
def test_a_killed_run_ends_with_the_same_weights(changes: dict[str, Any], make: Make) -> None:
    straight, broken = (make(name, steps=6, checkpoint_every=2, **changes) for name in ("straight", "broken"))
    distil(straight)
    crash(lambda: distil(broken), at_step=5)
    distil(broken)
    assert same_weights(straight.out, broken.out)


def test_several_labels_and_numbers(make: Make, folder: Path) -> None:
    several = [{**row, "label": [row["label"], "long"] if i % 2 else [row["label"]]} for i, row in enumerate(rows(60))]
    data = write(folder / "several.jsonl", several)
    out = distil(make("several", several, teacher=tuned(folder, "multi", data, steps=4), steps=4, temperature=2.0))
    assert Card.load(out).metrics["heldout_micro_f1"] >= 0
    assert load_model(out, SequenceClassifier).problem_type == "multi_label_classification"
    numbers = [{**row, "label": len(row["text"]) / 10} for row in rows(60)]
    teacher = tuned(folder, "numbers", write(folder / "numbers.jsonl", numbers), steps=4)
    found = Card.load(distil(make("numbers", numbers, teacher=teacher, steps=4))).metrics
    assert found["teacher"]["mae"] > 0
    assert "share_of_teacher" not in found
    with pytest.raises(DanluError, match="temperature is for labels"):
        distil(make("warm", numbers, teacher=teacher, steps=4, temperature=2.0))
    with pytest.raises(DanluError, match="was made for regression"):
        distil(make("topics", teacher=teacher, steps=4))


def test_other_labels_are_refused(make: Make) -> None:
    other = [{**row, "label": "plant" if row["label"] == "food" else row["label"]} for row in rows(60)]
    given = make("other", other)
    with pytest.raises(
        DanluError, match=r"has the labels animal, plant, weather, and the teacher .* animal, food, weather"
    ):
        distil(given)
    assert not given.out.exists()
    numbered = [{**row, "label": list(TOPICS).index(row["label"])} for row in rows(60)]
    found = distil(make("numbered", numbered, label_names=tuple(TOPICS), steps=2))
    assert load_model(found, SequenceClassifier).labels == tuple(TOPICS)
    with pytest.raises(DanluError, match=r"lacks classifier\."):  # a model without such a head is no teacher
        distil(make("headless", teacher=given.teacher.parent / "bert", steps=2))


def test_the_share_above_chance() -> None:
    assert share_above_chance({"accuracy": 0.8}, {"accuracy": 0.9}, {"accuracy": 0.5}) == pytest.approx(0.75)
    assert share_above_chance({"accuracy": 0.8}, {"accuracy": 0.5}, {"accuracy": 0.5}) is None
