"""`danlu finetune --adapter`, `danlu merge`, `danlu adapters diff`, and the engine on an adapter folder."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import opened_by_peft
from safetensors.torch import load_file, save_file
from torch import Tensor

from crashes import crash
from danlu.adapters.config import AdapterOptions
from danlu.adapters.diff import adapters_diff
from danlu.adapters.merge_verb import merge_adapter
from danlu.adapters.open import base_of, open_adapted
from danlu.adapters.peft_folder import save_adapter
from danlu.adapters.training import reads_tokens
from danlu.adapters.verbs_config import AdaptersDiffConfig, MergeConfig
from danlu.adapters.wrapper import unwrap
from danlu.config import load
from danlu.engine.classify_config import ClassifyConfig
from danlu.engine.classify_verb import classify
from danlu.engine.engine import Engine
from danlu.engine.engine_config import EngineConfig
from danlu.engine.verbs import generate
from danlu.engine.verbs_config import GenerateConfig
from danlu.errors import DanluError, Problems
from danlu.formats.card import Card
from danlu.formats.gguf_blocks import dequantize, quantize
from danlu.formats.safetensors_header import read_header
from danlu.models.causal_lm import CausalLM
from danlu.models.load import load_model, save_model
from danlu.nn.config import ModelConfig, Rope
from danlu.nn.linear import Linear
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.tokenizer.train import train_on
from danlu.training import checkpoint
from danlu.training.config import FinetuneConfig
from danlu.training.finetune import finetune
from danlu.training.metrics import read_metrics


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that knows no answer, with a tokenizer."""
    tokenizer = train_on([f"def f{i}(x):\n    return x + {i}\n" for i in range(200)], 300, 2)
    shape = {"n_layers": 2, "dim": 64, "n_heads": 2, "n_kv_heads": 1, "head_dim": 32, "ffn_dim": 64, "context": 128}
    model = CausalLM(ModelConfig(qk_norm="head", rope=Rope(), vocab_size=tokenizer.vocab_size, **shape))
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(std=0.1, generator=generator)
    folder = tmp_path_factory.mktemp("base") / "model"
    save_model(model, folder, tokenizer)
    return folder


@pytest.fixture
def config(base: Path, tmp_path: Path) -> Any:
    rows = [{"prompt": f"Add {i}.", "completion": f"return x + {i}"} for i in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(name: str, **changes: Any) -> FinetuneConfig:
        values: dict[str, Any] = {
            "model": base, "data": data, "out": tmp_path / name, "seq_len": 64, "batch_tokens": 256, "steps": 12,
            "log_to": (), "compile": "never", "device": "cpu", "precision": "fp32", "heldout_share": 0.1,
            "adapter": "lora", "rank": 4, "matrix_lr": 0.01, "threads": 1,
        }  # fmt: skip
        return FinetuneConfig(**{**values, **changes})

    return make


def logits(model: CausalLM, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids)


IDS = torch.randint(0, 290, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adapter": "dora", "rslora": True, "dropout": 0.1},
        {"adapter": "qlora", "targets": ("v_proj",), "adapter_start": "zero"},
    ],
)
def test_it_learns_and_writes_what_peft_opens(base: Path, config: Any, options: dict[str, Any]) -> None:
    out = finetune(config("tuned", steps=15, **options))
    losses = [line["loss"] for line in read_metrics(out / "metrics.jsonl")]
    assert losses[-1] < (0.97 if "targets" in options else 0.8) * losses[0]
    card = Card.load(out)
    assert card.kind == "adapter"
    assert card.metrics["trained_parameters"] == sum(
        math.prod(entry.shape) for entry in read_header(out / "adapter_model.safetensors").entries.values()
    )
    assert card.metrics["parameters"] == load_model(base).num_parameters()
    assert card.details["adapter"]["kind"] == ("dora" if options.get("adapter") == "dora" else "lora")
    assert not (out / "checkpoints").exists()
    assert base_of(out) == base.resolve()
    model, _ = open_adapted(out)
    plain, _ = open_adapted(out, quantize="none")
    reference = opened_by_peft(base, out)
    with torch.no_grad():
        assert (reference(IDS).logits - logits(plain, IDS)).abs().max() < 1e-4
    quantized = (logits(model, IDS) - logits(plain, IDS)).abs().max().item()
    assert (quantized > 1e-3) == (options.get("adapter") == "qlora")


