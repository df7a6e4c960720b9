"""Fine-tuning to labels: it learns, exactly and resumably; folders open elsewhere; what is wrong is told by line."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transfer_folders import bert_folder, decoder_folder, lines, write
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from danlu.data.padded import Example, PaddedBatch, PaddedStream, collate
from danlu.engine.classify import classify_texts
from danlu.engine.classify_config import ClassifyConfig
from danlu.engine.classify_verb import classify
from danlu.errors import DanluError, Problems
from danlu.formats.card import Card
from danlu.models.heads import SequenceClassifier
from danlu.models.load import load_model
from danlu.objectives.classification import label_nll_sum
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.training.classify import prepare_classify
from danlu.training.config import FinetuneConfig
from danlu.training.finetune import finetune
from danlu.training.metrics import read_metrics

Make = Callable[..., FinetuneConfig]


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_folder(tmp_path_factory.mktemp("transfer") / "bert")


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder_folder(tmp_path_factory.mktemp("transfer") / "decoder")


@pytest.fixture
def make(bert: Path, tmp_path: Path) -> Make:
    """Configs; the rates are those of a model that starts from nothing."""

    def config(rows: list[Any], name: str = "tuned", **changes: Any) -> FinetuneConfig:
        values: dict[str, Any] = {
            "model": bert, "data": write(tmp_path / f"{name}.jsonl", rows), "out": tmp_path / name, "task": "classify",
            "steps": 4, "matrix_lr": 2e-3, "embed_lr": 5e-3, "norm_lr": 2e-3, "head_lr": 5e-3, "log_to": (),
            "device": "cpu", "precision": "fp32",
        }  # fmt: skip
        return FinetuneConfig(**{**values, **changes})

    return config


TOPICS = {
    "animal": "dog cat horse rabbit sparrow tiger salmon beetle elephant pigeon wolf sheep lizard squirrel goose bear",
    "food": "bread cheese soup rice pasta cake butter sausage noodles yoghurt omelette pancake salad jam stew biscuit",
    "vehicle": "car bus train bicycle lorry tram motorcycle ferry taxi scooter van airplane truck helicopter boat jeep",
    "weather": "rain snow fog wind hail frost sunshine thunder drizzle storm sleet breeze blizzard cloud thaw mist",
}
FRAMES = ("Yesterday we talked about the {}.", "They said it was the best {} ever.", "He remembers that {} well.")


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def metrics(out: Path) -> dict[str, Any]:
    return Card.load(out).metrics


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl")]


def test_an_encoder_learns_and_opens_in_transformers(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    rows = lines()
    out = finetune(make(rows, steps=120, heldout_every=60))
    found = metrics(out)
    assert found["heldout_accuracy"] > found["baselines"]["majority"]["accuracy"] + 0.3
    assert found["heldout_loss"] < 0.7 * found["baselines"]["majority"]["loss"]
    assert 0.8 < found["baselines"]["tfidf"]["accuracy"] <= 1
    assert set(found["per_class"]) == {"code", "prose"}
    assert found["examples"] + found["heldout_examples"] == len(rows)
    table = capsys.readouterr().err
    assert "held-out rows" in table
    assert "tfidf" in table
    lines_measured = [line for line in read_metrics(out / "metrics.jsonl") if "heldout_loss" in line]
    assert [line["step"] for line in lines_measured] == [60, 120]

    content = json.loads((out / "config.json").read_text())
    assert content["id2label"] == {"0": "code", "1": "prose"}
    assert content["architectures"] == ["BertForSequenceClassification"]
    reference, tokenizer = AutoModelForSequenceClassification.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    texts = [row["text"] for row in rows[:16]]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        theirs = reference(**batch).logits.softmax(dim=-1).numpy()
    ours = classify_texts(load_model(out, SequenceClassifier), Tokenizer.load(out), texts, batch_size=3)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_a_decoder_learns_and_opens_in_transformers(make: Make, decoder: Path) -> None:
    rows = lines()
    out = finetune(make(rows, model=decoder, steps=120, seq_len=48, matrix_lr=5e-3, embed_lr=3e-2))
    found = metrics(out)
    assert found["heldout_accuracy"] > found["baselines"]["majority"]["accuracy"] + 0.25
    reference = AutoModelForSequenceClassification.from_pretrained(out)
    assert type(reference).__name__ == "Qwen3ForSequenceClassification"
    tokenizer, texts = Tokenizer.load(out), [row["text"] for row in rows[:4]]
    ours = classify_texts(load_model(out, SequenceClassifier), tokenizer, texts)
    for text, row in zip(texts, ours, strict=True):
        with torch.no_grad():
            theirs = reference(torch.tensor([tokenizer.encode_for_encoder(text)[0]])).logits.softmax(dim=-1).numpy()
        np.testing.assert_allclose(row, theirs[0], atol=1e-4)


def test_several_labels_a_row(make: Make) -> None:
    rows = [
        {"text": row["text"], "labels": [row["label"]] + ["assigns"] * (" = " in row["text"])} for row in lines()[:600]
    ]
    rows[0]["labels"] = []
    out = finetune(make(rows, steps=120))
    found = metrics(out)
    assert found["heldout_micro_f1"] > found["baselines"]["majority"]["micro_f1"] + 0.2
    assert set(found["per_class"]) <= {"code", "prose", "assigns"}
    assert json.loads((out / "config.json").read_text())["problem_type"] == "multi_label_classification"
    (answer,) = classify(ClassifyConfig(model=out, text="value = self.parser.get(name)", device="cpu"))
    assert "code" in answer["labels"]
    assert sum(answer["probabilities"].values()) > 1


def test_numbers(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": row["text"], "score": row["text"].count(" ") / 8 + 0.01} for row in lines()[:600]]
    out = finetune(make(rows, steps=120))
    found = metrics(out)
    assert found["heldout_mse"] < 0.6 * found["baselines"]["majority"]["mse"]
    assert found["heldout_spearman"] > 0.6
    (answer,) = classify(ClassifyConfig(model=out, text="a b c d e f g h", device="cpu"))
    assert abs(answer["value"] - 7 / 8) < 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == answer


def test_pairs(make: Make) -> None:
    rows = [
        {"sentence1": f"line {i}", "sentence2": f"row {i if same else i + 1}", "label": same}
        for i in range(20)
        for same in (True, False)
    ]
    out = finetune(make(rows))
    assert json.loads((out / "config.json").read_text())["id2label"] == {"0": "false", "1": "true"}
    (answer,) = classify(ClassifyConfig(model=out, text="line 3", text2="row 3", device="cpu", precision="fp32"))
    tokenizer, model = Tokenizer.load(out), load_model(out, SequenceClassifier)
    ids, types = tokenizer.encode_for_encoder("line 3", "row 3")
    assert 1 in types
    expected = model(torch.tensor([ids]), types_bt=torch.tensor([types])).softmax(dim=-1)[0, 1].item()
    assert answer["probabilities"]["true"] == pytest.approx(expected, abs=1e-6)


def test_one_batch_of_eight_equals_eight_of_one_and_padding_does_not_matter(bert: Path) -> None:
    model = load_model(bert, SequenceClassifier, new_head=True, labels=("a", "b", "c"))
    rng = np.random.default_rng(0)
    examples = [
        Example(rng.integers(5, 500, n).tolist(), int(rng.integers(3)), [0] * n) for n in (3, 30, 7, 12, 5, 25, 9, 17)
    ]
    whole = collate(examples, 0)

    def gradients(batches: list[PaddedBatch]) -> list[torch.Tensor]:
        model.zero_grad()
        for batch in batches:
            (label_nll_sum(model(batch.ids, batch.real, batch.types), batch.targets) / 8).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    reference = gradients([whole])
    alone = [collate([example], 0) for example in examples]
    for batches in (list(whole.split(1)), list(whole.split(3)), alone):
        for a, b in zip(reference, gradients(batches), strict=True):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "line " * n, "label": f"l{n % 3}"} for n in range(1, 30, 4)],
        [{"text": "line " * n, "label": ["a", "b"][: n % 3]} for n in range(1, 30, 4)],
        [{"text": "line " * n, "label": n / 7} for n in range(1, 30, 4)],
    ],
)
def test_the_loss_of_a_batch_is_the_sum_of_those_of_its_rows(rows: list[Any], make: Make, bert: Path) -> None:
    tokenizer = Tokenizer.load(bert)
    task = prepare_classify(make(rows, heldout_share=0.0), tokenizer)
    whole = task.loss_sum(collate(task.train, tokenizer.pad_id))
    alone = sum(task.loss_sum(collate([example], tokenizer.pad_id)) for example in task.train)
    torch.testing.assert_close(whole, alone, atol=1e-4, rtol=1e-5)


def test_left_and_right_padding_give_the_same_logits(decoder: Path) -> None:
    model = load_model(decoder, SequenceClassifier, new_head=True, labels=("a", "b", "c"))
    batch = collate([Example(list(range(5, 5 + n)), 0) for n in (4, 9, 6)], 0)
    lengths = batch.real.sum(dim=1).tolist()
    left = [torch.stack([row.roll(9 - n) for row, n in zip(t, lengths, strict=True)]) for t in (batch.ids, batch.real)]
    torch.testing.assert_close(model(batch.ids, batch.real), model(*left), atol=1e-5, rtol=0)


def test_micro_batches_change_nothing_but_the_last_bits(make: Make) -> None:
    rows = lines()[:100]
    outs = [finetune(make(rows, f"micro-{n}", steps=8, micro_batch_tokens=n)) for n in (1, 4096)]
    assert losses(outs[0]) == pytest.approx(losses(outs[1]), abs=1e-4)


def test_every_row_comes_once_an_epoch_beside_rows_of_its_length() -> None:
    rng = np.random.default_rng(0)
    examples = [Example([i] * int(n), 0) for i, n in enumerate(rng.integers(1, 60, 203))]
    stream = PaddedStream(examples, 8, 5, 0)
    seen, padding = [], 0
    for _ in range(25):
        batch = stream.next(8)
        seen += batch.ids[:, 0].tolist()
        padding += int((~batch.real).sum())
    state = stream.state()
    after = stream.next(8).ids
    assert len(set(seen + after[:3, 0].tolist())) == 203
    assert padding < 0.1 * sum(map(len, examples))  # at random it would be about as much as there is text
    again = PaddedStream(examples, 8, 5, 0)
    again.restore(state)
    assert torch.equal(again.next(8).ids, after)
    assert stream.epoch == 1
    anew = PaddedStream(examples, 8, 5, 0)
    anew.restore({"epoch": 1, "row": 0})
    assert anew.next(200).ids[:, 0].tolist() != seen  # in another order
    state, after = stream.state(), stream.next(8).ids
    anew = PaddedStream(examples, 8, 5, 0)
    anew.restore(state)
    assert torch.equal(anew.next(8).ids, after)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(make: Make) -> None:
    rows = lines()[:150]
    options = {"steps": 40, "threads": 1, "micro_batch_tokens": 100}
    straight = make(rows, "straight", **options, checkpoint_every=1000)
    killed = make(rows, "killed", **options, checkpoint_every=3)
    finetune(straight)
    given = ("model", "data", "out", "task", "matrix_lr", "embed_lr", "norm_lr", "head_lr", "device", "precision")
    words = [f"{name}={getattr(killed, name)}" for name in (*given, *options, "checkpoint_every")]
    command = [sys.executable, "-m", "danlu", "finetune", *words, "log_to=[]"]
    process, deadline = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE), time.time() + 90
    while process.poll() is None and len(read_metrics(killed.out / "metrics.jsonl")) < 10:
        assert time.time() < deadline
        time.sleep(0.01)
    time.sleep(random.Random(0).random() * 0.05)
    process.kill()
    process.communicate()
    assert not (killed.out / "model.safetensors").exists()
    finetune(killed)
    assert weights(killed.out) == weights(straight.out)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(make: Make) -> None:
    rows = lines()[:60]
    a, b, c = (finetune(make(rows, name, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert weights(a) == weights(b) != weights(c)


def test_a_tuned_model_keeps_the_order_of_its_labels(make: Make) -> None:
    rows = [{"text": f"line {i}", "label": "zebra" if i % 2 else "ape"} for i in range(30)]
    named = finetune(make(rows, "named", label_names=("zebra", "ape", "bee")))
    again = finetune(make(rows, "again", model=named, steps=0))
    assert load_model(again, SequenceClassifier).labels == ("zebra", "ape", "bee")
    assert weights(again) == weights(named)


def test_held_out_file_and_unknown_labels(make: Make, tmp_path: Path) -> None:
    rows = [{"text": f"line {i}", "label": f"l{i % 3}"} for i in range(30)]
    good = write(tmp_path / "good.jsonl", rows[:7])
    out = finetune(make(rows, heldout=good))
    assert (metrics(out)["examples"], metrics(out)["heldout_examples"]) == (30, 7)
    bad = write(tmp_path / "bad.jsonl", [rows[0], {"text": "x y", "label": "l9"}])
    with pytest.raises(DanluError, match=r"bad\.jsonl:2: unknown label 'l9'"):
        finetune(make(rows, "other", heldout=bad))
    assert not (tmp_path / "other").exists()


def test_without_sklearn_its_baseline_is_left_out(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    out = finetune(make(lines()[:60]))
    assert set(metrics(out)["baselines"]) == {"majority"}
    assert "danlu[tasks]" in capsys.readouterr().err


def test_rows_of_a_file_are_labelled_in_their_order(make: Make, tmp_path: Path) -> None:
    rows = lines()[:60]
    out = finetune(make(rows))
    expected = classify_texts(load_model(out, SequenceClassifier), Tokenizer.load(out), [row["text"] for row in rows])
    lists = {
        "rows.jsonl": "".join(json.dumps({"body": row["text"]}) + "\n" for row in rows),
        "lines.txt": "\n\n".join(row["text"] for row in rows),
    }
    for name, content in lists.items():
        (tmp_path / name).write_text(content)
        column = {"text_column": "body"} if name == "rows.jsonl" else {}
        options = {"model": out, "file": tmp_path / name, "device": "cpu", "precision": "fp32", "batch_size": 7}
        found = classify(ClassifyConfig(**options, **column))
        assert [row["text"] for row in found] == [row["text"] for row in rows]
        np.testing.assert_allclose([row["probabilities"]["prose"] for row in found], expected[:, 1], atol=1e-5)
        assert all(row["label"] == max(row["probabilities"], key=row["probabilities"].get) for row in found)
    with pytest.raises(DanluError, match=r"rows\.jsonl:1: has no column 'text'"):
        classify(ClassifyConfig(model=out, file=tmp_path / "rows.jsonl", device="cpu"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}], r":1: has no column 'label'"),
        ([{"label": "a"}], r":1: has no column 'text'"),
        ([{"text": "a b", "label": "x"}] * 3, "nothing to tell apart"),
        ([{"text": "a", "label": "x"}, {"text": 5, "label": "y"}], r":2: column 'text' holds int"),
        ([{"text": "a", "label": "x"}, {"text": " ", "label": "y"}], r":2: column 'text' is empty"),
        ([{"text": "a", "label": "x"}, {"text": "b", "label": None}], r":2: column 'label' is empty"),
        ([{"text": "a", "label": ["x"]}, {"text": "b", "label": "y"}], r":2: label 'y' is no list"),
        ([{"text": "a", "label": {"x": 1}}, {"text": "b", "label": "y"}], r":1: label"),
        ([{"text": f"a {i}", "label": i} for i in range(60)], "label-kind number"),
        (['{"text": "a", "label"'], r":1: is not valid JSON"),
        ([[1]], r":1: is a list"),
    ],
)
def test_bad_rows_are_told_with_file_and_line(rows: list[Any], message: str, make: Make) -> None:
    config = make(rows)
    with pytest.raises(DanluError, match=message) as caught:
        finetune(config)
    assert str(config.data) in str(caught.value)
    assert not config.out.exists()


def test_options_of_other_tasks_are_refused(make: Make, decoder: Path) -> None:
    rows = [{"text": "a", "label": "x"}]
    with pytest.raises(Problems) as caught:
        finetune(make(rows, target_len=5, train_on="all", compile="always", batch_tokens=999))
    for name in ("target_len is for task=seq2seq", "train_on", "compile=always", "batch_tokens"):
        assert name in str(caught.value)
    with pytest.raises(DanluError, match="seq2seq"):
        finetune(make([{"source": "a", "target": "b"}] * 20, task="seq2seq", model=decoder))
    with pytest.raises(DanluError, match="has no labels"):
        classify(ClassifyConfig(model=decoder, text="x"))


@pytest.mark.slow
def test_minilm_knows_words_that_were_not_in_the_rows(minilm: Path, tmp_path: Path) -> None:
    """What is a sentence about? The words that tell are new in the held-out rows: counting words does not help, and
    knowing language does."""
    train, held_out = [], []
    for label, words in TOPICS.items():
        for i, word in enumerate(words.split()):
            (train if i < 8 else held_out).extend({"text": frame.format(word), "label": label} for frame in FRAMES)
    config = FinetuneConfig(
        model=minilm, data=write(tmp_path / "train.jsonl", train), heldout=write(tmp_path / "rest.jsonl", held_out),
        out=tmp_path / "tuned", task="classify", steps=60, log_to=(), device="cpu", heldout_tokens=0,
    )  # fmt: skip
    found = metrics(finetune(config))
    assert found["baselines"]["tfidf"]["accuracy"] < 0.5
    assert found["heldout_accuracy"] > 0.85
