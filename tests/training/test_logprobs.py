"""Log-probabilities of packed examples are those of each example alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from danlu.adapters import lora
from danlu.adapters.config import AdapterShape
from danlu.data.packed_examples import Example, pack_examples
from danlu.data.packing import IGNORE
from danlu.models.causal_lm import CausalLM
from danlu.nn.config import ModelConfig, Rope
from danlu.objectives.causal_lm import next_token_nll_sum
from danlu.training import logprobs
from danlu.training.logprobs import nll_sum, target_logprobs

EXAMPLES: list[Example] = [
    ([5, 6, 7, 8, 9], [False, False, True, True, True]),
    ([1, 2], [False, True]),
    ([3, 4, 5], [False, False, False]),
    ([9, 8, 7, 6, 5, 4, 3], [False, False, False, False, True, False, True]),
]


SHARED: list[Example] = [
    *(([1, 2, 3, 4, 5, k, 7, 9 + k], [False, False, True, True, True, k > 6, True, True]) for k in range(5, 10)),
    ([1, 2, 3, 4], [False, True, True, True]),
    ([1, 2, 3, 4], [False, True, False, True]),
    ([9, 8, 7, 1], [False, True, True, True]),
]
"""Examples that begin alike, two of which do not differ at all."""

CONFIG = ModelConfig(
    vocab_size=40, n_layers=2, dim=32, n_heads=2, n_kv_heads=1, head_dim=16, ffn_dim=48, context=64, rope=Rope()
)


@pytest.fixture
def model() -> CausalLM:
    return of(CONFIG)


def of(config: ModelConfig) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def alone(model: CausalLM, example: Example, temperature: float) -> Tensor:
    ids, mask = torch.tensor(example[0]), torch.tensor(example[1])
    logps = (model(ids[None, :-1])[0] / temperature).log_softmax(-1)
    return logps.gather(1, ids[1:, None])[:, 0][mask[1:]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("row_len", [0, 16])
def test_packed_is_alone(model: CausalLM, temperature: float, row_len: int) -> None:
    packed = pack_examples(EXAMPLES, row_len=row_len)
    logps_bt, entropy_bt = target_logprobs(model, packed, temperature=temperature, with_entropy=True)
    assert entropy_bt is not None
    assert not entropy_bt.requires_grad
    for row, mask, example in zip(logps_bt, packed.mask_bt, EXAMPLES, strict=True):
        torch.testing.assert_close(row[mask], alone(model, example, temperature), atol=1e-5, rtol=0)
        assert not row[~mask].any()


def test_gradients_are_those_of_each_alone_whatever_is_made_at_once(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    sum(alone(model, example, 1.0).sum() for example in EXAMPLES).backward()  # type: ignore[union-attr]
    wanted = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    for rows in (2, 1024):
        monkeypatch.setattr(logprobs, "HEAD_ROWS", rows)
        model.zero_grad()
        target_logprobs(model, pack_examples(EXAMPLES))[0].sum().backward()
        found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window": 3},
        {"rope": None, "alibi": "bloom"},
        {"rope": None, "alibi": "falcon"},
        {"rope": None, "learned_positions": True},
        {"rope": None, "relative_buckets": 8, "relative_max_distance": 6},
    ],
    ids=lambda changes: " ".join(changes) or "rope",
)
def test_what_examples_share_is_computed_once_and_counts_for_each(changes: dict[str, Any]) -> None:
    """Wherever positions come in: an answer lies farther from its prompt in the row than in its text."""
    model = of(dataclasses.replace(CONFIG, **changes))
    packed = pack_examples(SHARED, shared_from=2)
    assert packed.n_tokens < sum(len(ids) - 1 for ids, _ in SHARED)
    weights = [torch.linspace(0.5, 2, sum(mask)) for _, mask in SHARED]
    one_by_one = [alone(model, example, 0.7) for example in SHARED]
    sum((logps * w).sum() for logps, w in zip(one_by_one, weights, strict=True)).backward()  # type: ignore[union-attr]
    wanted = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    logps_bt, _ = target_logprobs(model, packed, temperature=0.7)
    torch.testing.assert_close(logps_bt[packed.mask_bt], torch.cat(one_by_one), atol=1e-5, rtol=0)
    (logps_bt[packed.mask_bt] * torch.cat(weights)).sum().backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("adapter", [None, AdapterShape(targets=("lm_head",)), AdapterShape(token_ids=(3, 39))])
@pytest.mark.parametrize("n_targets", [0, 1, 13])
def test_head_and_loss_at_the_targets_alone(
    model: CausalLM, adapter: AdapterShape | None, n_targets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the head is made of, and however few rows of it at a time."""
    if adapter is not None:
        lora.attach(model, adapter)
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                torch.nn.init.normal_(parameter, std=0.3)
    monkeypatch.setattr(logprobs, "HEAD_ROWS", 4)
    monkeypatch.setattr(logprobs, "CPU_LOGITS", 4 * 40)
    ids = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    targets = torch.full((2, 12), IGNORE)
    targets.flatten()[torch.randperm(24)[:n_targets]] = torch.randint(0, 40, (n_targets,))
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def both(hidden: Tensor) -> tuple[Tensor, Tensor]:
        return nll_sum(model.head, hidden, targets), next_token_nll_sum(model.head(hidden), targets)

    found, wanted = (
        (
            value.detach(),
            torch.autograd.grad(value, learned, allow_unused=True, materialize_grads=True, retain_graph=True),
        )
        for value in both(model.hidden_states(ids).requires_grad_())
    )
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    # Hidden states without a target do not reach the head: NaN in them changes nothing.
    hidden = model.hidden_states(ids).detach().masked_fill((targets == IGNORE)[..., None], float("nan"))
    torch.testing.assert_close(nll_sum(model.head, hidden, targets).detach(), wanted[0], atol=1e-5, rtol=1e-5)
