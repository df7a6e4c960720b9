"""The proof that a family is right: a tiny random model of `transformers`, opened by danlu, computes the same.

In one pass, packed into padded batches on either side, token by token and in chunks with a cache; saved by danlu and
opened by `transformers` again; and with the same gradients.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from danlu.errors import DanluError
from danlu.models.causal_lm import CausalLM
from danlu.models.encoder_decoder import EncoderDecoder
from danlu.models.family import ClassifierShape, family_of
from danlu.models.load import checkpoint_tensors, load_model, save_model
from danlu.models.transformer import Transformer
from danlu.nn.kv_cache import KVCache


def random_reference(config: Any, auto_class: Any, seed: int = 0, attention: str = "eager") -> Any:
    """A model of `transformers` for a config, with every weight random: biases of zero and norms of one would hide
    mistakes."""
    torch.manual_seed(seed)
    reference = auto_class.from_config(config, attn_implementation=attention).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in reference.named_parameters():
            is_norm = p.ndim == 1 and name.endswith("weight")
            offset = p.mean().item() if is_norm else 0.0  # norm weights are near one, or near zero where one is added
            p.copy_(torch.randn(p.shape, generator=generator) * (0.15 if p.ndim > 1 else 0.1) + offset)
    return reference


def random_ids(vocab_size: int, *shape: int, seed: int = 1, avoid: int | None = None) -> Tensor:
    """Token ids; ``avoid`` (a padding id, which some models mask by itself) is left out."""
    ids = torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    return ids if avoid is None else torch.where(ids == avoid, (avoid + 1) % vocab_size, ids)


def padding(side: str, batch: int, t: int) -> Tensor:
    """(batch, t) bool: row i has 3 i padding tokens on a side."""
    column = torch.arange(t)
    pads = 3 * torch.arange(batch)[:, None]
    return column >= pads if side == "left" else column < t - pads


def check_causal_lm(
    config: Any, folder: Path, *, t: int = 24, atol: float = 1e-4, chunk: int = 5, attention: str = "eager"
) -> CausalLM:
    """Everything that must hold for a decoder; returns our model. ``attention`` is the implementation to compare
    with."""
    from transformers import AutoModelForCausalLM

    reference = random_reference(config, AutoModelForCausalLM, attention=attention)
    reference.save_pretrained(folder / "theirs")
    model = load_model(folder / "theirs")
    ids = random_ids(config.vocab_size, 3, t, avoid=config.pad_token_id)
    with torch.no_grad():
        expected = reference(ids).logits
        assert expected.std() > 0.1, "the reference is too quiet to show a difference"
        close(model(ids), expected, atol, "one pass")
        for side in ("left", "right"):
            real = padding(side, 3, t)
            positions = (real.long().cumsum(1) - 1).clamp(min=0)
            takes = "position_ids" in inspect.signature(reference.forward).parameters
            arguments = {"position_ids": positions} if takes else {}
            theirs = reference(ids, attention_mask=real.long(), **arguments).logits
            close(model(ids, real_bt=real)[real], theirs[real], atol, f"padding on the {side}")
        for size in (1, chunk):
            cache = KVCache(model.config, 3, t)
            pieces = [model(piece, cache=cache) for piece in ids.split(size, dim=1)]
            close(torch.cat(pieces, dim=1), expected, atol, f"{size} tokens at a time")
        check_left_padded_cache(model, ids, atol)
    check_round_trip(model, reference, AutoModelForCausalLM, folder / "ours", lambda m: m(ids), expected, atol)
    check_gradients(model, reference, lambda m: m(ids), folder, atol)
    return model


def check_head(
    kind: type[Transformer],
    config: Any,
    auto_class: Any,
    folder: Path,
    *,
    unused: tuple[str, ...] = (),
    t: int = 15,
    atol: float = 1e-4,
) -> Transformer:
    """Everything that must hold for a head on an encoder or a decoder; returns our model.

    Rows are padded on the right, and on the left too where the reference does not take the padding for its first token
    there.

    Args:
        unused: weights that the reference has and does not compute with; danlu does not write them.
    """
    reference = random_reference(config, auto_class)
    reference.save_pretrained(folder / "theirs")
    model = load_model(folder / "theirs", kind)
    ids = random_ids(config.vocab_size, 3, t, avoid=config.pad_token_id)
    takes = inspect.signature(reference.forward).parameters
    types = random_ids(model.config.token_types, 3, t, seed=3) if model.config.token_types else None

    def theirs(m: Any, real: Tensor | None = None) -> Tensor:
        padded, arguments = ids, {} if types is None else {"token_type_ids": types}
        if real is not None:
            padded, arguments["attention_mask"] = ids.where(real, config.pad_token_id), real.long()
            if model.config.causal and "position_ids" in takes:
                arguments["position_ids"] = (real.long().cumsum(1) - 1).clamp(min=0)
        output = m(padded, **arguments)
        return torch.stack(output[:2], dim=-1) if "start_logits" in output else output[0]

    def ours(m: Any, real: Tensor | None = None) -> Tensor:
        call = m.hidden_states if type(m) is Transformer else m
        output = call(ids, real_bt=real, types_bt=types)
        return torch.stack(output, dim=-1) if isinstance(output, tuple) else output

    def run(m: Any) -> Tensor:
        output = ours(m) if isinstance(m, Transformer) else theirs(m)
        return output.T if output.shape[1] == 1 else output  # a softmax over one label would have no gradient

    with torch.no_grad():
        expected = theirs(reference)
        assert expected.std() > 0.1, "the reference is too quiet to show a difference"
        close(ours(model), expected, atol, "one pass")
        by_token = expected.shape[1] == t and expected.ndim > 2
        first_token = not by_token and getattr(model, "shape", ClassifierShape()).pool == "first"
        for side in ("right",) if first_token else ("right", "left"):
            real = padding(side, 3, t)
            rows = real if by_token else slice(None)
            close(ours(model, real)[rows], theirs(reference, real)[rows], atol, f"padding on the {side}")
    check_round_trip(model, reference, auto_class, folder / "ours", run, run(reference), atol, unused)
    check_gradients(model, reference, run, folder, atol)
    return model


def check_every_head(config: Any, folder: Path) -> None:
    """Each classifier that a family declares, and the model without a head."""
    import transformers

    from danlu.models.heads import QuestionAnswering, SequenceClassifier, TokenClassifier

    kinds: dict[str, tuple[type[Transformer], Any]] = {
        "embedding": (Transformer, transformers.AutoModel),
        "sequence_classification": (SequenceClassifier, transformers.AutoModelForSequenceClassification),
        "token_classification": (TokenClassifier, transformers.AutoModelForTokenClassification),
        "question_answering": (QuestionAnswering, transformers.AutoModelForQuestionAnswering),
    }
    heads = family_of(config.model_type).heads
    for task, (kind, auto_class) in kinds.items():
        if task == "embedding" or task in heads:
            labels = 2 if task in ("embedding", "question_answering") else 3
            copy = type(config).from_dict({**config.to_dict(), "pad_token_id": 0})
            copy.num_labels = labels
            check_head(kind, copy, auto_class, folder / task)


def check_left_padded_cache(model: CausalLM, ids: Tensor, atol: float) -> None:
    """A short row in a batch with longer ones gets what it gets alone."""
    pads = torch.arange(len(ids)) * 3
    cache = KVCache(model.config, len(ids), ids.shape[1], left_pad_b=pads)
    batch = torch.cat([model(piece, cache=cache) for piece in ids.split(7, dim=1)], dim=1)
    for row, pad in enumerate(pads.tolist()):
        close(batch[row, pad:], model(ids[row : row + 1, pad:])[0], atol, "left-padded cache")


def check_round_trip(
    model: Transformer,
    reference: Any,
    auto_class: Any,
    folder: Path,
    run: Any,
    expected: Tensor,
    atol: float,
    unused: tuple[str, ...] = (),
) -> None:
    """Saved by danlu, opened by `transformers`: no tensor missing or left over, and the same numbers."""
    save_model(model, folder)
    attention = reference.config._attn_implementation
    again, info = auto_class.from_pretrained(folder, output_loading_info=True, attn_implementation=attention)
    assert type(again) is type(reference)
    assert set(info["missing_keys"]) == set(unused), info["missing_keys"]
    assert not info["unexpected_keys"], info["unexpected_keys"]
    assert not info["mismatched_keys"], info["mismatched_keys"]
    with torch.no_grad():
        close(first(run(again.eval())), expected, atol, "saved by danlu")


def check_gradients(model: Transformer, reference: Any, run: Any, folder: Path, atol: float) -> None:
    """The gradients of a loss, compared under the names of the checkpoint: each model is saved with its gradients in
    place of its weights."""
    loss_of(run(model)).backward()
    loss_of(run(reference)).backward()
    with torch.no_grad():
        for p in {*model.parameters(), *reference.parameters()}:
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
            p.grad = None
    ours = checkpoint_tensors(model, family_of(model.hf_config["model_type"]), torch.float32)
    reference.save_pretrained(folder / "gradients")
    theirs = load_file(folder / "gradients" / "model.safetensors")
    assert ours.keys() <= theirs.keys()
    assert max(g.abs().max() for g in ours.values()) > 1e-3
    buffers = {name for name, _ in reference.named_buffers()}  # without a gradient, where ours are weights
    for name, gradient in ours.items():
        if name in buffers:
            continue
        close(gradient, theirs[name], atol, f"gradient of {name}")


# Fields that say what a model is, and what form the outputs of transformers have.
METADATA = {
    "model_type", "architectures", "transformers_version", "dtype", "_name_or_path", "id2label", "label2id",
    "return_dict", "output_attentions", "output_hidden_states",
}  # fmt: skip


def check_fields_are_not_ignored(
    config: Any,
    folder: Path,
    *,
    kind: type[Transformer | EncoderDecoder] = CausalLM,
    auto_class: Any = None,
    lowest_id: int = 0,
    atol: float = 1e-4,
    attention: str = "eager",
) -> set[str]:
    """Change each field of `config.json` in turn and leave the weights: danlu computes what `transformers` computes, or
    refuses. Where the weights do not fit, danlu refuses too. Returns the fields of which danlu took no change.

    Args:
        kind, auto_class: the head, ours and theirs; default: a language model's.
        lowest_id: of the tokens; those below are left to become padding, which some models know by its id.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    auto_class = auto_class or AutoModelForCausalLM
    random_reference(config, auto_class, attention=attention).save_pretrained(folder)
    path = folder / "config.json"
    content = {**config.to_dict(), **json.loads(path.read_text())}
    ids = lowest_id + random_ids(config.vocab_size - lowest_id, 2, 12)

    def theirs() -> Tensor | None:
        try:
            model, info = auto_class.from_pretrained(folder, output_loading_info=True, attn_implementation=attention)
            seq2seq = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
            return None if any(info.values()) else first(model(ids, **seq2seq))
        except Exception:  # of many kinds, and none of them ours
            return None

    def is_config() -> bool:
        try:
            AutoConfig.from_pretrained(folder)
        except Exception:  # of many kinds: the value is of no type that the field can have
            return False
        return True

    refused, taken, wrong = set(), set(), []
    with torch.no_grad():
        for field, value in [("model_type", content["model_type"]), *changes(content)]:
            path.write_text(json.dumps({**content, field: value}))
            try:
                model = load_model(folder, kind)
                ours = model(ids, ids) if isinstance(model, EncoderDecoder) else model(ids)
            except DanluError:
                refused.add(field)
                continue
            taken.add(field)
            expected = theirs()
            if expected is None:
                wrong += [f"{field} = {value!r} is not refused"] if is_config() else []
            elif (difference := (ours - expected).abs().max().item()) > atol:
                wrong.append(f"{field} = {value!r} is ignored: differs by {difference:.2e}")
    assert not wrong, "\n".join(wrong)
    assert "model_type" in taken, "not even the unchanged config was opened"
    return refused - taken


