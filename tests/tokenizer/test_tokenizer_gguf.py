"""Tokenizers out of GGUF metadata and back, against llama.cpp."""

import random
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer_legacy import bert_folder
from test_tokenizer_sentencepiece import KINDS, train
from tokenizer_corpus import EAST, SOURCES

from danlu.errors import DanluError
from danlu.tokenizer.definition import BLANK
from danlu.tokenizer.gguf import tokenizer_from_gguf
from danlu.tokenizer.gguf_export import tokenizer_to_gguf
from danlu.tokenizer.pre_tokens import PRE_TOKENS
from danlu.tokenizer.special import SPECIAL_TOKENS
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.tokenizer.train import train_on

PARTS = [
    *(
        "hello",
        "world",
        "it's",
        "DON'T",
        "we'll",
        "中文",
        "你好，世界！",
        "テスト",
        "한국어",
        "naïve",
        "École",
        "12345",
    ),
    *(
        "3.14159",
        "1,000,000",
        "__init__",
        "👩‍👩‍👧‍👦",
        "🇨🇳",
        "\t",
        "\n",
        "\r\n",
        "\n\n   ",
        "...",
        "'''",
        "(a)",
        "[b]",
        "$5",
    ),
    *(
        "½",
        "e\u0301",
        "\u200b",
        "\u3000",
        "\xa0",
        "नमस्ते",
        "สวัสดี",
        "שלום",
        "مرحبا",
        "ǅ",
        "ⅷ",
        "①",
        "\u2028",
        "\x85",
        "\x00",
    ),
    *("don’t", "HTTPServer", "a" * 60, " " * 30, "1" * 20, "\n" * 9, BLANK, "<0x41>"),
]


def texts(count: int, parts: list[str] = PARTS) -> list[str]:
    chosen = random.Random(0)
    lines = [*parts, *parts, *SOURCES[0].splitlines()[:200]]
    return ["", " ", *("".join(chosen.choices([*lines, " ", "  "], k=chosen.randint(1, 9))) for _ in range(count))]


def write(path: Path, metadata: dict[str, Any]) -> Path:
    """A GGUF file of a vocabulary alone, by the reference writer."""
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama(path: Path) -> Any:
    llama_cpp = pytest.importorskip("llama_cpp", reason="the oracle, compiled on installing llama-cpp-python")
    return llama_cpp.Llama(str(path), vocab_only=True, verbose=False)


def agree(tokenizer: Tokenizer, oracle: Any, cases: list[str]) -> None:
    for text in cases:
        assert tokenizer.encode(text) == oracle.tokenize(text.encode(), add_bos=False, special=False), text
    for text in ("", "hello world"):
        with_ends = oracle.tokenize(text.encode(), add_bos=True, special=True)
        assert tokenizer.encode_for_encoder(text)[0] == with_ends


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    pytest.importorskip("sentencepiece", reason="makes the model; it is an extra of danlu")
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    train(path, model_type="bpe", **KINDS["llama"])
    return Tokenizer.load(path.parent)


# ---- there and back

EXACT = ["llama-bpe", "dbrx", "qwen2", "qwen35", "smollm", "gpt-2", "deepseek-coder", "seed-coder", "default"]


@pytest.mark.parametrize("pre", EXACT)
def test_byte_level_vocabularies_go_to_llama_cpp_and_back(pre: str, tmp_path: Path) -> None:
    tokenizer = train_on([*SOURCES, EAST], 700, pre_tokens=pre)
    metadata = tokenizer_to_gguf(tokenizer)
    assert metadata["tokenizer.ggml.pre"] == pre
    path = write(tmp_path / "vocab.gguf", metadata)
    back = Tokenizer.load(path)
    assert back.definition["model"] == tokenizer.definition["model"]
    for text in [*texts(50), "<|im_start|>user<|im_end|>"]:
        assert back.encode(text) == tokenizer.encode(text)
        assert back.encode(text, allow_special=True) == tokenizer.encode(text, allow_special=True)
    roles = ("bos_id", "eos_id", "pad_id", "stop_ids", "add_bos", "add_eos", "vocab_size")
    assert [getattr(back, role) for role in roles] == [getattr(tokenizer, role) for role in roles]
    messages = [{"role": "user", "content": "hi <|im_end|>"}, {"role": "assistant", "content": "ho"}]
    assert back.encode_chat(messages) == tokenizer.encode_chat(messages)
    oracle = llama(path)
    agree(tokenizer, oracle, texts(400))
    chat = tokenizer.render_chat(messages[1:], add_generation_prompt=True)
    assert oracle.tokenize(chat.encode(), add_bos=False, special=True) == tokenizer.encode_chat(messages[1:], True)


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.lists(st.sampled_from(PARTS)).map("".join)
)
def test_any_text_gets_the_same_ids(tokenizer: Tokenizer, sentencepiece_tokenizer: Tokenizer, text: str) -> None:
    for each in (tokenizer, sentencepiece_tokenizer):
        assert _back(each).encode(text) == each.encode(text)


