"""Language models as students: they follow the teacher and nothing else, exactly, however the run is cut up."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distil_folders import SHAPE, config, same_weights, sentences, teacher_folder, untrained_folder, write
from torch import Tensor

from crashes import crash
from danlu.data.build import build_data
from danlu.data.config import DataConfig
from danlu.data.packing import IGNORE
from danlu.engine.config import SamplingParams
from danlu.engine.engine import Engine
from danlu.errors import DanluError
from danlu.formats.card import Card
from danlu.models.load import load_model
from danlu.nn.masks import visible
from danlu.posttraining import lesson as lessons
from danlu.posttraining import teacher_cache
from danlu.posttraining.distil import distil
from danlu.posttraining.distil_causal import _read
from danlu.posttraining.distil_config import DistilConfig
from danlu.posttraining.layer_matching import LayerMatching, layer_matching, spread_map, visible_pairs, watching
from danlu.posttraining.lesson import Lesson, nll_sum
from danlu.posttraining.students import make_student, with_layers
from danlu.posttraining.taught_rows import TaughtBatch, TaughtRows, prompt_of
from danlu.posttraining.teacher_cache import cache_teacher
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.training.metrics import read_metrics

Make = Callable[..., DistilConfig]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teacher_folder(tmp_path_factory.mktemp("distil"))


@pytest.fixture
def make(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Configs on little data, with a cache of their own."""
    monkeypatch.setenv("DANLU_HOME", str(tmp_path / "home"))
    data = write(tmp_path / "little.jsonl", sentences(60, 2))

    def made(name: str = "student", **changes: Any) -> DistilConfig:
        return config(teacher, changes.pop("data", data), tmp_path / name, **changes)

    return made


def lesson_of(given: DistilConfig, **changes: Any) -> tuple[Lesson, TaughtRows]:
    """What a config teaches, and the rows it teaches with."""
    tokenizer, teacher = Tokenizer.load(given.teacher), load_model(given.teacher)
    student = make_student(given, teacher, tokenizer)
    rows = TaughtRows(_read(given, tokenizer)[0], given.seq_len, seed=given.seed, pad_id=tokenizer.pad_id)
    return dataclasses.replace(Lesson.of(given, student, teacher, None, None), **changes), rows


def test_a_student_learns_more_from_its_teacher_than_alone(make: Make) -> None:
    """On as much data for as many steps; and the card tells what both are."""
    out = distil(make(keep_layers=None, size=2, dim=32, init="random", steps=40, control=True))
    card = Card.load(out)
    found = card.metrics
    bits, teacher, alone = (
        found["heldout_bits_per_byte"], found["teacher_bits_per_byte"], found["control"]["heldout_bits_per_byte"],
    )  # fmt: skip
    assert teacher < bits < alone
    assert bits - teacher < 0.6 * (alone - teacher)
    assert card.verb == "distil"
    assert [item.role for item in card.inputs] == ["teacher", "data"]
    assert found["parameters"] == load_model(out).num_parameters()
    assert found["smaller_by"] == pytest.approx(1 - found["parameters"] / found["teacher_parameters"])
    assert found["reading_tokens_per_second"] > 0
    assert found["control"]["steps"] == found["steps"] == 40
    assert not (out / "control").exists()
    assert not (out / "checkpoints").exists()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_there_is_nothing_to_learn_from_oneself(divergence: str, make: Make) -> None:
    """Field note 17: P = Q gives 0, and no gradient."""
    lesson, rows = lesson_of(make(keep_layers=4, divergence=divergence, temperature=2.0))
    loss = lesson(rows.next(4))
    loss.backward()
    assert abs(loss.item()) < 1e-3  # summed over 200 targets
    assert max(p.grad.abs().max().item() for p in lesson.student.parameters() if p.grad is not None) < 1e-3