def changes(content: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each field with other values."""
    for field, value in content.items():
        if field not in METADATA:
            yield from ((field, other) for other in other_values(value))


def other_values(value: Any) -> list[Any]:
    """Values of the same kind."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value * 2]
    if isinstance(value, float):
        return [value * 1.5 + 0.25]  # a difference that also shows where it was 0.00001
    if isinstance(value, str):
        return [other for other in ("gelu_new", "silu", "mish") if other != value]
    if isinstance(value, list):
        return [[other_values(item)[0] for item in value]]
    if isinstance(value, dict):
        added = [{**value, "partial_rotary_factor": 0.5}, {**value, "rope_type": "linear", "factor": 2.0}]
        return [{**value, key: other} for key, item in value.items() for other in other_values(item)] + added
    return [1, 2, 5]


def loss_of(output: Any) -> Tensor:
    """A loss that every output has a part in."""
    logits = first(output)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)) / logits.numel() ** 0.5
    return (logits.float().log_softmax(-1) * weights).sum()


def first(output: Any) -> Tensor:
    """The logits of either side's output."""
    if isinstance(output, Tensor):
        return output
    return output["logits"] if "logits" in output else output[0]  # a loss may come before the logits


def close(ours: Tensor, theirs: Tensor, atol: float, what: str) -> None:
    difference = (ours - theirs).abs().max().item()
    assert difference < atol, f"{what}: differs by {difference:.2e}"