def test_an_adapter_is_for_the_model_it_was_trained_on(config: Any) -> None:
    whole: dict[str, Any] = {"adapter": "none", "rank": None, "steps": 1}
    one, other = finetune(config("one", **whole)), finetune(config("other", **whole, seed=1))
    adapter = finetune(config("adapter", model=one, steps=1))
    open_adapted(adapter, base=one)
    with pytest.raises(DanluError, match="was trained on another model than the one at"):
        merge_adapter(MergeConfig(base=other, adapter=adapter, out=other.parent / "merged"))
    with pytest.raises(DanluError, match="is an adapter; make a model of it first: danlu merge"):
        load_model(adapter)
    (adapter / "danlu.json").unlink()  # as one of PEFT's, which tells nothing
    open_adapted(adapter, base=other)


def test_an_adapter_of_nan_is_refused(config: Any) -> None:
    adapter = finetune(config("adapter", steps=1))
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = math.nan
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(DanluError, match="holds numbers that are not finite"):
        open_adapted(adapter)


@pytest.mark.parametrize("options", [{"dropout": 0.2}, {"quantize": "4bit", "adapter": "dora"}])
def test_resume_is_exact_and_checkpoints_hold_the_adapter_alone(config: Any, options: dict[str, Any]) -> None:
    straight, broken = config("straight", **options), config("broken", checkpoint_every=5, **options)
    finetune(straight)
    crash(lambda: finetune(broken), at_step=7)
    saved = load_file(checkpoint.list_checkpoints(broken.out)[-1] / "state.safetensors")
    assert all(".adapters." in name for name in saved if name.startswith("model."))
    finetune(broken)
    a, b = (load_file(c.out / "adapter_model.safetensors") for c in (straight, broken))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_budget_of_minutes_is_planned_without_a_trace(config: Any) -> None:
    out = finetune(config("short", steps=None, minutes=0.02))
    assert Card.load(out).metrics["steps"] >= 1


