"""What the loop promises: the same gradient however a step is cut, exact resume, skipped spikes, clean stops."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from crashes import crash
from danlu.data.packing import Batch, DocumentSequences, MaskedSequences, RowStream
from danlu.errors import DanluError, Problems
from danlu.formats.card import Card
from danlu.models.causal_lm import CausalLM
from danlu.models.config import model_config_for
from danlu.objectives.causal_lm import next_token_nll_sum
from danlu.training import checkpoint
from danlu.training.config import PretrainConfig
from danlu.training.loop import Trainer
from danlu.training.metrics import read_metrics
from danlu.training.pretrain import default_rates, pretrain

MakeConfig = Callable[..., PretrainConfig]


def losses(out: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(out / "metrics.jsonl")]


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def random_model() -> CausalLM:
    model = CausalLM(model_config_for(1, 300, context=64, dim=32)).train()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(mean=1.0 if p.ndim == 1 else 0.0, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
    return model


def gradients(model: CausalLM, batches: list[Batch]) -> list[Tensor]:
    """Of the loss per target over all batches, accumulated one after the other as the loop does."""
    model.zero_grad()
    n_targets = sum(batch.n_targets for batch in batches)
    for batch in batches:
        hidden = model.hidden_states(batch.ids, batch.positions, batch.segments)
        (next_token_nll_sum(model.head(hidden), batch.targets) / n_targets).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def examples(lengths: list[int]) -> MaskedSequences:
    rng = np.random.default_rng(0)
    return MaskedSequences(
        [(rng.integers(0, 300, n).tolist(), (np.arange(n) >= rng.integers(1, n)).tolist()) for n in lengths]
    )


def test_one_batch_of_eight_equals_eight_of_one() -> None:
    model, stream = random_model(), RowStream(examples([9, 30, 17, 32, 5, 12, 28, 20]), 32, seed=0, pad_id=1)
    whole = stream.first_rows(8)
    for a, b in zip(gradients(model, [whole]), gradients(model, list(whole.split(1))), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_packed_gradient_equals_one_example_a_row() -> None:
    model, sequences = random_model(), examples([9, 14, 6, 5, 12])
    packed = RowStream(sequences, 32, seed=0, pad_id=1)
    assert packed.rows_per_epoch == 2
    alone = [packed.assemble([[(i, 0, int(n))]]) for i, n in enumerate(sequences.lengths)]
    for a, b in zip(gradients(model, [packed.first_rows(2)]), gradients(model, alone), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_loss_is_the_cross_entropy_of_transformers(workbench, make_config: MakeConfig) -> None:
    transformers = pytest.importorskip("transformers")
    out = pretrain(make_config(steps=2))
    reference = transformers.AutoModelForCausalLM.from_pretrained(out)
    from danlu.models.load import load_model

    model = load_model(out)
    ids = torch.randint(0, 360, (2, 32), generator=torch.Generator().manual_seed(0))
    ours = next_token_nll_sum(model(ids[:, :-1]), ids[:, 1:])
    theirs = reference(ids, labels=ids).loss * ids[:, 1:].numel()
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-5)


def test_masked_positions_cannot_poison_the_loss() -> None:
    hidden = torch.randn(1, 4, 8)  # logits of 8 tokens
    hidden[0, 2] = torch.nan
    targets = torch.tensor([[1, 2, -100, 3]])
    assert next_token_nll_sum(hidden, targets).isfinite()


def test_micro_batches_change_nothing_but_the_last_bits(make_config: MakeConfig) -> None:
    outs = [pretrain(make_config(f"micro-{tokens}", micro_batch_tokens=tokens)) for tokens in (64, 512)]
    for (_, a), (_, b) in zip(losses(outs[0]), losses(outs[1]), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_training_learns_and_the_card_tells(make_config: MakeConfig) -> None:
    out = pretrain(make_config(steps=60, heldout_every=20))
    card = Card.load(out)
    lines = read_metrics(out / "metrics.jsonl")
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    assert card.metrics["steps"] == len(lines) == 60
    assert [line["step"] for line in lines if "heldout_bits_per_byte" in line] == [20, 40, 60]
    assert card.metrics["heldout_bits_per_byte"] == lines[-1]["heldout_bits_per_byte"]
    assert card.metrics["tokens"] == 60 * 512
    assert {item.role for item in card.inputs} == {"data", "tokenizer"}
    assert card.details["precision"] == "fp32"
    assert not (out / "checkpoints").exists()
    started = time.monotonic()
    assert pretrain(make_config(steps=60, heldout_every=20)) == out
    assert time.monotonic() - started < 5


def test_zero_steps_give_the_model_as_it_starts(make_config: MakeConfig) -> None:
    from danlu.models.load import load_model

    model = load_model(pretrain(make_config(steps=0)))
    fresh = CausalLM(model.config)
    fresh.init_weights(torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_the_same_seed_gives_the_same_bits_and_another_does_not(make_config: MakeConfig) -> None:
    first, second, other = (pretrain(make_config(name, seed=seed)) for name, seed in (("a", 7), ("b", 7), ("c", 8)))
    assert weights(first) == weights(second) != weights(other)


def command(config: PretrainConfig, *more: str) -> list[str]:
    options = ["data", "tokenizer", "out", "size", "dim", "seq_len", "context", "batch_tokens", "steps", "compile"]
    given = [
        f"{name}={getattr(config, name)}"
        for name in [*options, "micro_batch_tokens", "heldout_tokens", "device", "precision"]
    ]
    return [sys.executable, "-m", "danlu", "pretrain", *given, "log_to=[]", *more]


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(make_config: MakeConfig) -> None:
    """SIGKILL at random moments, some of them inside a checkpoint or an accumulation; several epochs over the data."""
    shape = {"steps": 90, "micro_batch_tokens": 128}
    straight, killed = make_config("straight", **shape), make_config("killed", **shape)
    subprocess.run(command(straight, "checkpoint_every=1000"), check=True, capture_output=True, timeout=120)
    rng, kills = random.Random(0), 0
    for _ in range(40):
        process = subprocess.Popen(
            command(killed, "checkpoint_every=3"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        # Let it reach its steps, then kill it somewhere in the next ones; a late one is let through.
        seen = len(losses(killed.out))
        deadline = time.monotonic() + 60
        while process.poll() is None and len(losses(killed.out)) < seen + 4 and kills < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if kills < 4:
            time.sleep(rng.random() * 0.15)
            process.kill()
            kills += 1
        process.communicate(timeout=120)
        if process.returncode == 0:
            break
    assert kills == 4
    assert process.returncode == 0
    assert losses(killed.out) == losses(straight.out)
    assert weights(killed.out) == weights(straight.out)


@pytest.mark.slow
def test_ctrl_c_saves_and_the_run_goes_on(make_config: MakeConfig) -> None:
    straight, stopped = make_config("straight", steps=120), make_config("stopped", steps=120)
    pretrain(straight)
    process = subprocess.Popen(command(stopped, "checkpoint_every=1000"), stderr=subprocess.PIPE, text=True)
    while len(losses(stopped.out)) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "run the same command again" in said
    assert len(checkpoint.list_checkpoints(stopped.out)) == 1
    assert pretrain(stopped) == stopped.out
    assert losses(stopped.out) == losses(straight.out)
    assert weights(stopped.out) == weights(straight.out)


def test_resume_is_exact_in_bf16(make_config: MakeConfig) -> None:
    straight, broken = (make_config(name, precision="bf16", checkpoint_every=4) for name in ("straight", "broken"))
    pretrain(straight)
    crash(lambda: pretrain(broken), at_step=9)
    pretrain(broken)
    assert losses(broken.out) == losses(straight.out)
    assert weights(broken.out) == weights(straight.out)


@pytest.mark.parametrize("damage", ["truncate", "flip", "no state", "bad json"])
def test_a_damaged_checkpoint_is_passed_over(
    damage: str, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, broken = make_config("straight"), make_config("broken", checkpoint_every=4)
    pretrain(straight)
    crash(lambda: pretrain(broken), at_step=9)
    newest = checkpoint.list_checkpoints(broken.out)[-1]
    tensors, state = newest / "state.safetensors", newest / "state.json"
    if damage == "truncate":
        os.truncate(tensors, tensors.stat().st_size // 2)
    elif damage == "flip":
        content = bytearray(tensors.read_bytes())
        content[-5] ^= 1
        tensors.write_bytes(content)
    elif damage == "no state":
        state.unlink()
    else:
        state.write_text(state.read_text()[:-20])
    pretrain(broken)
    assert "is damaged" in capsys.readouterr().err
    assert losses(broken.out) == losses(straight.out)
    assert weights(broken.out) == weights(straight.out)


def test_a_full_disk_leaves_the_last_checkpoint_whole(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(checkpoint_every=4)
    save, calls = checkpoint.save_file, []

    def full(tensors: dict[str, Tensor], path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(DanluError, match=r"disk is full.*step-00000004"):
            pretrain(config)
    assert sorted(path.name for path in (config.out / "checkpoints").iterdir()) == ["plan.json", "step-00000004"]
    straight = make_config("straight")
    assert weights(pretrain(config)) == weights(pretrain(straight))


def test_a_full_disk_for_real(make_config: MakeConfig) -> None:
    """The kernel refuses to write past a limit, in the middle of a checkpoint."""
    config = make_config(checkpoint_every=4)
    limited = ["bash", "-c", 'ulimit -f 64; exec "$@"', "bash", *command(config, "checkpoint_every=4")]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert not (config.out / "model.safetensors").exists()


def test_spikes_and_nans_are_skipped(make_config: MakeConfig, workbench) -> None:
    config = make_config()
    model = CausalLM(model_config_for(1, 400, context=128, dim=32))
    model.init_weights(torch.Generator().manual_seed(0))
    ids = np.arange(4000, dtype=np.uint16) % 400
    rows = RowStream(DocumentSequences(ids, np.array([0, 4000]), 0), 64, seed=0, pad_id=1)
    trainer = Trainer(config, model, rows, held_out=None, rates=default_rates(config, model.config), batch_tokens=512)
    assert not trainer._acceptable(float("nan"), 1.0)
    assert not trainer._acceptable(1.0, float("inf"))
    for i in range(128):
        assert trainer._acceptable(3.0 + 0.01 * (i % 3), 1.0)
    assert not trainer._acceptable(3.5, 1.0)
    assert not trainer._acceptable(3.0, 5.0)
    assert trainer._acceptable(3.02, 1.01)
    # A step whose gradient is not finite leaves the weights alone.
    trainer.total_steps = 10
    before = [p.detach().clone() for p in model.parameters()]
    trainer.nll_sum = lambda *args: trainer._nll_sum(*args) * float("nan")
    trainer._step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert trainer.progress.skipped == 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions_stay_close_to_fp32(precision: str, make_config: MakeConfig) -> None:
    reference = losses(pretrain(make_config("fp32", precision="fp32", steps=8)))
    out = pretrain(make_config(precision, precision=precision, steps=8))
    for (_, a), (_, b) in zip(reference, losses(out), strict=True):
        assert a == pytest.approx(b, rel=0.02)
    stored = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}  # master weights


@pytest.mark.slow
def test_compiled_equals_eager(make_config: MakeConfig) -> None:
    """Or falls back to eager and says so: either way the same numbers."""
    eager = losses(pretrain(make_config("eager", steps=5)))
    compiled = pretrain(make_config("compiled", steps=5, compile="always"))
    for (_, a), (_, b) in zip(eager, losses(compiled), strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    from danlu.hardware import has_compiler

    assert Card.load(compiled).details["compiled"] == has_compiler()


def test_compile_failure_falls_back_to_eager(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no compiler here")

    expected = losses(pretrain(make_config("eager")))
    monkeypatch.setattr(torch, "compile", broken)
    out = pretrain(make_config("fallback", compile="always"))
    assert "running eager" in capsys.readouterr().err
    assert losses(out) == expected
    assert Card.load(out).details["compiled"] is False


def test_a_budget_of_minutes_becomes_steps_and_timing_them_leaves_no_trace(make_config: MakeConfig) -> None:
    timed = pretrain(make_config("timed", steps=None, minutes=0.05))
    steps = Card.load(timed).metrics["steps"]
    assert steps >= 1
    counted = pretrain(make_config("counted", steps=steps))
    assert losses(timed) == losses(counted)
    assert weights(timed) == weights(counted)


def test_what_only_the_first_measurement_takes_is_not_planned_for(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling it for held-out rows took 20 s, and ten times that was kept free."""
    measure, calls = Trainer.measure_held_out, []

    def slow_at_first(self: Trainer) -> Any:
        if not calls:
            time.sleep(1)
        calls.append(1)
        return measure(self)

    monkeypatch.setattr(Trainer, "measure_held_out", slow_at_first)
    pretrain(make_config("slow", steps=None, minutes=0.1))
    assert len(losses(make_config("slow").out)) > 1


