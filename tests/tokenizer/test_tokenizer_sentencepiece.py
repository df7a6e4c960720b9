"""SentencePiece models, against the SentencePiece library, on models trained here."""

import contextlib
import io
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_corpus import EAST, SOURCES

from danlu.errors import DanluError, MissingExtra
from danlu.tokenizer.tokenizer import Tokenizer

sentencepiece = pytest.importorskip("sentencepiece", reason="the oracle; it is an extra of danlu")

LINES = [line for text in (*SOURCES, EAST) for line in text.splitlines() if line.strip()]
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
KINDS: dict[str, dict[str, Any]] = {
    "llama": PLAIN,
    "gemma": {**PLAIN, "add_dummy_prefix": False, "user_defined_symbols": ["<sep>", "\n", "<a b>"]},
    "symbols": {**PLAIN, "user_defined_symbols": ["<sep>", "\n"]},
    "nmt_nfkc": {},
    "nfkc, no prefix": {"normalization_rule_name": "nfkc", "add_dummy_prefix": False, "byte_fallback": True},
    "case folding": {"normalization_rule_name": "nmt_nfkc_cf", "split_digits": True},
}
WORDS = [
    *(
        "def",
        "self",
        "中文",
        "テスト",
        "①",
        "ﬁ",
        "Ａ　B",
        "\t",
        "naïve",
        "𝒳",
        "<0x41>",
        "<sep>",
        "<s>",
        "</s>",
        "12345",
    ),
    *("aaaaaaa", "\n", "é", "e\u0301", "한국어", "½", "\u2581", "", "x"),
]


@pytest.fixture(scope="module", params=[(model, kind) for model in ("bpe", "unigram") for kind in KINDS], ids=" ".join)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    model, kind = request.param
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    train(path, model_type=model, **KINDS[kind])
    return Tokenizer.load(path.parent), sentencepiece.SentencePieceProcessor(model_file=str(path))


def train(path: Path, **options: Any) -> None:
    written = io.BytesIO()
    options = {"vocab_size": 600, "minloglevel": 2, "character_coverage": 0.98, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=written, **options)
    path.write_bytes(written.getvalue())