def test_new_tokens_are_learned_and_known_again(config: Any, base: Path, tmp_path: Path) -> None:
    data = tmp_path / "tools.jsonl"
    rows = [{"prompt": "Now?", "completion": f"x = <call>{i}</call>"} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens = ("<call>", "</call>", "<|reserved_0|>")
    out = finetune(config("tools", data=data, new_tokens=tokens, steps=5))
    before, model_before = Tokenizer.load(base), load_model(base)
    model, tokenizer = open_adapted(out, merged=True)
    ids = [tokenizer.id_of(token) for token in tokens]
    assert ids == [before.vocab_size, before.vocab_size + 1, before.id_of("<|reserved_0|>")]
    assert tokenizer.encode("<call>", allow_special=True) == ids[:1]
    assert len(tokenizer.encode("<call>")) > 1  # in a user's text it is letters
    reader = reads_tokens(tokenizer, tokens)
    chat = reader.encode_chat([{"role": "user", "content": "<|reserved_0|><call><|im_end|>"}])
    assert (chat.count(ids[2]), chat.count(ids[0]), chat.count(ids[1])) == (1, 1, 0)
    assert chat.count(tokenizer.id_of("<|im_end|>")) == 1  # others still cannot be forged
    assert model.config.vocab_size == before.vocab_size + 2
    others = [i for i in range(before.vocab_size) if i not in ids]
    assert torch.equal(model.embed.weight[others], model_before.embed.weight[others])
    begun = model_before.embed.weight.mean(dim=0)
    assert (model.embed.weight[ids[0]] - begun).abs().max() > 1e-3  # it was read as a token, and learned
    assert not torch.equal(model.head.weight[ids[2]], model_before.head.weight[ids[2]])
    merged = merge_adapter(MergeConfig(base=base, adapter=out, out=tmp_path / "merged"))
    assert torch.equal(logits(load_model(merged), IDS), logits(model, IDS))
    assert Tokenizer.load(merged).fingerprint == tokenizer.fingerprint


def test_merging_writes_the_model_that_was_trained(config: Any, base: Path, tmp_path: Path) -> None:
    tuned = finetune(config("tuned"))
    merged = merge_adapter(MergeConfig(base=base, adapter=tuned, out=tmp_path / "merged"))
    card = Card.load(merged)
    assert [item.role for item in card.inputs] == ["model", "adapter"]
    expected = logits(open_adapted(tuned)[0], IDS)
    assert (logits(load_model(merged), IDS) - expected).abs().max() < 1e-5
    assert (
        merge_adapter(MergeConfig(base=base, adapter=tuned, out=tmp_path / "merged")) == merged
    )  # finished: not again
    half = merge_adapter(MergeConfig(base=base, adapter=tuned, out=tmp_path / "half", dtype="bf16"))
    assert {e.dtype for e in read_header(half / "model.safetensors").entries.values()} == {"BF16"}
    with pytest.raises(DanluError, match="adapter_config"):
        merge_adapter(MergeConfig(base=base, adapter=base, out=tmp_path / "not"))
    assert not (tmp_path / "not").exists()


def test_four_bit_merges_tell_what_the_perplexity_does(config: Any, base: Path, tmp_path: Path) -> None:
    tuned = finetune(config("tuned", quantize="4bit", adapter_start="zero"))
    options = {"base": base, "adapter": tuned, "data": config("x").data, "text_tokens": 200}
    merged = merge_adapter(MergeConfig(**options, out=tmp_path / "merged"))
    metrics = Card.load(merged).metrics
    assert metrics["perplexity_after"] == pytest.approx(metrics["perplexity_before"], rel=1e-5)
    expected = logits(open_adapted(tuned)[0], IDS)
    assert (logits(load_model(merged), IDS) - expected).abs().max() < 1e-4
    other = merge_adapter(MergeConfig(**options, out=tmp_path / "other", quantize="none"))
    assert (logits(load_model(other), IDS) - expected).abs().max() > 1e-3


def test_an_adapter_may_begin_with_what_four_bits_lost(config: Any, base: Path, tmp_path: Path) -> None:
    options = {"quantize": "4bit", "rank": 16, "steps": 1, "matrix_lr": 1e-9}
    zero, auto = (finetune(config(start, adapter_start=start, **options)) for start in ("zero", "auto"))
    whole = logits(load_model(base), IDS)
    errors = [(logits(open_adapted(folder)[0], IDS) - whole).square().mean().item() for folder in (zero, auto)]
    assert errors[1] < 0.8 * errors[0]
    assert Card.load(auto).details["adapter"]["start"] == "error"
    merged = merge_adapter(MergeConfig(base=base, adapter=auto, out=tmp_path / "merged"))
    assert (logits(load_model(merged), IDS) - logits(open_adapted(auto)[0], IDS)).abs().max() < 1e-4
    with pytest.raises(DanluError, match="adapter_start=zero"):
        open_adapted(auto, quantize="none")
    with Engine(base, EngineConfig(precision="fp32", kv_memory=8)) as engine:
        engine.load_adapter("zero", zero)
        with pytest.raises(DanluError, match="danlu merge"):
            engine.load_adapter("auto", auto)


def test_on_a_base_from_a_four_bit_file_nothing_is_lost(config: Any, base: Path, tmp_path: Path) -> None:
    """Training starts from the very weights of the base, and the adapter belongs to them."""
    model = load_model(base)
    with torch.no_grad():
        for module in model.layers.modules():
            if type(module) is Linear:
                data = quantize(module.weight, "Q4_1")
                module.weight.copy_(dequantize(data, "Q4_1", tuple(module.weight.shape)))
    save_model(model, tmp_path / "unpacked", Tokenizer.load(base))
    options = {"model": tmp_path / "unpacked", "steps": 5}
    packed, whole = (finetune(config(name, adapter=name, **options)) for name in ("qlora", "lora"))
    details = Card.load(packed).details["adapter"]
    assert (details["quantize"], details["start"]) == ("none", "zero")
    losses = [[line["loss"] for line in read_metrics(out / "metrics.jsonl")] for out in (packed, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert (logits(open_adapted(packed)[0], IDS) - logits(open_adapted(whole)[0], IDS)).abs().max() < 1e-3


def test_the_engine_opens_an_adapter_folder(config: Any, base: Path, tmp_path: Path) -> None:
    tuned = finetune(config("tuned"))
    merged = merge_adapter(MergeConfig(base=base, adapter=tuned, out=tmp_path / "merged"))
    answers = [
        generate(GenerateConfig(model=folder, prompt="def f", max_new_tokens=12, temperature=0, precision="fp32", n=2))
        for folder in (tuned, merged, base)
    ]
    assert answers[0] == answers[1] != answers[2]
    (tmp_path / "moved").mkdir()
    content = json.loads((tuned / "adapter_config.json").read_text())
    (tuned / "adapter_config.json").write_text(json.dumps({**content, "base_model_name_or_path": "org/gone"}))
    with pytest.raises(DanluError, match="org/gone is not here"):
        open_adapted(tuned)


def test_a_classifier_with_an_adapter(config: Any, tmp_path: Path) -> None:
    data = tmp_path / "labels.jsonl"
    rows = [{"text": f"{'return' if i % 2 else 'def'} f{i}", "label": "odd" if i % 2 else "even"} for i in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"data": data, "task": "classify", "batch_tokens": 0, "steps": 60, "batch_size": 8, "threads": 1}
    out = finetune(config("labels", **options, head_lr=0.01))
    card = Card.load(out)
    assert card.metrics["heldout_accuracy"] > 0.8
    answers = classify(ClassifyConfig(model=out, text="return f7"))
    assert answers[0]["label"] == "odd"
    merged = merge_adapter(MergeConfig(base=config("x").model, adapter=out, out=tmp_path / "merged"))
    assert classify(ClassifyConfig(model=merged, text="return f7"))[0]["label"] == "odd"


def test_options_that_cannot_be_are_told_together() -> None:
    values = {"model": "m", "data": "d", "out": "o", "rank": 4, "targets": ["q_proj"], "quantize": "4bit"}
    with pytest.raises(Problems) as caught:
        load(FinetuneConfig, values=values)
    assert [text.split(" ")[0] for text in caught.value.problems] == ["rank", "targets", "quantize"]
    wrong = {"adapter": "lora", "budget": "2", "optimizer": "muon", "new_tokens": ["a", "a"]}
    with pytest.raises(Problems) as caught:
        load(FinetuneConfig, values={**values, **wrong})
    assert len(caught.value.problems) == 4
    names = {field.name for field in dataclasses.fields(AdapterOptions)}
    assert names <= {field.name for field in dataclasses.fields(FinetuneConfig)}


def test_adapters_are_compared_without_their_base(base: Path, config: Any, tmp_path: Path, capsys: Any) -> None:
    one = finetune(config("one", steps=3))
    model, _ = open_adapted(one)
    other = tmp_path / "other"
    for layer in model.modules():
        if hasattr(layer, "magnitude"):
            with torch.no_grad():
                layer.b *= -2  # type: ignore[operator]
    save_adapter(model, other, base)
    found = adapters_diff(AdaptersDiffConfig(first=one, second=other, json=True))
    assert json.loads(capsys.readouterr().out) == found
    assert found["config"]["base"][0] == found["config"]["base"][1] if "base" in found["config"] else True
    unwrapped, _ = open_adapted(one)
    weights = dict(load_model(base).named_parameters())
    merged, _ = open_adapted(one, merged=True)
    unwrap(unwrapped)
    name = "model.layers.0.self_attn.q_proj"
    delta = (
        dict(merged.named_parameters())["layers.0.attention.q_proj.weight"]
        - weights["layers.0.attention.q_proj.weight"]
    )
    module = found["modules"][name]
    assert module["norms"][0] == pytest.approx(delta.norm().item(), rel=1e-3)
    assert module["norms"][1] == pytest.approx(2 * module["norms"][0], rel=1e-5)
    assert module["cosine"] == pytest.approx(-1, abs=1e-6)
    assert found["cosine"] == pytest.approx(-1, abs=1e-6)
    dora = finetune(config("dora", adapter="dora", rank=2, targets=("q_proj",), steps=2))
    found = adapters_diff(AdaptersDiffConfig(first=one, second=dora))
    assert found["config"]["kind"] == ["lora", "dora"]
    assert found["only_second"] == []
    assert len(found["modules"]) == 2
    assert "all together" in capsys.readouterr().out
    in_4_bits = finetune(config("4bit", adapter="qlora", steps=1))
    found = adapters_diff(AdaptersDiffConfig(first=one, second=in_4_bits))
    assert found["config"]["quantize"] == ["none", "4bit"]
    assert found["config"]["adapter_start"] == ["zero", "error"]