def test_impossible_options_are_told_together(make_config: MakeConfig) -> None:
    config = make_config(steps=5, epochs=1.0, batch_tokens=8, context=16, n_heads=3, n_kv_heads=2)
    with pytest.raises(Problems) as caught:
        pretrain(config)
    text = str(caught.value)
    for part in ("steps and epochs", "batch_tokens (8)", "context (16)", "n_heads (3)"):
        assert part in text


def test_bad_runs_leave_nothing_behind(make_config: MakeConfig, workbench, tmp_path: Path) -> None:
    with pytest.raises(DanluError, match="fewer than one batch"):
        pretrain(make_config("huge", batch_tokens=64_000_000))
    assert not (tmp_path / "huge").exists()
    with pytest.raises(DanluError, match="multiple of n_kv_heads"):
        pretrain(make_config("shape", dim=96, n_kv_heads=2, head_dim=32))
    assert not (tmp_path / "shape").exists()
    out = pretrain(make_config("mine"))
    with pytest.raises(DanluError, match="holds another run"):
        pretrain(make_config("mine", seed=5))
    assert Card.load(out).config["seed"] == 0
    pretrain(make_config("mine", seed=5, overwrite=True))
    assert Card.load(out).config["seed"] == 5
    with pytest.raises(DanluError, match=r"no GPU|there are"):
        pretrain(make_config("gpu", device="cuda:99"))


def test_metrics_go_to_tensorboard(make_config: MakeConfig) -> None:
    out = pretrain(make_config(log_to=("tensorboard",)))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [step for step, _ in losses(out)]
    json.dumps(Card.load(out).metrics)
