"""Fine-tuning to tags of words and to rewriting: it learns, and the folders open in transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transfer_folders import bert_folder, signatures, t5_folder, write
from transformers import AutoModelForSeq2SeqLM, AutoModelForTokenClassification

from danlu.data.packing import IGNORE
from danlu.data.padded import collate
from danlu.engine.classify import encode_pieces, tag_words
from danlu.engine.classify_config import ClassifyConfig
from danlu.engine.classify_verb import classify
from danlu.errors import DanluError
from danlu.formats.card import Card
from danlu.models.heads import TokenClassifier
from danlu.models.load import load_model
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.training.config import FinetuneConfig
from danlu.training.finetune import finetune
from danlu.training.metrics import read_metrics
from danlu.training.seq2seq import prepare_seq2seq
from danlu.training.tag import prepare_tag

Make = Callable[..., FinetuneConfig]
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def numbers() -> list[dict[str, str]]:
    """Digits in words: "4 0 2" is to become "four zero two"."""
    return [
        {"source": " ".join(str(i)), "target": " ".join(DIGITS[int(digit)] for digit in str(i))} for i in range(10, 400)
    ]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_folder(tmp_path_factory.mktemp("words") / "bert")


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [f"{row['source']} {row['target']}" for row in numbers()]
    return t5_folder(tmp_path_factory.mktemp("words") / "t5", texts)


@pytest.fixture
def make(bert: Path, tmp_path: Path) -> Make:
    def config(rows: list[Any], name: str = "tuned", **changes: Any) -> FinetuneConfig:
        values: dict[str, Any] = {
            "model": bert, "data": write(tmp_path / f"{name}.jsonl", rows), "out": tmp_path / name, "task": "tag",
            "steps": 4, "matrix_lr": 2e-3, "embed_lr": 5e-3, "norm_lr": 2e-3, "head_lr": 5e-3, "log_to": (),
            "device": "cpu", "precision": "fp32",
        }  # fmt: skip
        return FinetuneConfig(**{**values, **changes})

    return config


def test_entities_are_learned_and_found(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    out = finetune(make(signatures(), steps=120, seq_len=40))
    found = Card.load(out).metrics
    assert found["heldout_f1"] > 0.8
    assert found["heldout_f1"] > found["baselines"]["commonest tag of the word"]["f1"] + 0.2
    assert found["baselines"]["majority"]["f1"] == 0
    assert set(found["per_class"]) == {"FUNC", "CLASS"}
    content = json.loads((out / "config.json").read_text())
    assert content["id2label"] == dict(zip("01234", ["B-CLASS", "B-FUNC", "I-CLASS", "I-FUNC", "O"], strict=True))
    assert content["architectures"] == ["BertForTokenClassification"]

    text = "def parse_args(self, args=None):"
    (answer,) = classify(ClassifyConfig(model=out, text=text, device="cpu", precision="fp32"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == answer
    (entity,) = answer["entities"]
    assert (
        (entity["label"], entity["text"]) == ("FUNC", text[entity["start"] : entity["end"]]) == ("FUNC", "parse_args")
    )

    words = ["def", "parse_args", "(", "self", ")", ":"]
    tokenizer = Tokenizer.load(out)
    ids, owners = tokenizer.encode_words(words)
    with torch.no_grad():
        logits = AutoModelForTokenClassification.from_pretrained(out)(torch.tensor([ids])).logits[0]
    firsts = [owners.index(word) for word in range(len(words))]
    expected = [content["id2label"][str(int(logits[at].argmax()))] for at in firsts]
    (tagged,) = tag_words(load_model(out, TokenClassifier), tokenizer, [words])
    assert [tag for tag, _ in tagged] == expected
    assert [p for _, p in tagged] == pytest.approx([logits[at].softmax(-1).max().item() for at in firsts], abs=1e-5)


def test_the_first_token_of_a_word_carries_its_tag_and_long_rows_are_learned_whole(make: Make, bert: Path) -> None:
    words = ["subprocess", "zzqqxx", "runs"] * 40
    tags = ["B-X", "I-X", "O"] * 40
    tokenizer = Tokenizer.load(bert)
    task = prepare_tag(make([{"tokens": words, "tags": tags}], heldout_share=0.0, seq_len=16), tokenizer)
    labels = task.model.labels  # type: ignore[union-attr]
    learned = [target for example in task.train for target in example.target if target != IGNORE]  # type: ignore[union-attr]
    assert [labels[target] for target in learned] == tags
    assert max(map(len, task.train)) <= 16
    whole = task.loss_sum(collate(task.train, tokenizer.pad_id))
    alone = sum(task.loss_sum(collate([example], tokenizer.pad_id)) for example in task.train)
    torch.testing.assert_close(whole, alone, atol=1e-4, rtol=1e-5)
    for example in task.train:
        _, owners = tokenizer.encode_words(words)
        assert example.target[0] == example.target[-1] == IGNORE  # type: ignore[index]
    assert len(owners) > 121
    with pytest.raises(DanluError, match="room"):
        list(encode_pieces(tokenizer, words, 2))


def test_tags_do_not_depend_on_the_batch(make: Make, bert: Path) -> None:
    model = load_model(bert, TokenClassifier, new_head=True, labels=("O", "B-X", "I-X")).eval()
    tokenizer = Tokenizer.load(bert)
    sentences = [["def"] * n for n in (1, 7, 3, 60, 2)]
    together = tag_words(model, tokenizer, sentences, batch_size=5)
    alone = [tag_words(model, tokenizer, [sentence])[0] for sentence in sentences]
    for a, b in zip(together, alone, strict=True):
        assert [tag for tag, _ in a] == [tag for tag, _ in b]
        assert [p for _, p in a] == pytest.approx([p for _, p in b], abs=1e-5)


def test_parts_of_speech_are_scored_by_word(make: Make) -> None:
    rows = [{"tokens": ["def", f"f{i}", "("], "tags": ["KEY", "NAME", "MARK"]} for i in range(40)]
    out = finetune(make(rows, steps=30))
    found = Card.load(out).metrics
    assert found["heldout_accuracy"] > 0.9
    assert set(found["per_class"]) == {"KEY", "NAME", "MARK"}
    assert "heldout_f1" not in found
    (answer,) = classify(ClassifyConfig(model=out, text="def f1 (", device="cpu"))
    assert answer["tags"] == ["KEY", "NAME", "MARK"]


def test_unknown_tags_are_told(make: Make, tmp_path: Path) -> None:
    rows = [{"tokens": ["a", "b"], "tags": ["B-X", "O"]}] * 3
    heldout = write(tmp_path / "held.jsonl", [rows[0], {"tokens": ["a"], "tags": ["B-Y"]}])
    with pytest.raises(DanluError, match=r"held\.jsonl:2: unknown tag 'B-Y'"):
        finetune(make(rows, heldout=heldout))


def test_an_encoder_decoder_learns_to_rewrite(make: Make, t5: Path) -> None:
    out = finetune(make(numbers(), task="seq2seq", model=t5, steps=400, batch_size=32, target_len=8))
    found = Card.load(out)
    assert found.metrics["heldout_token_accuracy"] > 0.9
    assert found.metrics["heldout_exact_match"] > 0.6
    assert found.details["samples"][0]["answer"]
    reference = AutoModelForSeq2SeqLM.from_pretrained(out)
    tokenizer = Tokenizer.load(out)
    for sample in found.details["samples"][:5]:
        ids, _ = tokenizer.encode_for_encoder(sample["source"])
        theirs = reference.generate(torch.tensor([ids]), max_new_tokens=8, num_beams=1, do_sample=False)[0].tolist()
        assert tokenizer.decode(theirs[1:], skip_special=True) == sample["answer"]


def test_the_loss_is_that_of_transformers(make: Make, t5: Path) -> None:
    rows = numbers()[:6]
    config = make(rows, task="seq2seq", model=t5, steps=1, batch_size=6, heldout_share=0.0)
    out = finetune(config)
    tokenizer = Tokenizer.load(t5)
    task = prepare_seq2seq(config, tokenizer)
    batch = collate(task.train, tokenizer.pad_id)
    with torch.no_grad():
        expected = AutoModelForSeq2SeqLM.from_pretrained(t5)(
            input_ids=batch.ids, attention_mask=batch.real.long(), labels=batch.targets
        ).loss.item()
        assert task.loss_sum(batch).item() / batch.n_targets == pytest.approx(expected, abs=1e-5)
    assert read_metrics(out / "metrics.jsonl")[0]["loss"] == pytest.approx(expected, abs=1e-4)


def test_targets_that_are_too_long_are_counted(make: Make, t5: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*numbers()[:20], {"source": "1", "target": "one " * 50}, {"source": "1 " * 90, "target": "one"}]
    finetune(make(rows, task="seq2seq", model=t5, seq_len=64, target_len=16, heldout_answers=0))
    told = capsys.readouterr().err
    assert "1 of 22 rows have a target of more than 16 tokens" in told
    assert "1 of 22 sources are cut to 64 tokens" in told
    with pytest.raises(DanluError, match="no head for sequence classification"):
        finetune(
            make(
                rows, "not", model=t5, task="classify", label_kind="single", label_column="target", text_column="source"
            )
        )
