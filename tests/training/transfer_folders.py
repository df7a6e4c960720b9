"""Tiny random models with tokenizers, and rows out of the standard library's own source."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModel, AutoModelForSeq2SeqLM, BertConfig, PreTrainedModel, T5Config

from danlu.models.causal_lm import CausalLM
from danlu.models.load import save_model
from danlu.nn.config import ModelConfig, Rope
from danlu.tokenizer.train import train_on

MODULES = ("argparse", "subprocess", "unittest.mock", "logging", "email.message", "asyncio.events")


def sources() -> dict[str, str]:
    return {name: inspect.getsource(__import__(name, fromlist=["x"])) for name in MODULES}


def lines() -> list[dict[str, Any]]:
    """Is it a line of code, or of a docstring?"""
    rows: dict[str, dict[str, Any]] = {}
    for name, source in sources().items():
        prose = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                prose |= {line.strip() for line in (ast.get_docstring(node) or "").splitlines()}
        for line in map(str.strip, source.splitlines()):
            if len(line) > 25 and line[0] not in "#\"'" and line not in rows:
                rows[line] = {"text": line, "label": "prose" if line in prose else "code", "module": name}
    by_label = [[row for row in rows.values() if row["label"] == label][:500] for label in ("code", "prose")]
    return [row for pair in zip(*by_label, strict=False) for row in pair]


def signatures() -> list[dict[str, Any]]:
    """Names of functions and classes where they are defined."""
    rows = []
    for source in sources().values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                text = ast.unparse(node).replace("@", "").splitlines()[0]
                kind = "FUNC" if text.startswith("def ") else "CLASS"
                if text.startswith(("def ", "class ")):
                    start = text.index(" ") + 1
                    rows.append(
                        {"text": text, "spans": [{"start": start, "end": start + len(node.name), "label": kind}]}
                    )
    return rows


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def _tokenizer(folder: Path, texts: list[str], *, ends: tuple[str, ...], template: tuple[str, str]) -> int:
    """WordPiece with the special tokens of a family; returns the size of the vocabulary."""
    special = ["[PAD]", "[UNK]", *ends]
    built = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    built.normalizer = normalizers.BertNormalizer(lowercase=True)
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    built.decoder = decoders.WordPiece()
    built.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=700, special_tokens=special))
    single, pair = template
    tokens = [(token, built.token_to_id(token)) for token in ends]
    built.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=tokens)
    built.save(str(folder / "tokenizer.json"))
    roles = {"cls_token": ends[0], "sep_token": ends[-1]} if len(ends) > 1 else {"eos_token": ends[0]}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]", **roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return built.get_vocab_size()


def _save(reference: PreTrainedModel, folder: Path) -> Path:
    reference.save_pretrained(folder)
    return folder


def bert_folder(folder: Path) -> Path:
    folder.mkdir()
    size = _tokenizer(
        folder, list(sources().values()), ends=("[CLS]", "[SEP]"),
        template=("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    )  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3,
        max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    return _save(AutoModel.from_config(config), folder)


def t5_folder(folder: Path, texts: list[str]) -> Path:
    folder.mkdir()
    size = _tokenizer(folder, texts, ends=("</s>",), template=("$A </s>", "$A </s> $B:0 </s>"))
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=size, d_model=48, d_kv=16, d_ff=96, num_layers=2, num_heads=3, eos_token_id=2, pad_token_id=0,
        decoder_start_token_id=0,
    )  # fmt: skip
    return _save(AutoModelForSeq2SeqLM.from_config(config), folder)


def decoder_folder(folder: Path) -> Path:
    texts = [textwrap.dedent(source) for source in sources().values()]
    tokenizer = train_on(texts, 400, 2)
    config = ModelConfig(
        qk_norm="head", rope=Rope(), vocab_size=tokenizer.vocab_size, n_layers=2, dim=48, n_heads=2, n_kv_heads=1,
        head_dim=16, ffn_dim=96, context=128,
    )  # fmt: skip
    model = CausalLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(model, folder, tokenizer)
    return folder