def test_losses_are_those_of_their_formulas(make: Make) -> None:
    """Of each target by itself: KL with the temperature's square, JSD below ln 2, and the mix with the data."""
    given = make(keep_layers=2, temperature=2.0, hard_share=0.25)
    lesson, rows = lesson_of(given)
    taught = rows.next(4)
    batch = taught.batch
    with torch.no_grad():
        arguments = (batch.ids, batch.positions, batch.segments)
        mine, theirs = lesson.student(*arguments), lesson.teacher(*arguments)
        learned = batch.targets != IGNORE
        p, q = (theirs[learned] / 2).softmax(-1), (mine[learned] / 2).softmax(-1)
        kl = 4 * (p * (p / q).log()).sum()
        nll = -mine[learned].log_softmax(-1).gather(1, batch.targets[learned][:, None]).sum()
        assert lesson(taught).item() == pytest.approx((0.75 * kl + 0.25 * nll).item(), rel=1e-4)
        assert nll_sum(lesson.student, batch).item() == pytest.approx(nll.item(), rel=1e-5)
        own = TaughtBatch(batch, taught.numbers_b, own=True)
        assert lesson(own).item() == pytest.approx(kl.item(), rel=1e-4)  # what it wrote itself is no example
        alone = dataclasses.replace(lesson, hard_share=1.0, teacher=None)  # nobody asks a teacher that has no say
        assert alone(taught).item() == pytest.approx(nll.item(), rel=1e-5)
        jensen, _ = lesson_of(make(divergence="jsd"))
        assert 0 < jensen(taught).item() < math.log(2) * batch.n_targets


