"""Fine-tuning: every row format, loss on answers only, exact packing, and errors with file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from crashes import crash
from danlu.data.packing import IGNORE, MaskedSequences, RowStream
from danlu.errors import DanluError
from danlu.formats.card import Card
from danlu.models.load import load_model
from danlu.objectives.causal_lm import next_token_nll_sum
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.training import checkpoint
from danlu.training.config import FinetuneConfig
from danlu.training.finetune import finetune, read_examples
from danlu.training.metrics import read_metrics
from danlu.training.pretrain import pretrain

MESSAGES = [{"role": "user", "content": "Add one."}, {"role": "assistant", "content": "return first + 1"}]
FORMATS: dict[str, dict[str, Any]] = {
    "messages": {"messages": MESSAGES},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Add one."}, {"from": "gpt", "value": "return first + 1"}]
    },
    "alpaca": {"instruction": "Add one.", "input": "", "output": "return first + 1"},
    "prompt": {"prompt": "Add one.", "completion": "return first + 1"},
}


@pytest.fixture(scope="module")
def base(workbench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain(workbench.config(tmp_path_factory.mktemp("base") / "model", steps=4))


@pytest.fixture
def make(base: Path, tmp_path: Path) -> Callable[..., FinetuneConfig]:
    def config(rows: list[Any], name: str = "tuned", **changes: Any) -> FinetuneConfig:
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        values: dict[str, Any] = {
            "model": base, "data": data, "out": tmp_path / name, "seq_len": 64, "batch_tokens": 256, "steps": 4,
            "log_to": (), "compile": "never", "device": "cpu", "precision": "fp32", "heldout_share": 0.0,
        }  # fmt: skip
        return FinetuneConfig(**{**values, **changes})

    return config


def rows(n: int = 40) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"Add {i}."},
                {"role": "assistant", "content": f"return first + {i}"},
            ]
        }
        for i in range(n)
    ]


def test_all_formats_give_the_same_examples(make: Callable[..., FinetuneConfig], base: Path) -> None:
    tokenizer = Tokenizer.load(base)
    found = [read_examples(make([row], name), tokenizer)[0] for name, row in FORMATS.items()]
    assert all(examples == found[0] for examples in found)
    ((ids, mask),) = found[0]
    learned = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
    assert learned == "return first + 1<|im_end|>"


def test_plain_text_rows_are_learned_whole(make: Callable[..., FinetuneConfig], base: Path) -> None:
    tokenizer = Tokenizer.load(base)
    ((ids, mask),), _ = read_examples(make([{"text": "x = 1\n"}]), tokenizer)
    assert ids[0] == ids[-1] == tokenizer.bos_id
    assert tokenizer.decode(ids[1:-1]) == "x = 1\n"
    assert all(mask)


def test_it_learns_the_answers_and_not_the_prompts(make: Callable[..., FinetuneConfig], base: Path) -> None:
    config = make(rows(), steps=60, lr_scale=1.0, embed_lr=0.01)
    out = finetune(config)
    lines = read_metrics(out / "metrics.jsonl")
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    card = Card.load(out)
    assert card.verb == "finetune"
    assert card.metrics["examples"] == 40
    assert [item.role for item in card.inputs] == ["model", "data"]
    assert card.inputs[0].card is not None
    assert card.inputs[0].card["verb"] == "pretrain"
    tokenizer = Tokenizer.load(out)

    def loss(folder: Path, wanted: bool) -> float:
        model, total = load_model(folder), 0.0
        for row in rows(8):
            ids, mask = tokenizer.encode_chat_with_mask(row["messages"])
            targets = torch.tensor([[i if m == wanted else -100 for i, m in zip(ids[1:], mask[1:], strict=True)]])
            hidden = model.hidden_states(torch.tensor([ids[:-1]]))
            total += next_token_nll_sum(model.head(hidden), targets).item()
        return total

    assert loss(out, True) < 0.5 * loss(base, True)
    everything = finetune(make(rows(), "all", steps=60, lr_scale=1.0, embed_lr=0.01, train_on="all"))
    assert loss(everything, False) < 0.5 * loss(out, False)  # prompts are learned only when that is asked for


def test_first_loss_is_the_mean_over_answer_tokens(make: Callable[..., FinetuneConfig], base: Path) -> None:
    config = make(rows(6), steps=1, batch_tokens=64 * 6)
    out = finetune(config)
    tokenizer, model = Tokenizer.load(base), load_model(base)
    total, count = 0.0, 0
    examples, _ = read_examples(config, tokenizer)
    batch = RowStream(MaskedSequences(examples), 64, seed=0, pad_id=tokenizer.pad_id).next(6)
    for ids, targets, positions, segments in zip(
        batch.ids, batch.targets, batch.positions, batch.segments, strict=True
    ):
        for number in set(segments[targets != IGNORE].tolist()):
            here = segments == number
            assert positions[here][0] == 0
            hidden = model.hidden_states(ids[here][None])  # each example alone, as if it had never been packed
            total += next_token_nll_sum(model.head(hidden), targets[here][None]).item()
            count += int((targets[here] != IGNORE).sum())
    assert read_metrics(out / "metrics.jsonl")[0]["loss"] == pytest.approx(total / count, abs=1e-4)


def test_resume_is_exact_across_epochs(make: Callable[..., FinetuneConfig]) -> None:
    straight = make(rows(), "straight", steps=30)
    broken = make(rows(), "broken", steps=30, data=straight.data, checkpoint_every=7)
    finetune(straight)
    crash(lambda: finetune(broken), at_step=17)
    assert checkpoint.list_checkpoints(broken.out)[-1].name == "step-00000014"
    finetune(broken)
    a, b = (load_file(config.out / "model.safetensors") for config in (straight, broken))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_held_out_rows_are_not_trained_on(make: Callable[..., FinetuneConfig], base: Path) -> None:
    train, held_out = read_examples(make(rows(200), heldout_share=0.2), Tokenizer.load(base))
    assert 20 <= len(held_out) <= 60
    assert len(train) + len(held_out) == 200
    assert not {str(e) for e in train} & {str(e) for e in held_out}
    out = finetune(make(rows(200), heldout_share=0.2))
    assert Card.load(out).metrics["heldout_bits_per_byte"] > 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"messages": [{"role": "user"', r":2"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, r":2.*wizard"),
        ({"messages": []}, r":2.*messages"),
        ({"foo": 1}, r":2"),
        ([1, 2], r":2"),
    ],
)
def test_bad_rows_are_told_with_file_and_line(
    bad: Any, message: str, make: Callable[..., FinetuneConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    broken = [rows(1)[0], bad, *rows(12)]
    config = make(broken)
    with pytest.raises(DanluError, match=message) as caught:
        finetune(config)
    assert str(config.data) in str(caught.value)
    assert not config.out.exists()
    skipping = make(broken, "skipping", on_error="skip")
    assert Card.load(finetune(skipping)).metrics["examples"] == 13
    assert "1 of 14 rows skipped" in capsys.readouterr().err


def test_rows_that_do_not_fit_are_counted(
    make: Callable[..., FinetuneConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"prompt": "x", "completion": "long answer " * 200}
    finetune(make([*rows(12), long]))
    assert "1 of 13 rows are longer than seq_len" in capsys.readouterr().err
    with pytest.raises(DanluError, match="no row is left"):
        finetune(make([long], "nothing"))
    with pytest.raises(DanluError, match="longer than the context"):
        finetune(make(rows(), "wide", seq_len=4096, batch_tokens=4096))


@pytest.mark.slow
def test_experts_are_balanced_when_it_is_asked_for(base: Path, make: Callable[..., FinetuneConfig]) -> None:
    """Routers that send every token to the same two of four experts learn to spread them."""
    from transformers import MixtralConfig, MixtralForCausalLM

    from danlu.objectives.routing import load_balancing_loss

    tokenizer = Tokenizer.load(base)
    torch.manual_seed(0)
    reference = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, max_position_embeddings=128,
        )
    )  # fmt: skip
    rows = [{"text": f"def f{i}(x): return x + {i}"} for i in range(40)]

    def imbalance(folder: Path) -> float:
        """2 when balanced, 4 when all tokens go the same way."""
        routings: list[Any] = []
        model = load_model(folder)
        model.hidden_states(torch.tensor([tokenizer.encode(rows[3]["text"])]), routings=routings)
        return load_balancing_loss([routing.logits_ne for routing in routings], 2).item()

    def tuned(name: str, **changes: Any) -> Path:
        folder = base.parent / f"mixture-{name}"
        with torch.no_grad():
            for layer in reference.model.layers:  # all tokens prefer the experts 0 and 1
                layer.mlp.gate.weight.copy_(torch.tensor([[0.5], [0.4], [0.0], [0.0]]).expand(4, 32))
                layer.post_attention_layernorm.weight.fill_(1.0)
        reference.save_pretrained(folder)
        tokenizer.save(folder)
        return finetune(make(rows, name, model=folder, steps=30, lr_scale=0.3, train_on="all", **changes))

    balanced, alone = imbalance(tuned("balanced", balance_loss=1.0, router_z_loss=0.01)), imbalance(tuned("alone"))
    assert balanced < 2.3
    assert balanced < alone - 0.3
    with pytest.raises(DanluError, match="mixtures of experts"):
        finetune(make(rows, "dense", balance_loss=0.1))
