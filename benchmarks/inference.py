"""Inference beside the fast engines on a CPU: `python benchmarks/inference.py` (`pip install '.[bench]'`).

SmolLM2-135M-Instruct Q4_1, greedy, danlu beside llama.cpp, OpenVINO GenAI and, as a slow reference, transformers, as
far as they are installed. A table for each task: decoding, prefill, sixteen requests at once, a prompt whose beginning
is cached, the start of a process, memory, speculation. One JSON line ends the output.

Every engine lives in a process of its own, which is stopped while another is measured, and gets the same token ids in
the same round (A B C A B C, median of the rounds). "danlu x" is how many times better danlu does than the row's engine,
the median of the ratios within a round. Shares are of what this machine reads or multiplies right before and after each
turn, since its neighbours leave it more or less from one minute to the next: 96 MB read by the same threads against the
bytes that a token takes (weights as stored, keys and values as 2-byte numbers), and the best matrix product against the
FLOPs of the prompt.

llama.cpp runs the requests as one batch of many sequences, which is what its server does without HTTP in between.
Nothing else should run on the machine.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from comparison import comparison_parser, parse_comparison
from inference_peers import IMPORTS
from inference_tasks import NEW, PROMPT, TASKS, Contestant, Prompts, Task, Texts
from inference_worker import PeerFailed

from danlu import hardware
from danlu.formats.gguf_file import GGUFFile
from danlu.models.load import read_config
from danlu.tokenizer.tokenizer import Tokenizer

Rounds = dict[str, list[dict[str, float]]]
"""Figures of each contestant in each round."""

READ_BYTES = 96 * 10**6


def work_of(model: Path) -> dict[str, float]:
    """What a token costs at least, by what limits it: bytes read to decode one, averaged over an answer of the decode
    task, and FLOPs of one of the prompt of the prefill task. From the shapes of the file, whose head is the embedding:
    read whole for a new token, not run over a prompt."""
    config, infos = read_config(model), GGUFFile(model).infos
    kv_bytes = 2 * 2 * config.n_layers * config.n_kv_heads * config.head_dim
    body = sum(torch.Size(info.shape).numel() for name, info in infos.items() if name != "token_embd.weight")
    attention = 4 * config.n_layers * config.n_heads * config.head_dim * PROMPT / 2
    weights = sum(info.n_bytes for info in infos.values())
    return {"bandwidth": weights + kv_bytes * (PROMPT + NEW / 2), "matmul peak": 2 * body + attention}


def read_bandwidth() -> float:
    """Bytes a second of the best of many sums over 96 MB."""
    numbers = torch.ones(READ_BYTES // 4)
    best = 0.0
    for _ in range(50):
        start = time.perf_counter()
        numbers.sum()
        best = max(best, READ_BYTES / (time.perf_counter() - start))
    return best


def matmul_peak() -> float:
    """FLOPs a second of the best matrix product, in the precision that this CPU is best at."""
    device = torch.device("cpu")
    hardware.matmul_peak.cache_clear()
    return hardware.matmul_peak(hardware.DTYPES[hardware.pick_precision("auto", device)], device)


LIMITS = {"bandwidth": read_bandwidth, "matmul peak": matmul_peak}


def measure(
    name: str, contestants: list[Contestant], texts: Texts, rounds: int, work: dict[str, float], skipped: dict[str, str]
) -> Rounds:
    """The task in turns; who fails it is left out of it."""
    task = TASKS[name]
    running = [contestant for contestant in contestants if contestant.engine in task.engines]
    found: Rounds = {contestant.name: [] for contestant in running}
    for _ in range(min(rounds, task.rounds or rounds)):
        prompts = task.prompts(texts)
        for contestant in list(running):
            try:
                found[contestant.name].append(turn(task, contestant, prompts, work))
            except PeerFailed as error:
                contestant.close()
                running.remove(contestant)
                del found[contestant.name]
                skipped[f"{name}: {contestant.name}"] = str(error)
                print(f"{name}: {contestant.name} is left out: {error}", file=sys.stderr)
    return found


def turn(task: Task, contestant: Contestant, prompts: Prompts, work: dict[str, float]) -> dict[str, float]:
    """One turn, and where the task has a limit the share of it."""
    if task.limit is None:
        return task.measure(contestant, prompts)
    limit, cost = LIMITS[task.limit], work[task.limit]
    before = limit()
    figures = task.measure(contestant, prompts)
    most = (before + limit()) / 2
    return {**figures, f"share of {task.limit}": next(iter(figures.values())) * cost / most, task.limit: most}


def table(task: Task, rounds: Rounds) -> dict[str, dict[str, float]]:
    """Print and return medians, ratios and shares."""
    found: dict[str, dict[str, float]] = {}
    for name, figures in rounds.items():
        row = {key: statistics.median(one[key] for one in figures) for key in figures[0]}
        compared = next(iter(row))
        if name != "danlu" and "danlu" in rounds:
            ratios = [a[compared] / b[compared] for a, b in zip(rounds["danlu"], figures, strict=True)]
            row["danlu x"] = statistics.median(ratios if task.more_is_better else [1 / ratio for ratio in ratios])
        found[name] = row
    columns = list(dict.fromkeys(key for row in found.values() for key in row))
    print(f"\n{task.what}\n{'':24}" + "".join(f"{column:>22}" for column in columns))
    for name, row in found.items():
        print(f"{name:<24}" + "".join(f"{row[key]:22.4g}" if key in row else " " * 22 for key in columns))
    return found


def installed(python: str, engine: str) -> str | None:
    """The version of an engine's library in an environment; None if it is not there."""
    distribution = {"danlu": "danlu", "llama.cpp": "llama-cpp-python", "openvino": "openvino-genai"}.get(engine, engine)
    code = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"
    done = subprocess.run([python, "-c", code, distribution], capture_output=True, text=True)
    return done.stdout.strip() or None