def texts(count: int) -> list[str]:
    chosen = random.Random(0)
    parts = [*WORDS * (len(LINES) // len(WORDS)), *LINES]  # as many words as lines
    return [
        chosen.choice(["", " ", "  ", "\n"]).join(chosen.choices(parts, k=chosen.randint(0, 6))) for _ in range(count)
    ]


def test_ids_are_those_of_the_library(pair: tuple[Tokenizer, Any]) -> None:
    tokenizer, oracle = pair
    # A text that is one symbol and nothing else gets no space in front here.
    cases = [text for text in texts(400) if text not in ("<sep>", "\n")]
    symbols = {"<sep>", "<s>", "</s>"}  # in a text these are text here; the library knows its own symbols everywhere
    cases = [text for text in cases if not any(symbol in text for symbol in symbols)]
    differing = [text for text in cases if oracle.encode(text) != tokenizer.encode(text)]
    ties = [text for text in differing if score(oracle, oracle.encode(text)) == score(oracle, tokenizer.encode(text))]
    assert [text for text in differing if text not in ties] == []
    assert len(ties) <= len(cases) // 100, "equally good ways to cut a run of equal characters"


def score(oracle: Any, ids: list[int]) -> float:
    return pytest.approx(sum(oracle.get_score(i) for i in ids)) if len(ids) else 0.0


def test_symbols_are_recognised_where_they_are_meant(pair: tuple[Tokenizer, Any]) -> None:
    tokenizer, oracle = pair
    text = "x<sep>return <sep> self"
    assert tokenizer.encode(text, allow_special=True) == oracle.encode(text)
    if oracle.piece_to_id("<sep>") != oracle.unk_id():
        assert oracle.piece_to_id("<sep>") not in tokenizer.encode(text), "text is only text"


@pytest.mark.parametrize("marker", ["<s>", "</s>", "<unk>"])
def test_control_pieces_are_no_text(pair: tuple[Tokenizer, Any], marker: str) -> None:
    tokenizer, oracle = pair
    i = tokenizer.id_of(marker)
    assert tokenizer.encode(f"x {marker} y", allow_special=True).count(i) == 1
    if marker != "<unk>":
        assert i not in tokenizer.encode(f"x {marker} y")
        assert tokenizer.encode(f"x {marker} y") == oracle.encode(f"x {marker} y")


def test_decoding(pair: tuple[Tokenizer, Any]) -> None:
    tokenizer, oracle = pair
    for text in texts(100):
        ids = oracle.encode(text)
        if oracle.unk_id() not in ids and "<sep>" not in text:  # unknown pieces are shown as ⁇; symbols have no bytes
            assert tokenizer.decode(ids) == oracle.decode(ids)
            pieces = b"".join(tokenizer.decode_bytes([i]) for i in ids)
            assert tokenizer.decode_bytes(ids) == pieces
            assert tokenizer.token_bytes()[ids].sum() == len(pieces)
            put_in_front = b" " if tokenizer.decode_bytes(tokenizer.encode("x")) == b" x" else b""
            assert pieces.removeprefix(put_in_front).decode() == tokenizer.decode(ids)


def test_a_saved_folder_gives_the_same_ids_here_and_in_transformers(
    pair: tuple[Tokenizer, Any], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer, _ = pair
    tokenizer.save(tmp_path)
    again, oracle = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in texts(60):
        assert again.encode(text) == tokenizer.encode(text)
        assert oracle(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text, allow_special=True)
    assert oracle("hi")["input_ids"] == tokenizer.encode_for_encoder("hi")[0]
    assert oracle("hi")["input_ids"][0] == tokenizer.bos_id == tokenizer.id_of("<s>")
    assert tokenizer.add_bos
    assert not tokenizer.add_eos


def test_t5_has_sentinels_and_ends_texts(tmp_path: Path) -> None:
    train(tmp_path / "spiece.model", model_type="unigram", bos_id=-1, pad_id=0, eos_id=1, unk_id=2)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 10}')
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == 610
    assert [tokenizer.id_of(f"<extra_id_{i}>") for i in (0, 9)] == [609, 600]
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    assert tokenizer.encode_for_encoder("return self")[0] == [*oracle.encode("return self"), 1]
    assert tokenizer.encode_for_encoder("a", "b")[0] == [*oracle.encode("a"), 1, *oracle.encode("b"), 1]
    assert (tokenizer.add_bos, tokenizer.add_eos, tokenizer.pad_id, tokenizer.eos_id) == (False, True, 0, 1)


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ({"model_type": "char"}, "{}", "of the kind 'char'"),
        ({"treat_whitespace_as_suffix": True}, "{}", "treat_whitespace_as_suffix"),
        ({}, '{"tokenizer_class": "XLMRobertaTokenizer"}', "the ids of a XLMRobertaTokenizer are not those"),
        ({}, '{"bos_token": "<nowhere>", "add_bos_token": true}', "'<nowhere>' is not in the vocabulary"),
        ({}, '{"added_tokens_decoder": {"700": "<far>"}}', "is said to have the id 700, but would get 600"),
        ({}, '{"added_tokens_decoder": {"x": 3}}', "must hold an object of id and token"),
    ],
)
def test_what_cannot_be_honoured_is_refused(tmp_path: Path, options: Any, config: str, message: str) -> None:
    train(
        tmp_path / "tokenizer.model",
        **{"model_type": "bpe", "hard_vocab_limit": "model_type" not in options, **options},
    )
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(DanluError, match=message):
        Tokenizer.load(tmp_path)


@settings(max_examples=60, deadline=None)
@given(cut=st.floats(0, 1), noise=st.binary(max_size=30))
def test_damaged_files_are_told(tmp_path_factory: pytest.TempPathFactory, cut: float, noise: bytes) -> None:
    whole = _whole(tmp_path_factory)
    folder = tmp_path_factory.mktemp("damaged")
    place = int(cut * len(whole))
    (folder / "tokenizer.model").write_bytes(whole[:place] + noise)
    with contextlib.suppress(DanluError):  # where the cut lies between two fields, the rest is a smaller model
        Tokenizer.load(folder).encode("text")


_CACHE: list[bytes] = []


def _whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    if not _CACHE:
        path = tmp_path_factory.mktemp("whole") / "m.model"
        train(path, model_type="bpe")
        _CACHE.append(path.read_bytes())
    return _CACHE[0]


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x03")
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece.sentencepiece_model_pb2", None)
    with pytest.raises(MissingExtra, match=r"danlu\[sentencepiece\]"):
        Tokenizer.load(tmp_path)
