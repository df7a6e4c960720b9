"""Sentence embeddings against sentence-transformers: a real model, and tiny random ones of every kind."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from parity import random_reference
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as st
from transformers import AutoModel, BertConfig, BertTokenizer, DistilBertConfig, LlamaConfig, RobertaConfig

from danlu.errors import DanluError
from danlu.models.embedder import Embedder
from danlu.models.sentence_folder import read_settings
from danlu.nn.pooling import pool

TEXTS = [
    "", "a", "Hello world.", "The cat sits on the mat.", "  leading and trailing  ", "line\n\nbreak\t tab",
    "你好,世界", "深度学习模型的训练需要大量的数据和计算资源。", "混合 mixed 文本 text", "😀 👩‍👩‍👧 🇨🇳",
    "naïve café ÀÉÎ",
    "İstanbul ΣΑΣ ß", "def f(x):\n    return x**2", "http://example.com/a?b=c", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "\u200bzero width\ufeff",
    "ок русский текст", "עברית", "ไทย", "مرحبا", "1234567890 " * 40, "word " * 600, "x" * 300, "nothing much " * 90,
]  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,你好世界"
CONFIGS: dict[str, Any] = {
    "bert": BertConfig(
        vocab_size=120, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=40,
    ),
    "distilbert": DistilBertConfig(
        vocab_size=120, dim=24, hidden_dim=40, n_layers=2, n_heads=3, max_position_embeddings=40
    ),
    "roberta": RobertaConfig(
        vocab_size=120, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=40, pad_token_id=0, type_vocab_size=2,
    ),
    "llama": LlamaConfig(
        vocab_size=120, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=40, pad_token_id=0,
    ),
}  # fmt: skip


def base_folder(name: str, path: Path) -> Path:
    """A tiny random model with a tokenizer of letters."""
    random_reference(CONFIGS[name], AutoModel).save_pretrained(path)
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    (path / "vocab.txt").write_text("\n".join(vocab), encoding="utf-8")
    BertTokenizer.from_pretrained(path).save_pretrained(path)
    return path


def sentence_folder(name: str, path: Path, *modules: Any, max_length: int = 21, **options: Any) -> SentenceTransformer:
    """An embedder as sentence-transformers makes and saves it."""
    base = st.Transformer(str(base_folder(name, path / "base")), max_seq_length=max_length)
    made = SentenceTransformer(modules=[base, *modules], device="cpu", **options)
    made.save(str(path / "theirs"), create_model_card=False)
    return made


def check(theirs: SentenceTransformer, embedder: Embedder, folder: Path, **options: Any) -> None:
    """Equal, and equal again when danlu saves it and sentence-transformers opens that."""
    expected = theirs.encode(TEXTS, **options)
    assert expected.std() > 0.01
    ours = embedder.encode(TEXTS, batch_size=5, **options)
    assert ours.dtype == np.float32
    assert np.abs(ours - expected).max() < 1e-5
    embedder.save(folder)
    again = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, **options)
    assert np.abs(again - expected).max() < 1e-5
    assert np.abs(Embedder.load(folder).encode(TEXTS, **options) - expected).max() < 1e-5


def test_minilm(minilm: Path, tmp_path: Path) -> None:
    embedder = Embedder.load(minilm)
    assert (embedder.dim, embedder.max_length) == (384, 256)
    theirs = SentenceTransformer(str(minilm), device="cpu")
    assert np.abs(embedder.encode(TEXTS, batch_size=3) - theirs.encode(TEXTS, batch_size=3)).max() < 1e-5
    embedder.save(tmp_path / "ours")
    again = SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    assert np.abs(again.encode(TEXTS[:12]) - embedder.encode(TEXTS[:12])).max() < 1e-5


@pytest.mark.parametrize(
    ("text", "near", "far"),
    [
        ("A man is eating food.", "A man is eating a piece of bread.", "A woman is playing violin."),
        ("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."),
        ("How do I sort a list in Python?", "ordering the elements of a Python array", "a snake in the garden"),
    ],
)
def test_what_means_the_same_is_nearer(text: str, near: str, far: str, minilm: Path) -> None:
    query, one, other = Embedder.load(minilm).encode([text, near, far])
    assert query @ one > query @ other + 0.2


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "lasttoken"])
@pytest.mark.parametrize("name", CONFIGS)
def test_pooling(name: str, mode: str, tmp_path: Path) -> None:
    theirs = sentence_folder(name, tmp_path, st.Pooling(24, mode))
    check(theirs, Embedder.load(tmp_path / "theirs"), tmp_path / "ours")


@pytest.mark.parametrize("activation", [torch.nn.Tanh(), torch.nn.Identity(), torch.nn.ReLU(), torch.nn.GELU()])
def test_projections(activation: torch.nn.Module, tmp_path: Path) -> None:
    first = st.Dense(24, 13, activation_function=activation)
    second = st.Dense(13, 7, bias=False, activation_function=torch.nn.Identity())
    theirs = sentence_folder("bert", tmp_path, st.Pooling(24, "mean"), first, st.Normalize(), second)
    embedder = Embedder.load(tmp_path / "theirs")
    assert embedder.dim == 7
    check(theirs, embedder, tmp_path / "ours")


def test_prompts(tmp_path: Path) -> None:
    prompts = {"query": "find: ", "document": ""}
    theirs = sentence_folder(
        "bert", tmp_path, st.Pooling(24, "mean"), prompts=prompts, default_prompt_name="query", similarity_fn_name="dot"
    )
    embedder = Embedder.load(tmp_path / "theirs")
    check(theirs, embedder, tmp_path / "default")
    check(theirs, embedder, tmp_path / "named", prompt_name="document")
    assert np.abs(embedder.encode(["a"]) - embedder.encode(["a"], prompt_name="document")).max() > 1e-3
    written = json.loads((tmp_path / "named" / "config_sentence_transformers.json").read_text())
    assert written["similarity_fn_name"] == "dot"
    with pytest.raises(DanluError, match="no prompt 'passage'; it has document, query"):
        embedder.encode(["a"], prompt_name="passage")


def test_lower_case(tmp_path: Path) -> None:
    """A tokenizer that minds case, and a folder that wants none."""
    base = base_folder("bert", tmp_path)
    definition = json.loads((base / "tokenizer.json").read_text())
    definition["normalizer"]["lowercase"] = False
    (base / "tokenizer.json").write_text(json.dumps(definition))
    embedder = Embedder.load(base, pooling="mean")
    embedder.save(tmp_path / "cased")
    lengths = {"max_seq_length": 21, "do_lower_case": True}
    (tmp_path / "cased" / "sentence_bert_config.json").write_text(json.dumps(lengths))
    lowered = Embedder.load(tmp_path / "cased")
    assert np.array_equal(lowered.encode(["HELLO"]), lowered.encode(["hello"]))
    assert not np.array_equal(embedder.encode(["HELLO"]), embedder.encode(["hello"]))


def test_a_new_embedder_of_any_model(tmp_path: Path) -> None:
    base = base_folder("roberta", tmp_path / "base")
    with pytest.raises(DanluError, match="choose how to pool"):
        Embedder.load(base)
    embedder = Embedder.load(base, pooling="mean")
    assert embedder.max_length == 39  # no more than the positions behind the padding id
    embedder.save(tmp_path / "ours")
    theirs = SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    assert np.abs(theirs.encode(TEXTS) - embedder.encode(TEXTS)).max() < 1e-5
    with pytest.raises(DanluError, match="is an embedder already"):
        Embedder.load(tmp_path / "ours", pooling="mean")


def test_a_pooling_of_another_width(tmp_path: Path) -> None:
    sentence_folder("bert", tmp_path, st.Pooling(24, "mean"))
    path = tmp_path / "theirs" / "1_Pooling" / "config.json"
    path.write_text(json.dumps({"word_embedding_dimension": 48, "pooling_mode_mean_tokens": True}))
    with pytest.raises(DanluError, match="pools vectors of 48 numbers; the model's have 24"):
        Embedder.load(tmp_path / "theirs")


def test_batches_change_nothing(tmp_path: Path) -> None:
    embedder = Embedder.load(base_folder("bert", tmp_path), pooling="mean")
    whole = embedder.encode(TEXTS, batch_size=100)
    assert np.abs(embedder.encode(TEXTS, batch_size=1) - whole).max() < 1e-6
    assert np.abs(np.linalg.norm(whole, axis=1) - 1).max() < 1e-6
    assert embedder.encode([]).shape == (0, 24)


def test_vectors_can_be_trained(tmp_path: Path) -> None:
    embedder = Embedder.load(base_folder("bert", tmp_path), pooling="first").train()
    embedder(*embedder.collate([embedder.tokenize("ab"), embedder.tokenize("hello")]))[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in embedder.parameters())


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    base = base_folder("bert", tmp_path)
    definition = json.loads((base / "tokenizer.json").read_text())
    definition["model"]["vocab"].update({f"token{i}": 100 + i for i in range(30)})
    (base / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(DanluError, match="the tokenizer has 130 tokens and the model knows 120"):
        Embedder.load(base, pooling="mean")


def test_one_text_is_not_many(tmp_path: Path) -> None:
    embedder = Embedder.load(base_folder("bert", tmp_path), pooling="mean")
    with pytest.raises(DanluError, match="got one text"):
        embedder.encode("hello")
    with pytest.raises(DanluError, match="batch_size is 0"):
        embedder.encode(["hello"], batch_size=0)


def test_a_text_without_tokens_is_told(tmp_path: Path) -> None:
    base = base_folder("llama", tmp_path)
    definition = json.loads((base / "tokenizer.json").read_text())
    definition["post_processor"] = None
    (base / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(DanluError, match="text 2 of 2 has no tokens"):
        Embedder.load(base, pooling="last").encode(["hello", ""])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("modules.json", {}, "must hold a list of modules"),
        ("modules.json", [{"type": "sentence_transformers.models.Transformer"}], "a type and a path"),
        ("modules.json", [["Pooling", ""]], "lists Pooling; expected Transformer"),
        ("modules.json", [["Transformer", ""], ["LSTM", "2"]], "LSTM' is not supported"),
        ("modules.json", [["Transformer", "../x"], ["Pooling", "1_Pooling"]], "leads out of the folder"),
        ("modules.json", [["Transformer", "/etc"], ["Pooling", "1_Pooling"]], "leads out of the folder"),
        ("1_Pooling/config.json", {"pooling_mode": "weightedmean"}, "pooling is .'weightedmean'., which is not"),
        ("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}, "pooling is .'cls', 'mean'., which is not"),
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt is False"),
        ("1_Pooling/config.json", {"embedding_dimension": 48}, "takes vectors of 24 numbers, but is given 48"),
        ("1_Pooling/config.json", {"weight_by": "idf"}, "weight_by: not known"),
        ("2_Dense/config.json", {"activation_function": "os.system"}, "activation_function is 'os.system'"),
        ("2_Dense/config.json", {"in_features": 25}, "takes vectors of 25 numbers, but is given 24"),
        ("2_Dense/config.json", {"out_features": 9}, "config.json asks for"),
        ("2_Dense/config.json", {"use_residual": True}, "use_residual is True"),
        ("2_Dense/config.json", {"module_input_name": "token_embeddings"}, "module_input_name is"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "model_type is 'SparseEncoder'"),
        ("config_sentence_transformers.json", {"truncate_dim": 8}, "truncate_dim is 8"),
        ("config_sentence_transformers.json", {"prompts": ["a"]}, "prompts must map names to texts"),
        ("config_sentence_transformers.json", {"default_prompt_name": "q"}, "default_prompt_name is 'q'"),
        ("sentence_bert_config.json", {"max_seq_length": 0}, "max_seq_length is 0"),
        ("sentence_bert_config.json", {"query_expansion": {"length": 3}}, "query_expansion: not known"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(file: str, content: Any, message: str, tmp_path: Path) -> None:
    sentence_folder("bert", tmp_path, st.Pooling(24, "mean"), st.Dense(24, 8))
    path = tmp_path / "theirs" / file
    if isinstance(content, list):
        content = [
            {"type": f"sentence_transformers.models.{m[0]}", "path": m[1]} if isinstance(m, list) else m
            for m in content
        ]
    elif file != "modules.json":
        content = {**json.loads(path.read_text()), **content}
    path.write_text(json.dumps(content))
    with pytest.raises(DanluError, match=message):
        Embedder.load(tmp_path / "theirs")


FILES: dict[str, Any] = {
    "modules.json": {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"},
    "1_Pooling/config.json": {"embedding_dimension": 24, "pooling_mode": "mean", "pooling_mode_max_tokens": False},
    "2_Dense/config.json": {"in_features": 24, "out_features": 8, "bias": True, "activation_function": None},
    "config_sentence_transformers.json": {"prompts": {"q": "?"}, "default_prompt_name": "q", "model_type": None},
    "sentence_bert_config.json": {"max_seq_length": 21, "do_lower_case": False},
    "tokenizer_config.json": {"model_max_length": 21},
}
JSON = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=5),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(some.sampled_from([(file, key) for file, fields in FILES.items() for key in fields]), JSON)
def test_settings_are_read_or_refused(place: tuple[str, str], value: Any) -> None:
    """Whatever JSON stands in a field, it is no traceback."""
    with tempfile.TemporaryDirectory() as folder:
        for file, fields in FILES.items():
            content = {**fields, place[1]: value} if file == place[0] else fields
            if file == "modules.json":
                kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense")]
                listed = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds]
                content = [*listed, content]
            path = Path(folder) / file
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content))
        with contextlib.suppress(DanluError):
            assert read_settings(Path(folder))[0].pooling in ("mean", "max", "first", "last")


@pytest.mark.parametrize("how", ["first", "last", "mean", "max"])
def test_pooling_leaves_padding_out(how: Any) -> None:
    x = torch.randn(1, 6, 4)
    real = torch.tensor([[False, True, True, True, False, False]])
    alone = {"first": x[:, 1], "last": x[:, 3], "mean": x[:, 1:4].mean(1), "max": x[:, 1:4].amax(1)}[how]
    assert torch.allclose(pool(x, real, how), alone)
    assert torch.equal(pool(x[:, 1:4], None, how), pool(x[:, 1:4], torch.ones(1, 3, dtype=torch.bool), how))
