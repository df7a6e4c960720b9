"""Vocabularies from before tokenizer.json, against the tokenizers that transformers makes of the same files."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizer_corpus import SOURCES
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, trainers

from danlu.errors import DanluError
from danlu.tokenizer.tokenizer import Tokenizer

TEXTS = [
    "",
    "Hello, World! naïve Café",
    "  def f(x):\n\treturn 'x'  ",
    "我们 and テスト 한국어",
    "unbelievably [MASK] </s> <s> <mask> 12345 ... \u00a0",
    "a" * 150,
    "e\u0301 ﬁ ½ 😀",
]


def write_config(path: Path, **config: Any) -> None:
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def bert_folder(path: Path, lowercase: bool = True, **config: Any) -> Path:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator([*SOURCES, *TEXTS], trainers.WordPieceTrainer(vocab_size=900, special_tokens=special))
    tokens = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    (path / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in tokens), encoding="utf-8")
    write_config(path, do_lower_case=lowercase, **config)
    return path


def bpe_folder(path: Path, special: list[str], **config: Any) -> Path:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        SOURCES, trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=alphabet)
    )
    content = json.loads(backend.to_str())["model"]
    (path / "vocab.json").write_text(json.dumps(content["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = "".join(f"{left} {right}\n" for left, right in content["merges"])
    (path / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    write_config(path, **config)
    return path


@pytest.mark.parametrize(
    ("lowercase", "options"),
    [(True, {}), (False, {}), (True, {"strip_accents": False}), (True, {"tokenize_chinese_chars": False})],
)
def test_bert(tmp_path: Path, lowercase: bool, options: dict[str, Any]) -> None:
    from transformers import BertTokenizer

    tokenizer = Tokenizer.load(bert_folder(tmp_path, lowercase, **options))
    vocab = {line: i for i, line in enumerate((tmp_path / "vocab.txt").read_text(encoding="utf-8").splitlines())}
    oracle = BertTokenizer(vocab=vocab, do_lower_case=lowercase, **options)
    for text in TEXTS:
        text = text.replace("[MASK]", "mask")  # in a text it is text here
        assert tokenizer.encode(text) == oracle(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode_for_encoder(text)[0] == oracle(text)["input_ids"]
        ids, types = tokenizer.encode_for_encoder(text, "return the self")
        expected = oracle(text, "return the self")
        assert (ids, types) == (expected["input_ids"], expected["token_type_ids"])
    assert tokenizer.kind == "wordpiece"
    assert (tokenizer.bos_id, tokenizer.eos_id) == (tokenizer.cls_id, tokenizer.sep_id) == (2, 3)
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.mask_id) == (0, 1, 4)
    assert (tokenizer.add_bos, tokenizer.add_eos) == (True, True)
    assert tokenizer.mask_id not in tokenizer.encode("[MASK]")
    assert tokenizer.encode("[MASK]", allow_special=True) == [4]


def test_bytes_of_word_pieces(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(bert_folder(tmp_path))
    ids = tokenizer.encode("returning unparsed values")
    assert tokenizer.decode_bytes(ids) == b" returning unparsed values"
    assert tokenizer.decode(ids) == "returning unparsed values"
    assert tokenizer.token_bytes()[ids].sum() == len(" returning unparsed values")
    assert tokenizer.decode([2, *ids, 3], skip_special=True) == "returning unparsed values"


@pytest.mark.parametrize("name", ["RobertaTokenizer", "BartTokenizer", None])
@pytest.mark.parametrize("prefix", [False, True])
def test_roberta(tmp_path: Path, name: str | None, prefix: bool) -> None:
    from transformers import RobertaTokenizer

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    named = {"tokenizer_class": name} if name else {}
    tokenizer = Tokenizer.load(bpe_folder(tmp_path, special, add_prefix_space=prefix, **named))
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    merges = [tuple(line.split(" ")) for line in (tmp_path / "merges.txt").read_text().splitlines()[1:]]
    oracle = RobertaTokenizer(vocab=vocab, merges=merges, add_prefix_space=prefix)
    for text in TEXTS:
        text = text.replace("<s>", "s").replace("</s>", "/s").replace("<mask>", "mask")
        assert tokenizer.encode_for_encoder(text)[0] == oracle(text)["input_ids"]
        assert tokenizer.encode_for_encoder(text, "a b")[0] == oracle(text, "a b")["input_ids"]
    assert (tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id) == (0, 2, 4)
    assert tokenizer.decode_bytes(tokenizer.encode("naïve x")).decode().removeprefix(" ") == "naïve x"


def test_gpt2_and_qwen(tmp_path: Path) -> None:
    from transformers import GPT2Tokenizer

    bpe_folder(tmp_path, ["<|endoftext|>"])
    tokenizer = Tokenizer.load(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    merges = [tuple(line.split(" ")) for line in (tmp_path / "merges.txt").read_text().splitlines()[1:]]
    oracle = GPT2Tokenizer(vocab=vocab, merges=merges)
    for text in TEXTS:
        assert tokenizer.encode(text) == oracle(text)["input_ids"]
    assert tokenizer.bos_id == tokenizer.eos_id == 0
    assert not tokenizer.add_bos

    later = {"900": {"content": "<|im_start|>", "special": True}, "901": {"content": "<|im_end|>", "special": True}}
    write_config(tmp_path, tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>", added_tokens_decoder=later)
    qwen = Tokenizer.load(tmp_path)
    assert (qwen.id_of("<|im_start|>"), qwen.eos_id) == (900, 901)
    assert qwen.encode("123") == [i for digit in "123" for i in qwen.encode(digit)], "its digits stand alone"


def test_saved_folders_give_the_same_ids_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for number, make in enumerate(
        (bert_folder, lambda path: bpe_folder(path, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]))
    ):
        source, saved = tmp_path / f"{number}", tmp_path / f"{number}-saved"
        source.mkdir()
        tokenizer = Tokenizer.load(make(source))
        tokenizer.save(saved)
        oracle, again = AutoTokenizer.from_pretrained(saved), Tokenizer.load(saved)
        for text in TEXTS[:4]:
            assert oracle(text, "b")["input_ids"] == tokenizer.encode_for_encoder(text, "b")[0]
            assert again.encode_for_encoder(text, "b") == tokenizer.encode_for_encoder(text, "b")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: write_config(f, tokenizer_class="MPNetTokenizer"), "its MPNetTokenizer is not BERT's own"),
        (lambda f: write_config(f, do_basic_tokenize=False), "is not BERT's own"),
        (lambda f: (f / "vocab.txt").write_text("[UNK]\na\n"), "holds no cls_token and no sep_token"),
        (lambda f: (f / "vocab.txt").write_bytes(b"\xff"), "is not UTF-8"),
        (lambda f: (f / "vocab.txt").unlink(), r"has no tokenizer\.json"),
    ],
)
def test_broken_bert_folders(tmp_path: Path, break_it: Any, message: str) -> None:
    bert_folder(tmp_path)
    break_it(tmp_path)
    with pytest.raises(DanluError, match=message):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: write_config(f, tokenizer_class="CLIPTokenizer"), "how a CLIPTokenizer cuts text"),
        (lambda f: (f / "merges.txt").write_text("a b c\n"), r"merges.txt:1: expected two tokens"),
        (lambda f: (f / "merges.txt").write_text("qqq zzz\n"), "do not fit each other"),
        (lambda f: (f / "vocab.json").write_text("[1]"), "must hold a JSON object"),
        (lambda f: (f / "vocab.json").write_text('{"a": -1}'), "must hold a JSON object of token and id"),
        (lambda f: (f / "vocab.json").write_text("{"), "is not valid JSON"),
    ],
)
def test_broken_bpe_folders(tmp_path: Path, break_it: Any, message: str) -> None:
    bpe_folder(tmp_path, ["<|endoftext|>"])
    break_it(tmp_path)
    with pytest.raises(DanluError, match=message):
        Tokenizer.load(tmp_path)


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(DanluError, match="is not a tokenizer; give its folder"):
        Tokenizer.load(tmp_path / "x.txt")
