"""Learning from preferences: the losses are what the papers say, however a step is cut; runs resume exactly."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from preference_rows import pairs, write
from torch import Tensor
from transformers import AutoModelForCausalLM

from crashes import crash
from danlu.adapters.config import AdapterShape
from danlu.adapters.lora import attach
from danlu.adapters.open import open_adapted
from danlu.errors import DanluError, Problems
from danlu.formats.card import Card
from danlu.models.load import load_model, save_model
from danlu.posttraining.align import align
from danlu.posttraining.config import REFERENCE_FREE, AlignConfig
from danlu.posttraining.dpo import PreferenceJudge, other_answers
from danlu.posttraining.judged import StepLoss
from danlu.posttraining.preferences import Group, GroupBatch, batch_of, read_groups
from danlu.posttraining.reference import StoredReference, compute_logps
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.training.metrics import read_metrics

Make = Callable[..., AlignConfig]
LOSSES = ("sigmoid", "ipo", "hinge", "robust", "kto", "orpo", "simpo")
CPU = torch.device("cpu")


@pytest.fixture
def make(model_folder: Path, tmp_path: Path) -> Make:
    def config(name: str = "aligned", **changes: Any) -> AlignConfig:
        data = tmp_path / "rows.jsonl"
        values: dict[str, Any] = {
            "model": model_folder, "data": data if data.exists() else write(data, pairs()), "out": tmp_path / name,
            "steps": 4, "batch_size": 6, "seq_len": 128, "log_to": (), "device": "cpu", "precision": "fp32",
            "lr_scale": 100,
        }  # fmt: skip
        return AlignConfig(**{**values, **changes})

    return config


def lines(out: Path) -> list[dict[str, Any]]:
    return read_metrics(out / "metrics.jsonl")


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in lines(out)]


def weights(out: Path) -> bytes:
    return next(out.glob("*model.safetensors")).read_bytes()


def judge_of(config: AlignConfig) -> tuple[PreferenceJudge, GroupBatch]:
    """A judge whose policy is not its reference, and some groups."""
    tokenizer, model = Tokenizer.load(config.model), load_model(config.model)
    judged = read_groups(config, tokenizer, "singles" if config.loss == "kto" else "pairs")
    judge = PreferenceJudge(config, model, judged)
    if config.loss not in REFERENCE_FREE:
        stored = {
            name: StoredReference.of(groups, compute_logps(model, groups, micro_tokens=300, device=CPU, pad_id=0))
            for name, groups in judge.lists.items()
        }
        judge.ask(stored.get)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    return judge, batch_of(judged.train, tokenizer.pad_id)


def summed_logps(folder: Path, groups: list[Group]) -> Tensor:
    """By transformers, one example at a time: (groups, examples)."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for group in groups:
        for ids, mask in group.examples:
            with torch.no_grad():
                logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            targets = torch.tensor(ids[1:])[:, None]
            found.append(logps.gather(1, targets)[:, 0][torch.tensor(mask[1:])].sum())
    return torch.stack(found).view(len(groups), -1)


