"""`danlu evaluate`: what a model is worth, on the held-out documents of a data folder."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, Literal

from rich.table import Table

from danlu import console
from danlu.config import validate
from danlu.data.folder import DataFolder
from danlu.engine.config import SamplingParams
from danlu.engine.verbs import open_model
from danlu.evaluation.bits_per_byte import bits_per_byte
from danlu.evaluation.code import code_metrics, write_functions
from danlu.evaluation.compressors import compressor_bits_per_byte
from danlu.evaluation.config import EvaluateConfig
from danlu.formats.card import Stage, card_if_any
from danlu.hardware import DTYPES, pick_precision
from danlu.hub.pull import with_models
from danlu.models.causal_lm import CausalLM
from danlu.tokenizer.tokenizer import Tokenizer


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure a model, print the figures, and return them; with ``out`` they are also kept in an evaluation folder.

    Returns:
        ``bits_per_byte``, ``heldout_bytes``, ``heldout_tokens``; ``functions``, ``parse_rate``, ``compile_rate``,
        ``distinct_rate``, ``mean_body_lines``; ``compressors: {gzip, xz, xz_primed}`` (bits per byte): those of the
        tasks asked for.

    Raises:
        DanluError: model or data cannot be used, or the output folder holds another run.
    """
    config = with_models(validate(config), "model")
    data = DataFolder(config.data)
    model, tokenizer = open_model(config.model, config.device, "fp32", CausalLM)
    precision = pick_precision(config.precision, model.device)
    model.compute_dtype = DTYPES[precision]
    stage = None
    if config.out is not None:
        inputs = {"model": config.model, "data": config.data}
        stage = Stage.open(
            config.out, kind="evaluation", verb="evaluate", config=config, inputs=inputs, overwrite=config.overwrite
        )
        if stage.finished:
            console.note(f"{config.out}: already measured, nothing to do")
            _print(stage.card.metrics)
            return stage.card.metrics
    with stage.preparing() if stage is not None else contextlib.nullcontext():
        metrics, details = _measure(config, data, model, tokenizer)
    if stage is not None:
        stage.finish(metrics, {**details, "precision": precision, "device": str(model.device)})
    _print(metrics)
    return metrics


def _measure(
    config: EvaluateConfig, data: DataFolder, model: CausalLM, tokenizer: Tokenizer
) -> tuple[dict[str, Any], dict[str, Any]]:
    metrics: dict[str, Any] = {}
    details: dict[str, Any] = {}
    if "bits_per_byte" in config.tasks:
        with console.progress("scoring held-out text", unit="tokens") as advance:
            score = bits_per_byte(
                model, tokenizer, _texts(data, "heldout"), _context(config, model), config.stride, progress=advance
            )
        metrics |= {"bits_per_byte": score.bits_per_byte, "heldout_bytes": score.bytes, "heldout_tokens": score.tokens}
    if "code" in config.tasks:
        prompt_format = _prompt_format(config)
        params = SamplingParams(max_new_tokens=config.max_new_tokens, temperature=config.temperature, seed=config.seed)
        with console.progress("writing functions", config.functions) as advance:
            samples = write_functions(
                model,
                tokenizer,
                data,
                functions=config.functions,
                prompt_format=prompt_format,
                params=params,
                batch_size=config.batch_size,
                progress=advance,
            )
        if samples:
            metrics |= code_metrics(samples)
        else:
            console.warn(f"{config.data}: holds out no documented Python functions; the model wrote no code")
        details |= {"prompt_format": prompt_format, "samples": [dataclasses.asdict(sample) for sample in samples]}
    if "compressors" in config.tasks:
        console.note("compressing the same text with gzip and xz")
        metrics["compressors"] = compressor_bits_per_byte(_texts(data, "train"), _texts(data, "heldout"))
    return metrics, details


def _texts(data: DataFolder, split: Literal["train", "heldout"]) -> Any:
    return (document.text for document in data.documents(split) if document.kind == "text")


def _context(config: EvaluateConfig, model: CausalLM) -> int:
    """Positions beyond the rows of its training are new to a model, whatever its config allows."""
    card = card_if_any(config.model)
    trained = card.config.get("seq_len") if card is not None else None
    return config.context or min(trained or model.config.context, model.config.context)


ANSWERING = ("finetune", "align", "distil", "merge")
"""Verbs that make models which have learned to answer."""


def _prompt_format(config: EvaluateConfig) -> Literal["plain", "chat"]:
    if config.prompt_format != "auto":
        return config.prompt_format
    card = card_if_any(config.model)
    return "chat" if card is not None and card.verb in ANSWERING else "plain"


def _print(metrics: dict[str, Any]) -> None:
    rows = {
        "bits per held-out byte": (metrics.get("bits_per_byte"), "{:.4f}"),
        **{
            f"  of {name.replace('_', ', ')}": (value, "{:.4f}")
            for name, value in metrics.get("compressors", {}).items()
        },
        "functions written": (metrics.get("functions"), "{:d}"),
        "  that parse": (metrics.get("parse_rate"), "{:.1%}"),
        "  that compile": (metrics.get("compile_rate"), "{:.1%}"),
        "  with a body of their own": (metrics.get("distinct_rate"), "{:.1%}"),
        "  lines in a body": (metrics.get("mean_body_lines"), "{:.1f}"),
    }
    table = Table(box=None, show_header=False)
    for name, (value, form) in rows.items():
        if value is not None:
            table.add_row(name, form.format(value))
    console.out().print(table)
