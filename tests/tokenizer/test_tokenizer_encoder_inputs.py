"""What encoders read: special tokens, types, truncation and the words of tokens, against transformers."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer_legacy import bert_folder, bpe_folder

from danlu.errors import DanluError
from danlu.tokenizer.encoder_inputs import longest_first
from danlu.tokenizer.tokenizer import Tokenizer

ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


@pytest.fixture(scope="module", params=["bert", "roberta"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp(request.param)
    made = bert_folder(path) if request.param == "bert" else bpe_folder(path, ROBERTA, add_prefix_space=True)
    tokenizer = Tokenizer.load(made)
    saved = tmp_path_factory.mktemp("saved")
    tokenizer.save(saved)
    return tokenizer, AutoTokenizer.from_pretrained(saved)


words = st.lists(st.sampled_from(["return", "self", "unbelievable", "x", "Café", "中文", "123"]), max_size=12)


@settings(max_examples=80, deadline=None)
@given(first=words, second=st.none() | words.filter(len), max_length=st.none() | st.integers(4, 40))
def test_pairs_are_truncated_as_in_transformers(
    pair: tuple[Tokenizer, Any], first: list[str], second: list[str] | None, max_length: int | None
) -> None:
    tokenizer, oracle = pair
    texts = [" ".join(text) for text in (first, second) if text is not None]
    expected = oracle(*texts, truncation=max_length is not None, max_length=max_length, return_token_type_ids=True)
    ids, types = tokenizer.encode_for_encoder(*texts, max_length=max_length)
    assert ids == expected["input_ids"]
    assert types == expected["token_type_ids"]
    assert max_length is None or len(ids) <= max_length


@settings(max_examples=100, deadline=None)
@given(sentence=words, max_length=st.none() | st.integers(2, 20))
def test_words_of_tokens(pair: tuple[Tokenizer, Any], sentence: list[str], max_length: int | None) -> None:
    tokenizer, oracle = pair
    expected = oracle(sentence, is_split_into_words=True, truncation=max_length is not None, max_length=max_length)
    ids, word_of_token = tokenizer.encode_words(sentence, max_length)
    assert ids == expected["input_ids"]
    assert word_of_token == expected.word_ids()
    assert [i for i in word_of_token if i is not None] == sorted(i for i in word_of_token if i is not None)


@given(first=st.integers(0, 50), second=st.integers(0, 50), room=st.integers(0, 60))
def test_longest_first_keeps_as_much_as_fits(first: int, second: int, room: int) -> None:
    kept = longest_first(first, second, room)
    assert sum(kept) == min(first + second, room)
    assert kept[0] <= first
    assert kept[1] <= second
    assert kept == (first, second) or abs(kept[0] - kept[1]) <= 1 or min(kept) == min(first, second)


def test_no_room_for_special_tokens(pair: tuple[Tokenizer, Any]) -> None:
    for call in (pair[0].encode_for_encoder, lambda text, max_length: pair[0].encode_words([text], max_length)):
        with pytest.raises(DanluError, match="max_length: 1 has no room for the 2 special tokens"):
            call("x", max_length=1)


def test_a_decoder_begins_with_its_own_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert tokenizer.add_bos
    assert not tokenizer.add_eos
    assert tokenizer.encode_for_encoder("x")[0] == [tokenizer.bos_id, *tokenizer.encode("x")]
    assert tokenizer.cls_id is tokenizer.sep_id is tokenizer.mask_id is tokenizer.unk_id is None
    bare = {key: value for key, value in tokenizer.definition.items() if key != "post_processor"}
    assert Tokenizer(bare).add_bos, "made here, before tokenizers said so themselves"
    silent = Tokenizer(tokenizer.definition, {**tokenizer.config, "add_bos_token": False, "add_eos_token": True})
    assert silent.encode_for_encoder("x")[0] == [*tokenizer.encode("x"), tokenizer.eos_id]