def test_logits_in_parts_and_micro_batches_change_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lesson, rows = lesson_of(make(hard_share=0.5))
    taught = rows.next(4)

    def gradient(parts: list[TaughtBatch]) -> tuple[float, list[Tensor]]:
        lesson.student.zero_grad()
        losses = [lesson(part) for part in parts]
        torch.stack(losses).sum().backward()
        return sum(loss.item() for loss in losses), [
            p.grad.clone() for p in lesson.student.parameters() if p.grad is not None
        ]

    whole, expected = gradient([taught])
    assert len(list(taught.split(1))) == 4
    one_by_one, apart = gradient(list(taught.split(1)))
    monkeypatch.setattr(lessons, "LOGITS", 7 * SHAPE["dim"] * 100)
    in_parts, pieces = gradient([taught])
    assert one_by_one == pytest.approx(whole, rel=1e-5)
    assert in_parts == pytest.approx(whole, rel=1e-5)
    for a, b, c in zip(expected, apart, pieces, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(a, c, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [{}, {"teacher_top_k": 8}, {"on_policy": 0.5, "answer_tokens": 8}, {"hidden_weight": 1.0, "dim": 16, "size": 2}],
    ids=["live", "cached", "on policy", "hidden states"],
)
def test_a_killed_run_ends_with_the_same_weights(changes: dict[str, Any], make: Make) -> None:
    more = {"keep_layers": None} if "size" in changes else {}
    straight, broken = (make(name, steps=6, checkpoint_every=2, **changes, **more) for name in ("straight", "broken"))
    distil(straight)
    crash(lambda: distil(broken), at_step=5)
    distil(broken)
    assert same_weights(straight.out, broken.out)


def test_rows_are_the_same_in_every_epoch_and_can_be_restored(make: Make) -> None:
    _, rows = lesson_of(make())
    n = rows.rows_per_epoch
    first, second = rows.next(n), rows.next(n)
    assert sorted(first.numbers_b.tolist()) == sorted(second.numbers_b.tolist()) == list(range(n))
    assert first.numbers_b.tolist() != second.numbers_b.tolist()
    order = {number: row for row, number in enumerate(second.numbers_b.tolist())}
    assert torch.equal(first.batch.ids, second.batch.ids[[order[number] for number in first.numbers_b.tolist()]])
    at = rows.state()
    third = rows.next(5)
    rows.restore({"epoch": 0, "row": 0})
    assert torch.equal(rows.next(n).batch.ids, first.batch.ids)
    rows.restore(at)
    assert torch.equal(rows.next(5).batch.ids, third.batch.ids)


# ---- what the teacher says, kept on disk


def test_nearly_all_tokens_kept_is_as_good_as_the_teacher_itself(make: Make) -> None:
    given = make(temperature=1.5)
    lesson, rows = lesson_of(given)
    vocab_size = lesson.teacher.config.vocab_size
    cache = cache_teacher(lesson.teacher, "x", rows, k=vocab_size - 1, temperature=1.5, micro_rows=3)
    taught = rows.next(4)
    kept = dataclasses.replace(lesson, cache=cache)(taught)
    assert kept.item() == pytest.approx(lesson(taught).item(), rel=2e-3)  # fp16
    few = cache_teacher(lesson.teacher, "x", rows, k=4, temperature=1.5, micro_rows=3)
    assert (
        0 < dataclasses.replace(lesson, cache=few)(taught).item() <= kept.item() * 1.001
    )  # a bucket hides what is in it
    assert few.path != cache.path


def test_kept_probabilities_are_the_teachers(make: Make) -> None:
    lesson, rows = lesson_of(make())
    cache = cache_teacher(lesson.teacher, "x", rows, k=5, temperature=1.0, micro_rows=2)
    taught = rows.next(3)
    logps, ids = cache.of(taught.numbers_b)
    batch = taught.batch
    with torch.no_grad():
        expected = lesson.teacher(batch.ids, batch.positions, batch.segments).softmax(-1).topk(5)
    torch.testing.assert_close(logps.exp(), expected.values, atol=1e-3, rtol=1e-3)
    assert cache.ids[0].dtype == np.uint16
    assert isinstance(cache.ids[0], np.memmap)
    real = batch.targets != IGNORE
    assert (ids == expected.indices)[real].float().mean() > 0.99  # equal ones may change places


def test_the_teacher_is_asked_once_and_again_only_for_what_is_damaged(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(teacher_cache, "PART_BYTES", 64 * 6 * 4 * 3)  # three rows a part
    lesson, rows = lesson_of(make())
    asked: list[int] = []
    real = teacher_cache._top_k
    monkeypatch.setattr(
        teacher_cache, "_top_k", lambda teacher, batch, *more: asked.append(len(batch)) or real(teacher, batch, *more)
    )

    def made() -> teacher_cache.TeacherCache:
        asked.clear()
        return cache_teacher(lesson.teacher, "x", rows, k=6, temperature=1.0, micro_rows=2)

    first = made()
    assert sum(asked) == rows.rows_per_epoch
    assert len(first.ids) == math.ceil(rows.rows_per_epoch / 3)
    made()
    assert asked == []
    before = first.of(torch.arange(rows.rows_per_epoch))
    damaged = first.path / "ids-00001.npy"
    damaged.write_bytes(damaged.read_bytes()[:-2])
    (first.path / "part-00002.json").unlink()
    after = made().of(torch.arange(rows.rows_per_epoch))
    assert sum(asked) == 6
    assert "part-00001.json: is damaged" in capsys.readouterr().err
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_more_tokens_than_there_are_cannot_be_kept(make: Make) -> None:
    with pytest.raises(DanluError, match="is the whole vocabulary"):
        distil(make(teacher_top_k=4096))


# ---- layers


def test_watched_scores_are_the_attention_of_transformers(teacher: Path) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(teacher, attn_implementation="eager")
    model, ids = load_model(teacher), torch.arange(24).view(2, 12) + 30
    with torch.no_grad(), watching(model, {0, 2, 3}, attention=True) as seen:
        model(ids)
        found = reference(ids, output_attentions=True, output_hidden_states=True)
        allowed = visible(12, 12, causal=True, window=None, device=ids.device)
        for layer in (0, 2, 3):
            probabilities = seen.scores(layer).masked_fill(~allowed, float("-inf")).softmax(-1)
            torch.testing.assert_close(probabilities, found.attentions[layer], atol=1e-5, rtol=1e-4)
        for layer in (0, 2):  # the last hidden state of transformers is behind the final norm
            torch.testing.assert_close(seen.hidden[layer], found.hidden_states[layer + 1], atol=1e-5, rtol=1e-4)
    assert not any(block._forward_hooks or block.attention._forward_pre_hooks for block in model.layers)


def test_layers_of_oneself_are_no_loss_and_others_are(make: Make) -> None:
    given = make(keep_layers=4, hidden_weight=1.0, attention_weight=1.0)
    lesson, rows = lesson_of(given)
    same = dataclasses.replace(lesson, matching=layer_matching(given, lesson.student, lesson.teacher))
    taught = rows.next(2)
    assert abs(same(taught).item()) < 1e-2
    crossed = dataclasses.replace(given, layer_map={0: 3, 3: 0})
    other = dataclasses.replace(lesson, matching=layer_matching(crossed, lesson.student, lesson.teacher))
    assert other(taught).item() > 10


def test_what_is_padding_or_another_sequence_teaches_no_attention() -> None:
    segments = torch.tensor([[0, 0, 1, -1, -1]])
    assert visible_pairs(segments, causal=True)[0].int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0],
    ]  # fmt: skip
    assert visible_pairs(segments, causal=False)[0, 0].int().tolist() == [1, 1, 0, 0, 0]


