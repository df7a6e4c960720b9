"""Text and bytes to ids and back; text that looks like a special token; folders from here and from elsewhere."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.errors import DanluError
from danlu.tokenizer.special import SPECIAL_TOKENS
from danlu.tokenizer.tokenizer import Tokenizer

AWKWARD = [
    "",
    " ",
    "\n\n\n    \t\r\n",
    "\0\x01\x7f",
    "\ufeffBOM at the start",
    "e\u0301\u0301\u0301 cafe\u0301",
    "שלום עולם ‏مرحبا",
    "👩‍👩‍👧‍👦🏳️‍🌈🇨🇳",
    "ｆｕｌｌｗｉｄｔｈ　Ａ\u3000。",
    "ﬁ Å Ω \u212b",  # a normaliser would change these
    "def f(x):\n\tif x:\n        return {'start': 12345}\n",
    "我们今天去公园玩，好不好？Python3代码",
    "\U0010ffff\U00100000\ue000",
    "a" * 5000,
]
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
tricky_text = st.lists(st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "im_end", "\n", "  ", "中文", "x", "</"])).map(
    "".join
)


@settings(max_examples=300, deadline=None)
@given(text=any_text | tricky_text | st.sampled_from(AWKWARD))
def test_any_text_comes_back_byte_for_byte(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    special = tokenizer.encode(text, allow_special=True)
    assert tokenizer.decode(special) == text


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=200) | any_text.map(str.encode))
def test_any_bytes_come_back(tokenizer: Tokenizer, content: bytes) -> None:
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(content)) == content


@settings(max_examples=200, deadline=None)
@given(text=any_text | tricky_text)
def test_bytes_of_a_text_encode_like_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode_bytes(text.encode()) == tokenizer.encode(text)


@settings(max_examples=100, deadline=None)
@given(text=any_text | tricky_text)
def test_token_bytes_add_up_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.token_bytes()[tokenizer.encode(text)].sum() == len(text.encode())


def test_every_byte_is_a_token_and_special_tokens_stand_for_no_bytes(tokenizer: Tokenizer) -> None:
    for byte in range(256):
        if byte > 127:  # alone it is not UTF-8, so it cannot merge with anything
            assert len(tokenizer.encode_bytes(bytes([byte]))) == 1
    sizes = tokenizer.token_bytes()
    assert sizes.shape == (tokenizer.vocab_size,)
    assert [sizes[tokenizer.id_of(token)] for token in SPECIAL_TOKENS] == [0] * len(SPECIAL_TOKENS)
    assert (sizes[len(SPECIAL_TOKENS) :] > 0).all()


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_text_that_looks_special_is_text_unless_the_caller_says_so(tokenizer: Tokenizer, token: str) -> None:
    i = tokenizer.id_of(token)
    assert i not in tokenizer.encode(token)
    assert i not in tokenizer.encode_batch([f"say {token} aloud"])[0]
    assert i not in tokenizer.encode_bytes(token.encode())
    assert tokenizer.encode(token, allow_special=True) == [i]


def test_a_batch_is_its_texts(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(AWKWARD) == [tokenizer.encode(text) for text in AWKWARD]


def test_threads_share_a_tokenizer(tokenizer: Tokenizer) -> None:
    texts = [f"{text} {i} <|im_end|>" for i in range(50) for text in AWKWARD[:-1]]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == [tokenizer.encode(text) for text in texts]


def test_skip_special_keeps_what_programs_read(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|><think>hm</think><tool_call>{}</tool_call><|im_end|>", allow_special=True)
    assert tokenizer.decode(ids, skip_special=True) == "<think>hm</think><tool_call>{}</tool_call>"


def test_half_a_character_is_shown_as_such_and_its_bytes_are_kept(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_bytes("龘".encode()[:2])
    assert tokenizer.decode(ids) == "\ufffd"
    assert tokenizer.decode_bytes(ids) == "龘".encode()[:2]


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff"])
def test_lone_surrogates_are_refused_with_their_place(tokenizer: Tokenizer, text: str) -> None:
    for encode in (tokenizer.encode, lambda t: tokenizer.encode_batch([t]), lambda t: tokenizer.encode(t, True)):
        with pytest.raises(
            DanluError, match=rf"character {len(text) - 1} is a lone surrogate \(U\+{ord(text[-1]):04X}\)"
        ):
            encode(text)


def test_ids_outside_the_vocabulary_and_unknown_tokens_are_told(tokenizer: Tokenizer) -> None:
    with pytest.raises(DanluError, match="outside the vocabulary"):
        tokenizer.decode([tokenizer.vocab_size])
    with pytest.raises(DanluError, match="outside the vocabulary"):
        tokenizer.decode([-1])
    with pytest.raises(DanluError, match="no token '<|nothing|>'".replace("|", r"\|")):
        tokenizer.id_of("<|nothing|>")


# ---- where text is cut


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [text[start:end] for _, (start, end) in tokenizer._full.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f(x):\n        return x", ["def", " f", "(x", "):\n", "       ", " return", " x"]),
        ("x = 'start'  # IT's\n", ["x", " =", " '", "start", "'", " ", " #", " IT", "'s", "\n"]),
        ("2026-11-22", ["202", "6", "-", "11", "-", "22"]),
        ("用Python写代码", ["用Python写代码"]),
    ],
)
def test_where_text_is_cut_by_default(tokenizer: Tokenizer, text: str, expected: list[str]) -> None:
    """As Llama 3 cuts it, so that llama.cpp can read the vocabulary."""
    assert pieces(tokenizer, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f(x):\n        return x", ["def", " f", "(x", "):\n        ", "return", " x"]),
        ("x = 'start'  # it's\n", ["x", " =", " '", "start", "'", " ", " #", " it", "'s", "\n"]),
        ("2026-11-22", ["20", "26", "-", "11", "-", "22"]),
        ("self.snake_case", ["self", ".snake", "_case"]),
        ("用Python写代码", ["用", "Python", "写代码"]),
        ("食べるテスト", ["食", "べる", "テスト"]),
        ("한국어 문장abc", ["한국어", " 문장", "abc"]),
        ("cafe\u0301s", ["cafe\u0301s"]),
        ("a\n\n\n    b", ["a", "\n\n\n    ", "b"]),
    ],
)
def test_where_text_is_cut_by_our_own_pattern(own_cuts: Tokenizer, text: str, expected: list[str]) -> None:
    assert pieces(own_cuts, text) == expected


def test_a_chinese_sentence_is_no_single_piece(own_cuts: Tokenizer) -> None:
    sentence = "中国人民共和国成立以后的第一部宪法是在什么时候通过的呢"
    assert "".join(pieces(own_cuts, sentence)) == sentence
    assert max(map(len, pieces(own_cuts, sentence))) <= 12


@settings(max_examples=200, deadline=None)
@given(text=any_text)
def test_pieces_cover_the_text_and_keep_scripts_apart(own_cuts: Tokenizer, text: str) -> None:
    found = pieces(own_cuts, text)
    assert "".join(found) == text
    for piece in found:
        assert not (any("a" <= c.lower() <= "z" for c in piece) and any("\u4e00" <= c <= "\u9fff" for c in piece))


# ---- folders


def test_a_saved_folder_loads_the_same(tokenizer: Tokenizer, folder: Path, tmp_path: Path) -> None:
    loaded = Tokenizer.load(folder)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert loaded.stop_ids == (tokenizer.id_of("<|endoftext|>"), tokenizer.id_of("<|im_end|>"))
    loaded.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_the_fingerprint_follows_the_template(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    other = Tokenizer.load(tmp_path)
    assert other.render_chat([{"role": "user", "content": "hi"}]) == "hi"
    assert other.fingerprint != Tokenizer.load(folder).fingerprint


def edit(path: Path, **values: object) -> None:
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda f: (f / "tokenizer.json").write_text('{"model": '), r"tokenizer.json:1: is not valid JSON"),
        (lambda f: (f / "tokenizer.json").write_text("[]"), "must hold a JSON object"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "cannot be read as a tokenizer"),
        (lambda f: edit(f / "tokenizer.json", model={"type": "Nonsense"}), "cannot be read as a tokenizer"),
        (lambda f: edit(f / "tokenizer.json", added_tokens="none"), "cannot be read as a tokenizer"),
        (
            lambda f: edit(f / "tokenizer_config.json", eos_token="<|nowhere|>"),
            "eos_token is '<.nowhere.>', which is not",
        ),
        (lambda f: edit(f / "tokenizer_config.json", chat_template="{% if %}"), "not valid Jinja"),
        (lambda f: (f / "tokenizer_config.json").write_bytes(b"\xff\xfe"), "not UTF-8"),
    ],
)
def test_broken_folders_are_refused(folder: Path, tmp_path: Path, break_it, message: str) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    break_it(tmp_path)
    with pytest.raises(DanluError, match=message):
        Tokenizer.load(tmp_path)


def foreign_folder(path: Path) -> Path:
    """As others write it: a post-processor puts the beginning of text in front, runs of spaces are added tokens."""
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 9], trainer)
    backend.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    backend.add_tokens(["    "])
    begin = backend.token_to_id("<|begin_of_text|>")
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<|begin_of_text|>"}}))
    (path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|end_of_text|>"}}))
    return path


def test_a_folder_from_elsewhere(tmp_path: Path) -> None:
    loaded = Tokenizer.load(foreign_folder(tmp_path))
    assert loaded.bos_id == loaded.id_of("<|begin_of_text|>")
    assert loaded.eos_id == loaded.pad_id == loaded.id_of("<|end_of_text|>")
    assert set(loaded.stop_ids) == {loaded.id_of("<|end_of_text|>"), loaded.id_of("<|eot_id|>")}
    ids = loaded.encode("the fox    jumps <|eot_id|>")
    assert loaded.decode(ids) == "the fox    jumps <|eot_id|>"
    assert loaded.bos_id not in ids
    assert loaded.id_of("<|eot_id|>") not in ids
    assert loaded.id_of("    ") in ids, "models were trained on it"
    with pytest.raises(DanluError, match="has no chat template"):
        loaded.encode_chat([{"role": "user", "content": "hi"}])
