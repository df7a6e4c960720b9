"""A small tokenizer of Python source and some Chinese, Japanese and Korean, trained once."""

from pathlib import Path

import pytest
from tokenizer_corpus import EAST, SOURCES

from danlu.tokenizer.tokenizer import Tokenizer
from danlu.tokenizer.train import train_on


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_on([*SOURCES, EAST], vocab_size=1200)


@pytest.fixture(scope="session")
def own_cuts() -> Tokenizer:
    """Trained with the pattern that llama.cpp does not know."""
    return train_on([*SOURCES, EAST], vocab_size=1200, pre_tokens="danlu")


@pytest.fixture(scope="session")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(path)
    return path