def test_the_layer_map_ends_with_the_last_layers() -> None:
    assert spread_map(3, 12) == {0: 3, 1: 7, 2: 11}
    assert spread_map(4, 4) == {0: 0, 1: 1, 2: 2, 3: 3}
    assert spread_map(4, 2) == {0: 0, 1: 0, 2: 1, 3: 1}


def test_projections_are_trained_and_left_behind(make: Make, teacher: Path) -> None:
    """A narrower student that is also shown the layers."""
    out = distil(make(keep_layers=None, size=2, dim=16, n_heads=2, hidden_weight=0.5, attention_weight=0.1, steps=30))
    lines = read_metrics(out / "metrics.jsonl")
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert Card.load(out).metrics["parameters"] == load_model(out).num_parameters()
    wide, narrow = load_model(teacher), load_model(out)
    options: dict[str, Any] = {"hidden_weight": 1.0, "hidden_kind": "cosine", "seed": 0}
    with pytest.raises(DanluError, match="the student has 4 heads and the teacher 2"):
        LayerMatching(_with_heads(4, out.parent), wide, {}, attention_weight=1.0, **options)
    with pytest.raises(DanluError, match="layer_map: the teacher has no layer 4; it has 0 to 3"):
        LayerMatching(narrow, wide, {0: 4}, attention_weight=0.0, **options)
    assert set(LayerMatching(narrow, wide, {1: 3}, attention_weight=0.0, **options).projections) == {"1"}


def _with_heads(n_heads: int, folder: Path) -> Any:
    return load_model(untrained_folder(folder / "heads", n_heads=n_heads, dim=64))


# ---- answers


def test_the_teacher_writes_what_the_student_is_tuned_on(make: Make, teacher: Path, tmp_path: Path) -> None:
    given = make(method="sequence", answer_tokens=20, steps=20, heldout_share=0.0)
    out = distil(given)
    lines = [json.loads(text) for text in (out / "answers-00000.jsonl").read_text().splitlines()]
    assert len(lines) == Card.load(out).metrics["answers"] == 60
    tokenizer = Tokenizer.load(teacher)
    prompts = [tokenizer.encode_chat([{"role": "user", "content": row["prompt"]}], True) for row in sentences(60, 2)]
    assert sorted(line["prompt_ids"] for line in lines) == sorted(prompts)
    with Engine(load_model(teacher), tokenizer=tokenizer) as engine:
        greedy = SamplingParams(max_new_tokens=20, temperature=0)
        expected = engine.generate([line["prompt_ids"] for line in lines[:8]], greedy)
    assert [line["completion"] for line in lines[:8]] == [one.completions[0].text for one in expected]
    assert "answers-00000.jsonl" in Card.load(out).files
    found = read_metrics(out / "metrics.jsonl")
    assert found[-1]["loss"] < 0.5 * found[0]["loss"]


