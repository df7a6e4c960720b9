"""A small tokenizer of Python source and some Chinese, Japanese and Korean, trained once."""

import argparse
import inspect
import json
import textwrap
from pathlib import Path

import pytest

from danlu.tokenizer.tokenizer import Tokenizer
from danlu.tokenizer.train import train_on

EAST = "我们在训练一个小模型，它会写代码。これはテストです。カタカナ。한국어 문장입니다.\n" * 20


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    sources = [inspect.getsource(module) for module in (argparse, inspect, json, textwrap)]
    return train_on([*sources, EAST], vocab_size=1200)


@pytest.fixture(scope="session")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(path)
    return path