def main() -> None:
    """Measure, print the tables and one JSON line."""
    meaning = "an engine of another environment, as another build of llama.cpp: llama.cpp=/path/bin/python"
    given = parse_comparison(comparison_parser(__doc__, TASKS, IMPORTS, "--also", meaning), TASKS, IMPORTS)
    torch.set_num_threads(given.threads)
    model = given.model

    skipped: dict[str, str] = {}
    contestants, versions = [], {}
    for name, engine, python in [
        *((engine, engine, sys.executable) for engine in given.peers),
        *((f"{engine} ({i})", engine, python) for i, (engine, python) in enumerate(given.elsewhere, 2)),
    ]:
        if version := installed(python, engine):
            contestants.append(Contestant(name, engine, python, model, given.threads))
            versions[name] = version
        else:
            skipped[name] = "not installed"
            print(f"{name} is left out: not installed (pip install '.[bench]')", file=sys.stderr)

    texts, work = Texts(Tokenizer.load(model)), work_of(model)
    try:
        measured = {name: measure(name, contestants, texts, given.rounds, work, skipped) for name in given.only}
        idle = {contestant.name: contestant.idle_cores for contestant in contestants}
    finally:
        for contestant in contestants:
            contestant.close()
    print(f"\na decoded token reads {work['bandwidth'] / 1e6:.1f} MB, one of the prompt takes", end=" ")
    print(f"{work['matmul peak'] / 1e6:.0f} MFLOP; cores busy while idle: {idle}")
    result = {
        "benchmark": "inference", "model": model.name, "cpu": platform.machine(), "threads": given.threads,
        "rounds": given.rounds, "torch": torch.__version__, "versions": versions, "idle_cores": idle,
        "bytes_per_token": work["bandwidth"], "flops_per_token": work["matmul peak"],
        "skipped": skipped,
    }  # fmt: skip
    for name, rounds in measured.items():
        result[name] = table(TASKS[name], rounds)
    print(f"\n{json.dumps(result)}")


if __name__ == "__main__":
    main()