def test_answers_that_are_there_are_not_written_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    given = make(method="sequence", answer_tokens=4, steps=4)
    crash(lambda: distil(given), at_step=2)
    with monkeypatch.context() as patch:
        patch.setattr("danlu.posttraining.answers.Engine", None)
        distil(given)
    broken = make("broken", method="sequence", answer_tokens=4, steps=4)
    crash(lambda: distil(broken), at_step=2)
    (broken.out / "answers-00000.jsonl").write_text("{}\n")
    with pytest.raises(DanluError, match=r"answers-00000.jsonl:1: is not what was written"):
        distil(broken)


def test_prompts_end_where_the_last_answer_begins() -> None:
    no = IGNORE
    assert prompt_of([1, 2, 3, 4, 5], [no, no, 4, 5, 6], 2) == [1, 2, 3]
    assert prompt_of([1, 2, 3, 4, 5, 6], [no, 3, no, 5, 6, no], 2) == [1, 2, 3, 4]
    assert prompt_of([1, 2, 3, 4, 5], [2, 3, 4, 5, 6], 2) == [1, 2]  # a text
    assert prompt_of([1, 2, 3], [2, 3, 4], 9) == [1]
    assert prompt_of([1, 2], [no, no], 9) == []


def test_the_student_is_corrected_in_what_it_writes_itself(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    given = make(on_policy=1.0, answer_tokens=10, steps=12, divergence="reverse_kl", keep_layers=None, size=2, dim=32)
    seen: list[TaughtBatch] = []
    real = Lesson.__call__
    monkeypatch.setattr(Lesson, "__call__", lambda self, taught: seen.append(taught) or real(self, taught))
    out = distil(given)
    assert all(taught.own for taught in seen)
    assert len({taught.batch.ids.numpy().tobytes() for taught in seen}) == len(seen)
    lines = read_metrics(out / "metrics.jsonl")
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    seen.clear()
    distil(make("mixed", on_policy=0.5, answer_tokens=4, steps=12))
    assert {taught.own for taught in seen} == {True, False}


# ---- data folders, and mistakes


def test_documents_of_a_data_folder_are_packed(make: Make, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(30):
        text = "\n".join(f"{row['prompt']} {row['completion']}" for row in sentences(8, i))
        (corpus / f"{i}.txt").write_text(text)
    build_data(
        DataConfig(
            corpus=(str(corpus),), out=tmp_path / "data", heldout=0.2, dedup="exact", skip_filters=("repetition",)
        )
    )
    out = distil(make(data=tmp_path / "data", heldout_share=None, teacher_top_k=8, steps=8))
    found = Card.load(out).metrics
    assert found["heldout_bits_per_byte"] > 0
    assert found["teacher_bits_per_byte"] > 0
    out = distil(make("own", data=tmp_path / "data", heldout_share=None, on_policy=1.0, prompt_tokens=8, steps=2))
    assert Card.load(out).metrics["steps"] == 2


def test_a_student_folder_and_a_finished_run(make: Make, teacher: Path, tmp_path: Path) -> None:
    from danlu.models.load import save_model

    save_model(with_layers(load_model(teacher), (0, 3)), tmp_path / "own", Tokenizer.load(teacher))
    given = make(keep_layers=None, student=tmp_path / "own", steps=3)
    out = distil(given)
    assert [item.role for item in Card.load(out).inputs] == ["teacher", "data", "student"]
    written = (out / "model.safetensors").stat().st_mtime_ns
    assert distil(given) == out
    assert (out / "model.safetensors").stat().st_mtime_ns == written


def test_rows_longer_than_the_context_are_refused(make: Make) -> None:
    given = make(seq_len=256)
    with pytest.raises(DanluError, match=r"seq_len \(256\) is longer than the context of .*teacher \(128\)"):
        distil(given)
    assert not given.out.exists()
    with pytest.raises(DanluError, match=r"keep_layers is 5, and .* has 4 layers"):
        distil(make(keep_layers=5))