def _back(tokenizer: Tokenizer, _made: dict[str, Tokenizer] = {}) -> Tokenizer:  # noqa: B006 (a cache)
    if tokenizer.fingerprint not in _made:
        _made[tokenizer.fingerprint] = tokenizer_from_gguf(tokenizer_to_gguf(tokenizer))
    return _made[tokenizer.fingerprint]


@pytest.mark.parametrize("kind", ["llama", "no prefix"])
def test_sentencepiece_goes_to_llama_cpp_and_back(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece", reason="makes the model; it is an extra of danlu")
    options = {**KINDS["llama"], **({"add_dummy_prefix": False} if kind == "no prefix" else {})}
    train(tmp_path / "tokenizer.model", model_type="bpe", **options)
    tokenizer = Tokenizer.load(tmp_path)
    metadata = tokenizer_to_gguf(tokenizer)
    assert metadata["tokenizer.ggml.add_space_prefix"] is (kind == "llama")
    path = write(tmp_path / "vocab.gguf", metadata)
    back = Tokenizer.load(path)
    assert back.definition["model"] == tokenizer.definition["model"]
    assert back.add_bos is tokenizer.add_bos is True
    agree(tokenizer, llama(path), texts(300))


def test_unigram_and_word_piece_are_read(tmp_path: Path) -> None:
    """Written here as llama.cpp's converter writes them."""
    pytest.importorskip("sentencepiece", reason="makes the model; it is an extra of danlu")
    (tmp_path / "t5").mkdir()
    train(tmp_path / "t5" / "spiece.model", model_type="unigram", bos_id=-1, pad_id=0, eos_id=1, unk_id=2)
    import sentencepiece.sentencepiece_model_pb2 as protobuf

    model = protobuf.ModelProto()
    model.ParseFromString((tmp_path / "t5" / "spiece.model").read_bytes())
    metadata = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": [piece.piece for piece in model.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in model.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in model.pieces],
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.remove_extra_whitespaces": True,
        "tokenizer.ggml.precompiled_charsmap": list(model.normalizer_spec.precompiled_charsmap),
    }
    tokenizer, library = tokenizer_from_gguf(metadata), Tokenizer.load(tmp_path / "t5")
    for text in [*SOURCES[0].splitlines()[:100], "ﬁ ½ Ａ　B", "</s> x"]:
        assert tokenizer.encode(text) == library.encode(text)
    assert tokenizer.encode_for_encoder("x")[0][-1] == 1

    (tmp_path / "bert").mkdir()
    bert = Tokenizer.load(bert_folder(tmp_path / "bert"))
    names = (tmp_path / "bert" / "vocab.txt").read_text(encoding="utf-8").splitlines()
    metadata = {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": names[:5] + [t[2:] if t.startswith("##") else BLANK + t for t in names[5:]],
        "tokenizer.ggml.token_type": [3] * 5 + [1] * (len(names) - 5),
        **{
            f"tokenizer.ggml.{role}_token_id": i
            for i, role in enumerate(("padding", "unknown", "bos", "seperator", "mask"))
        },
    }
    path = write(tmp_path / "bert.gguf", metadata)
    tokenizer = Tokenizer.load(path)
    for text in [*SOURCES[0].splitlines()[:100], "naïve Café 我们", "[MASK]"]:
        assert tokenizer.encode_for_encoder(text, "b") == bert.encode_for_encoder(text, "b")
    assert (tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id, tokenizer.kind) == (2, 3, 4, "wordpiece")
    agree(tokenizer, llama(path), [*SOURCES[0].splitlines()[:200], "naïve Café 我们"])


