"""Post-training beside TRL: `python benchmarks/posttraining.py sft|dpo|grpo` (`pip install '.[bench]'`).

SmolLM2-135M-Instruct, its 4-bit weights made fp32; the same examples, precision, learning rate and AdamW on both sides,
all weights trained. What is learned are documented functions of the standard library (`posttraining_tasks.py`).

First the losses: in fp32 both sides take two steps on the same examples, and the benchmark stops where the first
losses differ by more than 1e-5 (of the loss, where that is above 1: torch's cross-entropy over 49,152 tokens, which is
danlu's, is itself about 1e-5 off in fp32; TRL's logsumexp is not), or the second by more
than 1e-4. Where policy and reference are one (dpo: ln 2; grpo: 0) the first loss says little, and it is the second that
tells, which follows from the first gradient. The gradient's norms are printed; danlu's is 0.02 to 0.2 % larger, because
transformers gives the embedding of the padding token, which is <|im_end|> of this model, no gradient as an input:

- sft: TRL's padded batches against danlu's packed rows. What TRL's packed rows give is told, and may differ: without
  FlashAttention it is TRL's affair whether examples in a row see each other.
- dpo: sigmoid, beta 0.1; the tokens of both sides are compared too.
- grpo: danlu draws the answers, which end where they end, and TRL is given them (`rollout_func`); each judges them by
  itself, and takes a second step with the same answers, clipped against the first policy.

Then the time. Every side lives in a process of its own, which is stopped while another is measured; they take steps in
turns (A B C A B C), of which the first is not counted. "danlu x" is how many times faster danlu's step is than the
row's, the median of the ratios within a round.

- sft: TRL with batches of 4 padded to the longest, as most run it, and packed (bfd) to 512; danlu packed to 512,
  compiled as every run of some length is. Tokens are those of the chats, without padding.
- dpo: TRL with log-probabilities of the reference computed before the first step, and at each step; danlu before.
  "with reference" adds to a step what the reference takes for its pairs, as in one pass over the data.
- grpo: answers of a fixed length on both sides (stop tokens are barred), by `transformers.generate` and by danlu's
  engine; a cheap Python function judges; one update a draw.

Shares are of the best matrix product of this machine, measured before and after, and count 6 FLOPs a weight and token
(and attention) for everybody; of grpo there is none, as drawing is bound by memory. TRL may live in another environment
(--trl-python). Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from inference_worker import PausedProcess, PeerFailed
from posttraining_tasks import Contestant, Task, make_task

from danlu import hardware
from danlu.hub.config import PullConfig
from danlu.hub.pull import pull
from danlu.models.convert import convert
from danlu.models.convert_config import ConvertConfig

TOLERANCES = (1e-5, 1e-4)
"""Of the losses of the first two steps in fp32, in nats, or of the loss where that is larger than 1."""

HERE = Path(__file__).parent

Steps = dict[str, list[dict[str, Any]]]
"""What each contestant said of its steps."""


def open_model(folder: Path) -> Path:
    """The model as a folder with fp32 weights, made once."""
    if not folder.exists():
        gguf = next(pull(PullConfig(source="smollm2")).glob("*.gguf"))
        convert(ConvertConfig(source=gguf, out=folder, to="hf"))
    return folder


def open_contestant(contestant: Contestant, trl_python: str, work: Path, **more: Any) -> PausedProcess:
    """Its process, before its first step.

    Args:
        more: settings that differ from the contestant's.
    """
    out = tempfile.mkdtemp(dir=work)
    settings = {**contestant.settings, **more, "out": str(Path(out) / "run")}
    file, python = ("worker", sys.executable) if contestant.is_danlu else ("trl", trl_python)
    return PausedProcess([python, str(HERE / f"posttraining_{file}.py"), json.dumps(settings)], settings["threads"])


def compare_losses(task: Task, trl_python: str, work: Path) -> dict[str, list[dict[str, float]]]:
    """Two steps of each in fp32, one after the other.

    Raises:
        SystemExit: the first losses are too far apart, or the sides do not read the same tokens.
    """
    more: dict[str, Any] = {"precision": "fp32", "timed": False}
    if task.method == "grpo":
        more |= {"fixed_length": False, "passes": 2}
    found: dict[str, list[dict[str, float]]] = {}
    for contestant in task.contestants:
        process = open_contestant(contestant, trl_python, work, **more)
        try:
            if process.opened.get("ids", task.ids) != task.ids:
                sys.exit(f"{contestant.name} reads other tokens than danlu's tokenizer makes")
            steps = [process.ask({}) for _ in range(2)]
        finally:
            process.close()
        if task.method == "grpo" and contestant.is_danlu:
            more["rollouts"] = str(work / "rollouts.json")
            Path(more["rollouts"]).write_text(json.dumps(steps[0]["rollouts"]))
        found[contestant.name] = [{name: step[name] for name in ("loss", "grad_norm")} for step in steps]
        print(
            f"{contestant.name:<24}"
            + "".join(f"{s['loss']:14.7f}{s['grad_norm']:12.6f}" for s in found[contestant.name])
        )
    ours = found[task.contestants[0].name]
    for name, steps in found.items():
        for number, (tolerance, step, mine) in enumerate(zip(TOLERANCES, steps, ours, strict=True), 1):
            apart = abs(step["loss"] - mine["loss"])
            if name != "trl (packed)" and not apart <= tolerance * max(1.0, abs(mine["loss"])):
                sys.exit(f"{name}: the loss of step {number} is {step['loss']:.7f}, danlu's {mine['loss']:.7f}")
    return found


def measure(task: Task, running: dict[str, PausedProcess], rounds: int, steps: int) -> Steps:
    """Steps in turns, after one of each that is not counted; those of a round follow each other."""
    for process in running.values():
        process.ask({})
    found: Steps = {name: [] for name in running}
    for _ in range(rounds):
        for name, process in running.items():
            told = [process.ask({}) for _ in range(steps)]
            figures = {key: statistics.fmean(step[key] for step in told) for key in ("seconds", "rollout_seconds")}
            found[name].append(figures)
    return found


def table(task: Task, found: Steps, opened: dict[str, dict[str, Any]], peak: float) -> dict[str, dict[str, float]]:
    """Print and return medians, ratios and shares."""
    ours = task.contestants[0].name
    flops = task.tokens * opened[ours]["flops_per_token"]
    rows: dict[str, dict[str, float]] = {}
    for name, steps in found.items():
        row = {"s/step": statistics.median(step["seconds"] for step in steps)}
        if name != ours:
            row["danlu x"] = statistics.median(
                step["seconds"] / mine["seconds"] for step, mine in zip(steps, found[ours], strict=True)
            )
        if task.method == "grpo":
            row["s drawing"] = statistics.median(step["rollout_seconds"] for step in steps)
        else:
            row["tokens/s"] = task.tokens / row["s/step"]
            row["share of peak"] = flops / row["s/step"] / peak
        if task.method == "dpo":
            row["s reference"] = opened[name]["reference_seconds"]
            row["with reference"] = row["s/step"] + row["s reference"]
            if name != ours:
                row["danlu x with"] = row["with reference"] / rows[ours]["with reference"]
        rows[name] = row
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    print(f"\n{'':24}" + "".join(f"{column:>16}" for column in columns))
    for name, row in rows.items():
        print(f"{name:<24}" + "".join(f"{row[key]:16.4g}" if key in row else " " * 16 for key in columns))
    return rows


def measure_peak(precision: str) -> float:
    """The matmul peak now, not the remembered one."""
    hardware.matmul_peak.cache_clear()
    return hardware.matmul_peak(hardware.DTYPES[precision], torch.device("cpu"))


def versions(python: str) -> dict[str, str]:
    """Of what TRL's side runs on.

    Raises:
        SystemExit: it has no trl.
    """
    code = "import json; from importlib.metadata import version as v; "
    code += "print(json.dumps({n: v(n) for n in ('trl', 'transformers', 'torch', 'accelerate')}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{python} has no trl: pip install '.[bench]', or name another environment with --trl-python")
    found: dict[str, str] = json.loads(done.stdout)
    return found


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=("sft", "dpo", "grpo"))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each; 0 compares losses only (default 5)")
    parser.add_argument("--steps", type=int, default=1, help="steps in a turn (default 1)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of what is timed (default bf16)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each (default 2)")
    parser.add_argument("--examples", type=int, help="sft, dpo: chats or pairs of a step (default 16, 8)")
    parser.add_argument("--prompts", type=int, default=2, help="grpo: prompts of a step (default 2)")
    parser.add_argument("--group", type=int, default=8, help="grpo: answers to each (default 8)")
    parser.add_argument("--new-tokens", type=int, default=64, help="grpo: tokens of an answer (default 64)")
    parser.add_argument("--trl-python", default=sys.executable, help="Python of an environment that has trl")
    parser.add_argument("--work", type=Path, help="folder that keeps the model between runs (default: a temporary one)")
    given = parser.parse_args()
    given.examples = given.examples or {"sft": 16, "dpo": 8, "grpo": 0}[given.method]
    return given


def main() -> None:
    """Compare, measure, print a table and one JSON line."""
    given = parse()
    found: dict[str, Any] = {
        "benchmark": "posttraining",
        "method": given.method,
        "versions": versions(given.trl_python),
    }
    torch.set_num_threads(given.threads)
    with ExitStack() as stack:
        given.work = given.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        given.work.mkdir(parents=True, exist_ok=True)
        model = open_model(given.work / "model")
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=given.work)))
        task = make_task(given, model, work)
        print(f"{given.method}: {task.tokens} tokens a step, {task.mean_tokens} an example")
        print(f"{'fp32':<24}" + "".join(f"{f'loss {step}':>14}{f'norm {step}':>12}" for step in (1, 2)))
        try:
            found["losses"] = compare_losses(task, given.trl_python, work)
            if given.rounds:
                peaks = [measure_peak(given.precision)]
                running = {}
                for contestant in task.contestants:
                    running[contestant.name] = open_contestant(contestant, given.trl_python, work)
                    stack.callback(running[contestant.name].close)
                steps = measure(task, running, given.rounds, given.steps)
                for process in running.values():
                    process.close()
                peaks.append(measure_peak(given.precision))
                opened = {name: process.opened for name, process in running.items()}
                found |= {
                    "precision": given.precision, "threads": given.threads, "rounds": given.rounds,
                    "cpu": platform.machine(), "tokens_per_step": task.tokens, "mean_tokens": task.mean_tokens,
                    "compiled": opened[task.contestants[0].name]["compiled"], "peak": max(peaks),
                    "steps": table(task, steps, opened, max(peaks)),
                }  # fmt: skip
        except PeerFailed as error:
            sys.exit(str(error))
    print(f"\n{json.dumps(found)}")


if __name__ == "__main__":
    main()
