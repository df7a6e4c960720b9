"""An adapter that begins with what 4 bits have lost: the best of its rank for the outputs, in every family's layout."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from adapter_models import VOCAB, save_random
from torch import Tensor, nn

from danlu.adapters.config import AdapterShape, Kind
from danlu.adapters.lora import LoRALinear, attach
from danlu.adapters.quantization_error import LENGTH, ROWS, begin_with, lost_in_4_bits
from danlu.adapters.sites import choose, n_weights
from danlu.models.heads import SequenceClassifier
from danlu.models.load import load_model
from danlu.models.transformer import Transformer
from danlu.quantization.nf4 import dequantize_nf4, quantize_nf4
from danlu.quantization.packed_linear import quantize_linears
from random_lm import random_lm


def with_start(model: Transformer, rank: int, kind: Kind = "lora", targets: tuple[str, ...] = ()) -> Transformer:
    """The model in 4 bits, with such an adapter."""
    shape = AdapterShape(kind, rank, targets=targets)
    _, chosen = choose(model, shape)
    starts = lost_in_4_bits(model, chosen, rank)
    quantize_linears(model)
    attach(model, shape)
    begin_with(model, chosen, starts)
    return model.eval()


def inputs_of(model: Transformer, name: str) -> Tensor:
    """What a layer reads while the sizes of its inputs are taken, (tokens, in)."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2)))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for _ in range(ROWS):
            model.hidden_states(torch.randint(model.config.vocab_size, (1, min(LENGTH, model.config.context))))
    hook.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("name", ["layers.0.attention.q_proj", "layers.1.mlp.down_proj"])
def test_no_update_of_the_rank_leaves_less(name: str) -> None:
    """By the exact singular value decomposition; and it lowers the error of the outputs, too."""
    model = random_lm(VOCAB, context=64, std=0.1)
    weight = model.get_submodule(name).weight.detach().clone()
    x = inputs_of(model, name)
    adapted = with_start(copy.deepcopy(model), 4).get_submodule(name)
    assert isinstance(adapted, LoRALinear)
    lost = weight - dequantize_nf4(quantize_nf4(weight))
    size = x.square().mean(dim=0).sqrt()
    left = torch.linalg.svdvals(lost * size)[4:].square().sum().sqrt()
    found = (weight - adapted.effective_weight()) * size
    torch.testing.assert_close(found.norm(), left, rtol=0.01, atol=0)
    assert (x @ (weight - adapted.effective_weight()).T).norm() < 0.95 * (x @ lost.T).norm()


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "bloom", "bert"])
def test_the_whole_rank_gives_all_back(family: str, kind: Kind, tmp_path: Path) -> None:
    more = {"num_key_value_heads": 4} if family == "llama" else {}
    folder = save_random(tmp_path, family, **more)
    model: Transformer = load_model(folder) if family != "bert" else open_classifier(folder)
    ids = torch.randint(VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model.eval().hidden_states(ids)
        found = with_start(model, 32, kind).hidden_states(ids)
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-3)


def open_classifier(folder: Path) -> Transformer:
    """An encoder with a fresh head."""
    return load_model(folder, SequenceClassifier, new_head=True, labels=("a", "b"))


def test_draws_nothing_from_the_generators_and_leaves_the_model_as_it_was() -> None:
    model = random_lm(VOCAB, context=32).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    _, chosen = choose(model, AdapterShape(rank=2))
    one, other = (lost_in_4_bits(model, chosen, 2, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    for theirs in one:
        assert torch.equal(one[theirs][0], other[theirs][0])


def test_a_head_is_not_quantized_and_begins_at_zero() -> None:
    model = random_lm(VOCAB, context=32, tie_embeddings=False)
    adapted = with_start(model, 2, targets=("q_proj", "lm_head"))
    head, query = adapted.get_submodule("head"), adapted.get_submodule("layers.0.attention.q_proj")
    assert isinstance(head, LoRALinear)
    assert isinstance(query, LoRALinear)
    assert isinstance(head.adapters["default"].b, nn.Parameter)
    assert not bool(head.adapters["default"].b.any())
    assert bool(query.adapters["default"].b.any())
    assert n_weights(adapted) > 0