def test_every_name_has_patterns_that_can_be_run() -> None:
    for name, pre in PRE_TOKENS.items():
        found = [piece for piece, _ in pre.build().pre_tokenize_str("Hello  wörld, it's 2026!\n\n\t中文 x")]
        assert found, name


# ---- what is refused


def test_exports_that_llama_cpp_would_read_otherwise_are_refused(own_cuts: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DanluError, match="cannot be exported to GGUF with the same ids: it cuts text by the pattern"):
        tokenizer_to_gguf(own_cuts)
    with pytest.raises(DanluError, match="its model is WordPiece"):
        tokenizer_to_gguf(Tokenizer.load(bert_folder(tmp_path)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "its normaliser is Lowercase"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "way to cut text is of another kind"),
    ],
)
def test_changed_definitions_are_refused(tokenizer: Tokenizer, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DanluError, match=message):
        tokenizer_to_gguf(Tokenizer({**tokenizer.definition, **change}, tokenizer.config))


def test_merges_that_no_scores_give_are_refused(sentencepiece_tokenizer: Tokenizer) -> None:
    definition = dict(sentencepiece_tokenizer.definition)
    model = dict(definition["model"])
    model["merges"] = model["merges"][:-5]
    with pytest.raises(DanluError, match="does not merge every pair"):
        tokenizer_to_gguf(Tokenizer({**definition, "model": model}, sentencepiece_tokenizer.config))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "rwkv", "of the kind 'rwkv'; expected one of gpt2, llama"),
        ("model", None, "has no tokenizer.ggml.model"),
        ("model", 3, "must be of the type str"),
        ("pre", "nobody-knows", "in the way 'nobody-knows'"),
        ("tokens", None, "has no tokenizer.ggml.tokens"),
        ("tokens", [], "tokens is empty"),
        ("tokens", ["a", 3], "holds 3, expected str"),
        ("token_type", [1, 1], "has 2 items for"),
        ("token_type", "1", "must be of the type list"),
        ("merges", ["ab"], "expected two tokens and a blank"),
        ("merges", ["qqqq zzzz"], "cannot be used"),
        ("merges", None, "has no tokenizer.ggml.merges"),
        ("bos_token_id", "x", "must be of the type int"),
        ("bos_token_id", True, "must be of the type int"),
        ("add_bos_token", 1, "must be of the type bool"),
    ],
)
def test_broken_metadata(tokenizer: Tokenizer, key: str, value: Any, message: str) -> None:
    metadata = tokenizer_to_gguf(tokenizer)
    metadata[f"tokenizer.ggml.{key}"] = value
    if value is None:
        del metadata[f"tokenizer.ggml.{key}"]
    with pytest.raises(DanluError, match=message):
        tokenizer_from_gguf(metadata, where="x.gguf")


def test_a_token_twice(tokenizer: Tokenizer) -> None:
    metadata = tokenizer_to_gguf(tokenizer)
    metadata["tokenizer.ggml.tokens"][-1] = "a"
    with pytest.raises(DanluError, match="holds 'a' twice"):
        tokenizer_from_gguf(metadata)


values = st.none() | st.booleans() | st.integers(-5, 1 << 40) | st.floats() | st.text(max_size=5)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_metadata_is_read_or_refused(data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.text(max_size=4), max_size=8))
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": data.draw(st.sampled_from(["gpt2", "llama", "t5", "bert", "gemma4"])),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": data.draw(
            st.lists(st.integers(-1, 9), min_size=len(tokens), max_size=len(tokens))
        ),
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    for key in data.draw(
        st.lists(st.sampled_from(["scores", "merges", "bos_token_id", "precompiled_charsmap", "pre"]))
    ):
        metadata[f"tokenizer.ggml.{key}"] = data.draw(values | st.lists(values, max_size=9))
    try:
        tokenizer = tokenizer_from_gguf(metadata)
    except DanluError:
        return
    ids = tokenizer.encode("a text")
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    tokenizer.decode(ids)


def test_special_tokens_of_ours_keep_their_kind(tokenizer: Tokenizer) -> None:
    back = tokenizer_from_gguf(tokenizer_to_gguf(tokenizer))
    ids = [tokenizer.id_of(token) for token in SPECIAL_TOKENS]
    assert back.decode(ids, skip_special=True) == tokenizer.decode(ids, skip_special=True)
    assert (back.token_bytes() == tokenizer.token_bytes()).all()