def test_dpo_is_what_transformers_and_the_paper_give(make: Make, tmp_path: Path) -> None:
    config = make()
    judge, batch = judge_of(config)
    policy_folder = tmp_path / "policy"
    save_model(judge.model, policy_folder, Tokenizer.load(config.model))
    policy, reference = (summed_logps(f, list(batch.groups)) for f in (policy_folder, config.model))
    margins = 0.1 * ((policy - reference)[:, 0] - (policy - reference)[:, 1])
    found, figures = judge(batch, False)
    torch.testing.assert_close(found, -F.logsigmoid(margins), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(figures["margin"], margins, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(figures["logps_rejected"], policy[:, 1], atol=1e-3, rtol=1e-5)
    assert figures["accuracy"].tolist() == (margins > 0).float().tolist()


@pytest.mark.parametrize(
    ("loss", "start"), [("sigmoid", math.log(2)), ("ipo", 25.0), ("hinge", 1.0), ("robust", math.log(2)), ("kto", 0.5)]
)
def test_a_policy_that_is_its_reference_starts_at_the_closed_form(loss: str, start: float, make: Make) -> None:
    more = {"label_smoothing": 0.1} if loss == "robust" else {}
    first = lines(align(make(loss=loss, steps=1, **more)))[0]
    assert first["loss"] == pytest.approx(start, abs=1e-4)
    assert first["kl"] == pytest.approx(0, abs=1e-6)


def gradients(judge: PreferenceJudge, parts: list[GroupBatch], n: int) -> list[Tensor]:
    judge.model.zero_grad()
    loss = StepLoss(judge)
    for part in parts:
        (loss(part) / n).backward()
    return [p.grad.clone() for p in judge.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("loss", LOSSES)
def test_one_step_in_pieces_is_the_same_step(loss: str, make: Make) -> None:
    judge, batch = judge_of(make(loss=loss, label_smoothing=0.1 if loss in ("sigmoid", "robust") else 0.0))
    whole = gradients(judge, list(batch.split(1000)), batch.n_targets)
    cut = list(batch.split(1))
    assert len(cut) > 5
    for a, b in zip(whole, gradients(judge, cut, batch.n_targets), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6 * max(1.0, float(a.abs().max())), rtol=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns(loss: str, make: Make) -> None:
    more = {"label_smoothing": 0.1} if loss == "robust" else {}
    out = align(make(loss=loss, steps=25, heldout_share=0.3, **more))
    metrics = Card.load(out).metrics
    assert metrics["heldout_accuracy"] > 0.7
    low, high = metrics["heldout_accuracy_interval"]
    assert low <= metrics["heldout_accuracy"] <= high
    if loss == "kto":
        assert metrics["heldout_reward_good"] > metrics["heldout_reward_bad"]
    else:
        assert metrics["heldout_margin"] > 0
        assert sum(line["margin"] for line in lines(out)[-5:]) > sum(line["margin"] for line in lines(out)[:5])
    assert ("heldout_kl" in metrics) is (loss not in ("orpo", "simpo"))
    assert not (out / "checkpoints").exists()
    assert {item.role for item in Card.load(out).inputs} == {"model", "data"}


def test_the_supervised_term_is_the_mean_over_the_chosen_answer(make: Make) -> None:
    (plain, batch), (more, _) = judge_of(make()), judge_of(make(sft_weight=0.5))
    lengths = torch.tensor([sum(group.examples[0][1]) for group in batch.groups])
    losses, figures = plain(batch, False)
    torch.testing.assert_close(more(batch, False)[0], losses - 0.5 * figures["logps_chosen"] / lengths)


def test_answers_of_others_go_with_each_prompt() -> None:
    def group(prompt: list[int], answer: list[int]) -> Group:
        return Group((([*prompt, *answer], [False] * len(prompt) + [True] * len(answer)),), (), True, None, "here")

    groups = [group([1, 2], [5]), group([1, 2], [6]), group([3], [7, 8, 9]), group([4], [5, 5])]
    found = [list(one.examples[0][0]) for one in other_answers(groups, 4)]
    assert found == [[1, 2, 7, 8, 9], [1, 2, 7, 8, 9], [3, 5, 5], [4, 5]]
    with pytest.raises(DanluError, match="all rows have one prompt"):
        other_answers(groups[:2], 4)


def test_dropout_is_off_in_the_reference(make: Make) -> None:
    config = make()
    judged = read_groups(config, Tokenizer.load(config.model), "pairs")
    model = load_model(config.model)
    expected = compute_logps(model, judged.train, micro_tokens=400, device=CPU, pad_id=0)
    attach(model, AdapterShape(rank=4, dropout=0.5))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".b"):
                p.normal_()
    attached = compute_logps(model.train(), judged.train, micro_tokens=400, device=CPU, pad_id=0)
    assert model.training
    assert not torch.allclose(attached, expected)
    again = compute_logps(model, judged.train, micro_tokens=400, device=CPU, pad_id=0)
    assert torch.equal(attached, again)


def test_the_model_without_its_adapter_is_the_reference_that_was_computed_before(make: Make) -> None:
    changes = {"adapter": "lora", "rank": 4, "lr_scale": 20}
    before, never = (align(make(how, precompute=how, **changes)) for how in ("always", "never"))
    assert losses(before) == pytest.approx(losses(never), abs=1e-5)
    assert losses(before)[-1] < losses(before)[0] - 0.001
    assert (before / "adapter_config.json").exists()
    assert Card.load(before).kind == "adapter"
    assert Card.load(before).metrics["heldout_kl"] > 0


def test_new_tokens_are_read_as_such_and_learned(make: Make, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {i}", "chosen": f"<call>{i}", "rejected": f"no {i}"} for i in range(20)]
    data = write(tmp_path / "calls.jsonl", rows)
    out = align(make(data=data, adapter="lora", new_tokens=("<call>",), lr_scale=20, steps=3))
    before, (model, tokenizer) = load_model(make().model), open_adapted(out, merged=True)
    row = model.embed.weight[tokenizer.id_of("<call>")]
    assert (row - before.embed.weight.mean(dim=0)).abs().max() > 1e-3


@pytest.mark.parametrize("changes", [{}, {"loss": "kto"}, {"adapter": "lora", "dropout": 0.2, "precompute": "never"}])
def test_a_resumed_run_ends_with_the_same_bits(
    changes: dict[str, Any], make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, broken = (make(name, steps=9, checkpoint_every=2, **changes) for name in ("straight", "broken"))
    align(straight)
    crash(lambda: align(broken), at_step=7)
    if "precompute" not in changes:  # what was computed before the first step is not computed again
        assert (broken.out / "checkpoints" / "reference.safetensors").exists()
        monkeypatch.setattr("danlu.posttraining.dpo.compute_logps", None)
    align(broken)
    assert losses(broken.out) == losses(straight.out)
    assert weights(broken.out) == weights(straight.out)


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(make: Make) -> None:
    straight, killed = (make(name, steps=30) for name in ("straight", "killed"))
    align(straight)
    options = [f"{name}={getattr(killed, name)}" for name in (
        "model", "data", "out", "steps", "batch_size", "seq_len", "device", "precision", "lr_scale")]  # fmt: skip
    command = [sys.executable, "-m", "danlu", "align", *options, "log_to=[]", "checkpoint_every=2"]
    for number in range(3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline, seen = time.monotonic() + 120, len(lines(killed.out))
        while number < 2 and process.poll() is None and len(lines(killed.out)) < seen + 5:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if number < 2:
            process.kill()
        process.communicate(timeout=120)
    assert process.returncode == 0
    assert losses(killed.out) == losses(straight.out)
    assert weights(killed.out) == weights(straight.out)


def test_a_damaged_reference_is_computed_again(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    straight, broken = (make(name, steps=4, checkpoint_every=2) for name in ("straight", "broken"))
    align(straight)
    crash(lambda: align(broken), at_step=3)
    stored = broken.out / "checkpoints" / "reference.safetensors"
    stored.write_bytes(stored.read_bytes()[:50])
    align(broken)
    assert "is damaged" in capsys.readouterr().err
    assert weights(broken.out) == weights(straight.out)


def test_another_reference_holds_the_model_elsewhere(make: Make, tmp_path: Path) -> None:
    other, tokenizer = load_model(make().model), Tokenizer.load(make().model)
    with torch.no_grad():
        other.embed.weight.mul_(1.5)
    save_model(other, tmp_path / "other", tokenizer)
    out = align(make(reference=tmp_path / "other", steps=1))
    assert lines(out)[0]["kl"] > 1e-3
    assert "reference" in {item.role for item in Card.load(out).inputs}


def test_a_reference_with_another_tokenizer_is_refused(make: Make, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(make().model)
    changed = Tokenizer(tokenizer.definition, {**tokenizer.config, "chat_template": "{{ messages[0].content }}"})
    save_model(load_model(make().model), tmp_path / "other", changed)
    config = make(reference=tmp_path / "other")
    with pytest.raises(DanluError, match="another tokenizer"):
        align(config)
    assert not config.out.exists()


def test_kto_measures_held_out_answers_to_a_single_prompt(make: Make, tmp_path: Path) -> None:
    held_out = [{"prompt": "one", "completion": answer, "label": answer == "a"} for answer in ("a", "b")]
    config = make(loss="kto", steps=1, heldout=write(tmp_path / "heldout.jsonl", held_out))
    assert Card.load(align(config)).metrics["heldout_loss"] == pytest.approx(0.5, abs=0.05)


def test_what_cannot_be_is_told_together(make: Make) -> None:
    config = make(loss="orpo", label_smoothing=0.1, reference=make().model, batch_tokens=4096, desirable_weight=2.0,
                  precompute="never", compile="always")  # fmt: skip
    with pytest.raises(Problems) as caught:
        align(config)
    for part in ("label_smoothing is for loss=sigmoid or robust or simpo, not orpo", "reference is for", "batch_tokens",
                 "desirable_weight is for loss=kto", "precompute=never takes", "compile=always"):  # fmt: skip
        assert part in str(caught.value)
    with pytest.raises(Problems, match="label_smoothing"):
        align(make(loss="robust"))
    with pytest.raises(DanluError, match=r"seq_len \(8192\) is longer than the context"):
        align(make(seq_len=8192))
    assert not make().out.exists()


def test_rows_that_cannot_be_used_stop_or_are_skipped(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "rows.jsonl", [*pairs(20), {"prompt": "p", "chosen": "a", "rejected": "a "}])
    with pytest.raises(DanluError, match=r"rows\.jsonl:21: two answers are the same"):
        align(make())
    assert not make().out.exists()
    align(make(on_error="skip", steps=1))
    assert "1 of 21 rows skipped" in " ".join(capsys.readouterr().err.split())
