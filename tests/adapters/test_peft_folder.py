"""PEFT is the oracle: what it wrote gives the same logits here, and what is written here gives the same logits there,
for families that store matrices as we do, turned round, and several in one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import FAMILIES, assert_close, opened_by_peft, peft_model, random_ids, randomize, save_random
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from danlu.adapters.config import AdapterShape
from danlu.adapters.lora import attach, merge
from danlu.adapters.peft_folder import load_adapter, save_adapter
from danlu.adapters.token_rows import enlarge
from danlu.adapters.wrapper import disabled
from danlu.engine.adapters import read_updates
from danlu.errors import DanluError
from danlu.models.heads import SequenceClassifier
from danlu.models.load import load_model

Base = Callable[[str], Path]
CAUSAL = [family for family in FAMILIES if family not in ("bert", "roberta")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The folder of a random model of a family."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = save_random(tmp_path_factory.mktemp("base"), family)
        return made[family]

    return folder


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", CAUSAL)
def test_logits_are_those_of_peft_both_ways(base: Base, tmp_path: Path, family: str, dora: bool) -> None:
    targets = ["q_proj", "v_proj"] if family == "mixtral" else "all-linear"  # PEFT's all-linear takes experts, too
    reference = peft_model(base(family), use_dora=dora, use_rslora=dora, target_modules=targets)
    reference.save_pretrained(tmp_path / "theirs")
    ids = random_ids(2, 12)
    model = load_model(base(family))
    with torch.no_grad():
        plain, expected = model(ids), reference(ids).logits
        load_adapter(model, tmp_path / "theirs")
        assert_close(model(ids), expected)
        with disabled(model):
            assert torch.equal(model(ids), plain)
        assert (expected - plain).abs().max() > 0.05  # the adapter does something
        save_adapter(model, tmp_path / "ours", base(family))
        assert_close(opened_by_peft(base(family), tmp_path / "ours")(ids).logits, expected)
    theirs, ours = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


def test_ranks_and_alphas_by_pattern(base: Base, tmp_path: Path) -> None:
    reference = peft_model(
        base("llama"),
        rank_pattern={"v_proj": 5, r"^model.layers.1.mlp.down_proj": 2, r".*\.up_proj": 1},
        alpha_pattern={"0.self_attn.q_proj": 9},
    )
    reference.save_pretrained(tmp_path / "theirs")
    ids, model = random_ids(2, 12), load_model(base("llama"))
    load_adapter(model, tmp_path / "theirs")
    with torch.no_grad():
        expected = reference(ids).logits
        assert_close(model(ids), expected)
        save_adapter(model, tmp_path / "ours", base("llama"))
        assert_close(opened_by_peft(base("llama"), tmp_path / "ours")(ids).logits, expected)


@pytest.mark.parametrize("family", ["llama", "llama, tied"])
def test_trained_rows_of_tokens_both_ways(base: Base, tmp_path: Path, family: str) -> None:
    which: Any = [3, 70] if "tied" in family else {"embed_tokens": [3, 70], "lm_head": [70, 5]}
    reference = peft_model(base(family), target_modules=["q_proj"], trainable_token_indices=which)
    reference.save_pretrained(tmp_path / "theirs")
    model = load_model(base(family))
    ids = torch.cat([random_ids(2, 12), torch.tensor([[3, 70], [5, 3]])], dim=1)
    with torch.no_grad():
        expected = reference(ids).logits
        load_adapter(model, tmp_path / "theirs")
        assert_close(model(ids), expected)
        save_adapter(model, tmp_path / "ours", base(family))
        assert_close(opened_by_peft(base(family), tmp_path / "ours")(ids).logits, expected)
        merge(model)
        assert_close(model(ids), expected)


@pytest.mark.parametrize("family", ["llama", "llama, tied"])
def test_new_tokens_beyond_the_vocabulary(base: Base, tmp_path: Path, family: str) -> None:
    """PEFT's users enlarge the embedding before they open the adapter."""
    model = load_model(base(family))
    enlarge(model, 83)
    attach(model, AdapterShape(rank=2, token_ids=(80, 82)))
    randomize(model)
    save_adapter(model, tmp_path / "ours", base(family))
    ids = torch.tensor([[4, 80, 7, 82, 9, 80]])
    with torch.no_grad():
        expected = model(ids)
        again = load_model(base(family))
        load_adapter(again, tmp_path / "ours")
        assert again.config.vocab_size == 83
        assert_close(again(ids), expected, 1e-6)
        theirs = AutoModelForCausalLM.from_pretrained(base(family), attn_implementation="eager")
        theirs.resize_token_embeddings(83)
        reference = PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
        seen = [i for i in range(83) if i != 81]  # the row of a token that nobody trained is drawn by each side
        assert_close(reference(ids).logits[..., seen], expected[..., seen])


