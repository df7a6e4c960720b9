"""What the tokenizers of these tests learn from: some Python source, some Chinese, Japanese and Korean."""

import argparse
import inspect
import json
import textwrap

EAST = "我们在训练一个小模型，它会写代码。これはテストです。カタカナ。한국어 문장입니다.\n" * 20
SOURCES = [inspect.getsource(module) for module in (argparse, inspect, json, textwrap)]
