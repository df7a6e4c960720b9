"""Training throughput and what it buys: `python benchmarks/pretrain.py`.

Two measurements, one JSON line:

- throughput: depth 6, width 384, 512 tokens a row, vocabulary 8,192, batch of 8 x 512: tokens/s and FLOP/s of whole
  optimizer steps (forward, backward, Muon + AdamW), beside the matmul peak of this machine, measured before and after
  in the same process. The peer is the same step in plain fp32 without compilation, run in turns (A B A B).
- bits per byte (with --minutes): a model pre-trained for that long on the standard library's source, on held-out
  modules, beside xz primed with the training text. This takes --minutes plus about two.

Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from danlu import hardware
from danlu.data.packing import DocumentSequences, RowStream
from danlu.models.causal_lm import CausalLM
from danlu.models.config import model_config_for
from danlu.training.config import PretrainConfig
from danlu.training.loop import Trainer
from danlu.training.pretrain import default_rates

SEQ_LEN, VOCAB = 512, 8192


def make_trainer(out: Path, size: int, precision: str, compile: str, batch_tokens: int) -> Trainer:
    """A trainer on random tokens, warmed up: throughput does not depend on what the tokens say."""
    config = PretrainConfig(
        data=out, tokenizer=out, out=out, size=size, seq_len=SEQ_LEN, steps=1_000_000, batch_tokens=batch_tokens,
        precision=precision, compile=compile, log_to=(),
    )  # fmt: skip
    model = CausalLM(model_config_for(size, VOCAB, SEQ_LEN))
    model.init_weights(torch.Generator().manual_seed(0))
    ids = np.random.default_rng(0).integers(2, VOCAB, 500_000).astype(np.uint16)
    rows = RowStream(DocumentSequences(ids, np.arange(0, 500_001, 5_000), 0), SEQ_LEN, seed=0, pad_id=1)
    rates = default_rates(config, model.config)
    trainer = Trainer(config, model, rows, held_out=None, rates=rates, batch_tokens=batch_tokens)
    trainer.total_steps = 1_000_000
    trainer._compile()
    for _ in range(2):
        trainer._step()
    return trainer


def seconds_of_step(trainer: Trainer) -> float:
    """Wall time of one optimizer step."""
    hardware.synchronize(trainer.device)
    start = time.perf_counter()
    trainer._step()
    hardware.synchronize(trainer.device)
    return time.perf_counter() - start


def measure_peak(dtype: torch.dtype, device: torch.device) -> float:
    """The matmul peak now, not the remembered one."""
    hardware.matmul_peak.cache_clear()
    return hardware.matmul_peak(dtype, device)


def throughput(size: int, rounds: int, batch_tokens: int) -> dict[str, object]:
    """Whole steps of the default trainer and of plain fp32, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        ours = make_trainer(Path(folder), size, "auto", "always", batch_tokens)
        plain = make_trainer(Path(folder), size, "fp32", "never", batch_tokens)
        peaks = [measure_peak(ours.dtype, ours.device)]
        times: dict[str, list[float]] = {"ours": [], "plain": []}
        for _ in range(rounds):
            times["ours"].append(seconds_of_step(ours))
            times["plain"].append(seconds_of_step(plain))
        peaks.append(measure_peak(ours.dtype, ours.device))
    tokens_per_step = ours.rows_per_step * SEQ_LEN
    rate = tokens_per_step / statistics.median(times["ours"])
    flops = rate * ours.model.estimate_flops(SEQ_LEN)
    return {
        "size": size,
        "dim": ours.model.config.dim,
        "seq_len": SEQ_LEN,
        "vocab": VOCAB,
        "batch_tokens": tokens_per_step,
        "parameters": ours.model.num_parameters(),
        "precision": ours.precision,
        "compiled": ours.compiled,
        "compile_seconds": round(ours.compile_seconds, 1),
        "tokens_per_second": round(rate),
        "gflops": round(flops / 1e9, 1),
        "matmul_peak_gflops": round(max(peaks) / 1e9, 1),
        "share_of_peak": round(flops / max(peaks), 3),
        "plain_fp32_tokens_per_second": round(tokens_per_step / statistics.median(times["plain"])),
        "ratio_to_plain_fp32": round(
            statistics.median(b / a for a, b in zip(times["ours"], times["plain"], strict=True)), 2
        ),
    }


def bits_per_byte(minutes: float, size: int) -> dict[str, object]:
    """The quickstart's path up to the pre-trained model."""
    from danlu import DataConfig, EvaluateConfig, TokenizerConfig, build_data, evaluate, pretrain, train_tokenizer
    from danlu.formats.card import Card

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        build_data(DataConfig(corpus=("stdlib",), out=root / "data"))
        train_tokenizer(TokenizerConfig(data=root / "data", out=root / "tokenizer", vocab_size=4096))
        start = time.perf_counter()
        pretrain(
            PretrainConfig(
                data=root / "data", tokenizer=root / "tokenizer", out=root / "model", size=size, minutes=minutes
            )
        )
        took = time.perf_counter() - start
        tasks = ("bits_per_byte", "compressors")
        evaluate(EvaluateConfig(model=root / "model", data=root / "data", out=root / "evaluation", tasks=tasks))
        model, evaluation = Card.load(root / "model"), Card.load(root / "evaluation")
    return {
        "minutes": minutes,
        "pretrain_wall_seconds": round(took, 1),
        "size": size,
        "tokens": model.metrics["tokens"],
        "tokens_per_second": round(model.metrics["tokens_per_second"]),
        "heldout_bits_per_byte": round(evaluation.metrics["bits_per_byte"], 4),
        "compressors": evaluation.metrics["compressors"],
    }


def main() -> None:
    """Measure and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=6, help="depth of the throughput model (default 6: width 384)")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each kind, in turns (default 10)")
    parser.add_argument("--batch-tokens", type=int, default=8 * SEQ_LEN, help="tokens per step (default 4096)")
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="also pre-train for so long and report bits per byte"
    )
    parser.add_argument("--minutes-size", type=int, default=4, help="depth of that model (default 4)")
    arguments = parser.parse_args()
    result: dict[str, object] = {"benchmark": "pretrain", "cpu": cpu_name(), "threads": torch.get_num_threads(),
                                 "torch": torch.__version__}  # fmt: skip
    result["throughput"] = throughput(arguments.size, arguments.rounds, arguments.batch_tokens)
    if arguments.minutes:
        result["pretraining"] = bits_per_byte(arguments.minutes, arguments.minutes_size)
    print(json.dumps(result))


def cpu_name() -> str:
    """Model name and the instruction sets that decide the result."""
    flags = hardware.cpu_flags()
    sets = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags]
    return f"{platform.machine()} {' '.join(sets)}".strip()


if __name__ == "__main__":
    main()
