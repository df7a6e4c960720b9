"""NEFTune: noise of the size that the paper gives it, in training only."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crashes import crash
from danlu.data.packing import MaskedSequences, RowStream
from danlu.errors import Problems
from danlu.models.causal_lm import CausalLM
from danlu.nn.config import ModelConfig, Rope
from danlu.training.config import FinetuneConfig, TrainingConfig
from danlu.training.finetune import finetune
from danlu.training.loop import HeldOut, Trainer
from danlu.training.metrics import read_metrics
from danlu.training.neftune import noise_amplitude
from danlu.training.pretrain import pretrain

SHAPE = ModelConfig(
    vocab_size=40, n_layers=1, dim=64, n_heads=2, n_kv_heads=1, head_dim=32, ffn_dim=48, context=512, rope=Rope()
)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.integers(1, 9), max_size=5), min_size=1, max_size=4))
def test_packed_is_alone(rows: list[list[int]]) -> None:
    """Each document's amplitude is that of its own length, whatever it is packed with; padding has none."""
    width = max(1, *(sum(row) for row in rows)) + 2
    segments = torch.full((len(rows), width), -1)
    wanted = torch.zeros(len(rows), width)
    for r, row in enumerate(rows):
        at = 0
        for number, length in enumerate(row):
            segments[r, at : at + length] = number
            wanted[r, at : at + length] = 5 / math.sqrt(length * 64)
            at += length
    torch.testing.assert_close(noise_amplitude(segments, 64, 5.0), wanted)


def test_variance_and_length_of_the_noise() -> None:
    """Uniform within a: variance a^2 / 3, and over a whole document a length of alpha / sqrt(3)."""
    torch.manual_seed(0)
    model, alpha = CausalLM(SHAPE), 5.0
    ids, segments = torch.randint(0, 40, (1, 400)), torch.tensor([[0] * 300 + [1] * 80 + [-1] * 20])
    noise_bt = noise_amplitude(segments, 64, alpha)
    clean = model._embed(ids, ids, None)
    noise = (model._embed(ids, ids, None, noise_bt) - clean)[0]
    for here, length in ((slice(0, 300), 300), (slice(300, 380), 80)):
        bound = alpha / math.sqrt(length * 64)
        assert noise[here].abs().max() <= bound * 1.001
        assert noise[here].var().item() == pytest.approx(bound**2 / 3, rel=0.05)
        assert noise[here].norm().item() == pytest.approx(alpha / math.sqrt(3), rel=0.03)
        assert abs(noise[here].mean().item()) < 0.02 * bound
    assert not noise[380:].any()


def test_it_is_off_where_the_model_is_measured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CausalLM(SHAPE)
    torch.nn.init.normal_(model.head.weight)
    examples = MaskedSequences([([i % 40 for i in range(n)], [True] * n) for n in (9, 30, 17)])
    rows = RowStream(examples, 32, seed=0, pad_id=0)
    held_out = HeldOut(rows.first_rows(2), torch.ones(40, dtype=torch.long))
    config = TrainingConfig(out=tmp_path, steps=1, precision="fp32", device="cpu", compile="never", log_to=())
    rates = dict.fromkeys(("matrix_lr", "embed_lr", "head_lr", "norm_lr"), 1e-3)

    def measured(alpha: float) -> tuple[float, float]:
        trainer = Trainer(
            config, model, rows, held_out=held_out, rates=rates, batch_tokens=64, neftune_alpha=alpha
        )  # fmt: skip
        learned = trainer.loss_sum(held_out.batch).item()
        found = trainer.measure_held_out()["heldout_bits_per_byte"]
        assert found is not None
        return learned, found

    (plain, heldout), (noisy, heldout_beside_noise) = measured(0.0), measured(20.0)
    assert heldout == heldout_beside_noise
    assert abs(noisy - plain) > 1e-3 * plain


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_resumed_run_draws_the_same_noise(workbench: Any, tmp_path: Path, adapter: str) -> None:
    base, data = pretrain(workbench.config(tmp_path / "base", steps=1)), tmp_path / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"Add {i}.", "completion": f"first + {i}"}) + "\n" for i in range(40))
    )

    def config(name: str, alpha: float = 5.0) -> FinetuneConfig:
        return FinetuneConfig(
            model=base, data=data, out=tmp_path / name, seq_len=64, batch_tokens=128, steps=6, checkpoint_every=2,
            log_to=(), compile="never", device="cpu", precision="fp32", neftune_alpha=alpha, adapter=adapter,
        )  # type: ignore[arg-type]  # fmt: skip

    def losses(name: str) -> list[Any]:
        return [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]

    finetune(config("straight"))
    crash(lambda: finetune(config("broken")), at_step=5)
    finetune(config("broken"))
    assert losses("broken") == losses("straight")
    finetune(config("quiet", 0.0))
    assert losses("quiet")[0] != losses("straight")[0]


def test_it_is_refused_for_other_tasks(tmp_path: Path) -> None:
    with pytest.raises(Problems, match="neftune_alpha is for task=causal, not classify"):
        finetune(
            FinetuneConfig(model=tmp_path, data=tmp_path, out=tmp_path / "out", task="classify", neftune_alpha=5.0)
        )