@pytest.mark.parametrize("family", ["llama", "llama, tied"])
def test_whole_tables_that_were_trained(base: Base, tmp_path: Path, family: str) -> None:
    tables = ["embed_tokens"] if "tied" in family else ["embed_tokens", "lm_head"]
    reference = peft_model(base(family), target_modules=["v_proj"], modules_to_save=tables)
    reference.save_pretrained(tmp_path / "theirs")
    model = load_model(base(family))
    load_adapter(model, tmp_path / "theirs")
    with torch.no_grad():
        if "tied" in family:  # PEFT trains the embedding apart from the head that it was tied to
            embedded = reference.get_input_embeddings()(random_ids(2, 12))
            assert_close(model.embed(random_ids(2, 12)), embedded)
        else:
            assert_close(model(random_ids(2, 12)), reference(random_ids(2, 12)).logits)


@pytest.mark.parametrize("family", ["llama", "bert", "roberta"])
def test_the_head_of_a_classifier_comes_along(tmp_path: Path, family: str) -> None:
    auto = AutoModelForSequenceClassification
    pad = {"pad_token_id": 1, "num_labels": 3}
    folder = save_random(tmp_path / "base", family, auto, **pad)
    reference = peft_model(folder, task_type="SEQ_CLS", target_modules="all-linear")
    reference.save_pretrained(tmp_path / "theirs")
    ids = 2 + random_ids(1, 12) % 70
    with torch.no_grad():
        expected = reference(ids).logits
        model = load_model(folder, SequenceClassifier)
        load_adapter(model, tmp_path / "theirs")
        assert_close(model(ids), expected)
        save_adapter(model, tmp_path / "ours", folder)
        theirs = opened_by_peft(folder, tmp_path / "ours", auto)
        assert_close(theirs(ids).logits, expected)


@pytest.mark.parametrize("family", ["llama", "llama, tied", "gpt2"])
def test_the_heads_own_weight_beside_its_update_is_compared(base: Base, tmp_path: Path, family: str) -> None:
    inner = "c_attn" if family == "gpt2" else "q_proj"
    reference = peft_model(base(family), target_modules=[inner, "lm_head"])
    reference.save_pretrained(tmp_path / "theirs")
    weights = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors, key = load_file(weights), "base_model.model.lm_head.base_layer.weight"
    assert key in tensors
    ids, model = random_ids(2, 12), load_model(base(family))
    with torch.no_grad():
        load_adapter(model, tmp_path / "theirs")
        assert_close(model(ids), reference(ids).logits)
    save_file({**tensors, key: tensors[key].bfloat16()}, weights)  # trained in another precision
    load_adapter(load_model(base(family)), tmp_path / "theirs")
    with pytest.raises(DanluError, match=r"holds the head's own weights.*danlu merge"):
        read_updates(tmp_path / "theirs", model.config, model.hf_config)
    for other in (tensors[key] * 1.01, tensors[key][:-1]):
        save_file({**tensors, key: other.contiguous()}, weights)
        with pytest.raises(DanluError, match=r"lm_head\.base_layer\.weight is not what this base model has"):
            load_adapter(load_model(base(family)), tmp_path / "theirs")
