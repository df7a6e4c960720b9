"""A whole life in cards, made without running a model: what the report reads."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from danlu.formats.card import Card, Input, input_of

FUNCTIONS = [
    {
        "path": "textwrap.py",
        "name": "dedent",
        "prompt": 'def dedent(text):\n    """Remove any common leading whitespace from every line in `text`."""\n',
        "reference": "    margin = os.path.commonprefix(text.split('\\n'))\n    return text\n",
    },
    {
        "path": "bisect.py",
        "name": "insort_right",
        "prompt": 'def insort_right(a, x, lo=0, hi=None):\n    """Insert item x in list a, and keep it sorted."""\n',
        "reference": "    lo = bisect_right(a, x, lo, hi)\n    a.insert(lo, x)\n",
    },
]
COMPLETIONS = {
    "untrained": ["�cept cept<|fim|>irty\x0bquoP  __ 7;;)", "dictdict ]]~ ümmapproxy lo,,,"],
    "base": [
        "    if not text:\n        return text\n    return text.strip()\n",
        "    if lo < 0:\n        raise ValueError('lo must be non-negat",
    ],
    "chat": ["    return '\\n'.join(line.lstrip() for line in text.splitlines())\n", "    a.insert(bisect(a, x), x)\n"],
}


def write_card(
    folder: Path, kind: Any, verb: str, config: dict[str, Any], inputs: dict[str, Path | Input], **known: Any
) -> Path:
    """A finished folder that holds nothing but its card."""
    folder.mkdir(parents=True)
    found = [given if isinstance(given, Input) else input_of(role, given) for role, given in inputs.items()]
    fingerprint = hashlib.sha256(f"{folder.name} {verb} {[i.fingerprint for i in found]}".encode()).hexdigest()
    versions = {"python": "3.11.2", "danlu": "0.1.0", "torch": "2.13.0"}
    Card(kind, verb, fingerprint, config, found, versions=versions, created="2026-01-02T03:04:05+0000", **known).save(
        folder
    )
    return folder


def write_metrics(folder: Path, steps: int) -> None:
    """A plausible training log, with a last line that a kill cut off."""
    with (folder / "metrics.jsonl").open("w") as log:
        for step in range(1, steps + 1):
            lr = 0.02 * min(1, step / 40) * min(1, (steps - step) / (0.6 * steps))
            row = {"step": step, "loss": 2.2 + 6 * math.exp(-step / 90) + 0.05 * math.sin(step), "lr": lr}
            row["tokens_per_second"] = 9600 + 200 * math.sin(step / 7)
            if step % 40 == 0:
                row["heldout_bits_per_byte"] = 1.1 + 3 * math.exp(-step / 120)
            log.write(json.dumps(row) + "\n")
        log.write('{"step": 4')


def make_life(at: Path) -> Path:
    """A folder with data, tok, untrained, base, instructions, chat (the model to report on) and three evaluations."""
    at.mkdir(parents=True)
    filters = [
        {
            "name": "unicode",
            "help": "Repairs mojibake and normalises to NFC.",
            "documents_removed": 0,
            "documents_changed": 12,
            "bytes_removed": 310,
            "samples": [{"path": "lib/a.py", "before": "na�ve cafÃ©", "after": "naïve café"}],
        },
        {
            "name": "near_empty",
            "help": "Removes documents without enough text to learn from.",
            "documents_removed": 41,
            "documents_changed": 0,
            "bytes_removed": 2048,
            "samples": [{"path": "lib/x/__init__.py", "before": "# empty", "after": None}],
        },
        {
            "name": "pii",
            "help": "Masks e-mail addresses, numbers and keys.",
            "documents_removed": 0,
            "documents_changed": 88,
            "bytes_removed": 1900,
            "samples": [{"path": "lib/b.py", "before": "# by jo@example.org", "after": "# by <EMAIL>"}],
        },
        {
            "name": "language",
            "help": "Keeps the languages asked for.",
            "documents_removed": 0,
            "documents_changed": 0,
            "bytes_removed": 0,
            "samples": [],
        },
    ]
    data = write_card(
        at / "data",
        "data",
        "data build",
        {"corpus": ["stdlib"], "out": "data", "heldout": 0.05},
        {"corpus stdlib": Input("corpus stdlib", "stdlib", "5" * 64)},
        seconds=14.2,
        metrics={
            "documents_read": 1612,
            "documents_kept": 1540,
            "bytes_read": 11_800_000,
            "bytes_kept": 11_420_000,
            "train_documents": 1463,
            "train_bytes": 10_900_000,
            "heldout_documents": 77,
            "heldout_bytes": 520_000,
        },
        details={
            "filters": filters,
            "dedup": {
                "threshold": 0.8,
                "exact_removed": 3,
                "near_removed": 28,
                "samples": [{"documents": ["lib/cp437.py", "lib/cp850.py"], "similarity": 0.91}],
            },
        },
    )
    tok = write_card(
        at / "tok",
        "tokenizer",
        "tokenizer train",
        {"data": str(data), "out": "tok", "vocab_size": 4096},
        {"data": data},
        seconds=6.1,
        metrics={"vocab_size": 4096, "bytes_per_token": 3.413, "bytes_per_token_heldout": 3.352},
        details={
            "longest_tokens": ["            ", "----------------", "NotImplementedError"],
            "special_tokens": ["<|endoftext|>"],
        },
    )
    shape = {"n_layers": 4, "dim": 256, "vocab_size": 4096}
    facts = {"model_config": shape, "precision": "bf16", "compiled": True, "device": "cpu", "threads": 2}
    train = {
        "parameters": 4_200_000,
        "matmul_peak_flops": 1.31e12,
        "compile_seconds": 21.0,
        "peak_memory_bytes": 1_900_000_000,
    }
    source = {"data": str(data), "tokenizer": str(tok)}
    untrained = write_card(
        at / "untrained",
        "model",
        "pretrain",
        {**source, "out": "untrained", "steps": 0},
        {"data": data, "tokenizer": tok},
        seconds=1.0,
        metrics={"steps": 0, "tokens": 0, **train},
        details=facts,
    )
    base = write_card(
        at / "base",
        "model",
        "pretrain",
        {**source, "out": "base", "minutes": 3.0},
        {"data": data, "tokenizer": tok},
        seconds=184.5,
        metrics={
            "steps": 430,
            "tokens": 1_761_280,
            "train_loss": 2.214,
            "heldout_bits_per_byte": 1.1834,
            "tokens_per_second": 9783.0,
            "flops_per_second": 5.6e11,
            "share_of_peak": 0.427,
            "train_seconds": 180.0,
            **train,
        },
        details=facts,
    )
    write_metrics(base, 430)
    mined = write_card(
        at / "instructions",
        "data",
        "data mine",
        {"data": str(data), "out": "instructions"},
        {"data": data},
        seconds=9.0,
        metrics={"pairs": 9120, "train_documents": 8700, "heldout_documents": 420},
        details={},
    )
    chat = write_card(
        at / "chat",
        "model",
        "finetune",
        {"model": str(base), "data": str(mined), "out": "chat", "minutes": 1.0},
        {"model": base, "data": mined},
        seconds=63.0,
        metrics={
            "steps": 120,
            "tokens": 400_000,
            "train_loss": 1.62,
            "heldout_bits_per_byte": 1.2012,
            "tokens_per_second": 8100.0,
            "flops_per_second": 4.9e11,
            "share_of_peak": 0.374,
            "train_seconds": 60.0,
            **train,
        },
        details=facts,
    )
    write_metrics(chat, 120)
    for model, bits, parse, compiles in (
        (untrained, 3.9121, 0.0, 0.0),
        (base, 1.1834, 0.46, 0.44),
        (chat, 1.2012, 0.83, 0.81),
    ):
        samples = [
            {**function, "completion": text, "parses": parse > 0.5, "compiles": parse > 0.5}
            for function, text in zip(FUNCTIONS, COMPLETIONS[model.name], strict=True)
        ]
        write_card(
            at / f"eval-{model.name}",
            "evaluation",
            "evaluate",
            {"model": str(model), "data": str(data)},
            {"model": model, "data": data},
            seconds=20.0,
            details={"samples": samples},
            metrics={
                "bits_per_byte": bits,
                "functions": 100,
                "parse_rate": parse,
                "compile_rate": compiles,
                "compressors": {"xz": 1.5912, "xz_primed": 1.2641, "gzip": 1.9306},
            },
        )
    return at
