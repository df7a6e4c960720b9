"""A model that learns to think: `python benchmarks/reasoning.py`, the recipe `reasoning` with several seeds.

A small model learns the form of worked additions from some examples (the warm start, the same for all seeds), then from
its own attempts (GRPO, rewarded for right results). Told are the shares of held-out sums that it gets right, greedily,
before and after, each seed by itself, with the mean gain and its 95 % interval over seeds (Student's t); drawn is the
curve (--figure). Finished seeds are not run again. One JSON line ends the output. Not a timing: other programs may run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

from danlu.formats.card import Card
from danlu.recipe.config import RunConfig
from danlu.recipe.run import run_recipe

SCORE = "heldout_reward_math-equal"
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""97.5th percentile of Student's t for so many seeds."""


def run(out: Path, seed: int, start_seed: int) -> list[tuple[int, float]]:
    """Train with a seed; (step, share of held-out sums that are right), the first before training."""
    run_recipe(RunConfig(Path("reasoning"), (f"out={out}", f"seed={seed}", f"start_seed={start_seed}")))
    folder = out / f"policy-{start_seed}-{seed}"
    metrics = Card.load(folder).metrics
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    points = [(int(row["step"]), float(row[SCORE])) for row in rows if SCORE in row]
    return [(0, float(metrics[f"{SCORE}_before"])), *points]


def draw(curves: list[list[tuple[int, float]]], path: Path) -> None:
    """All seeds, thin, and their mean."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    for curve in curves:
        axes.plot(*zip(*[(step, 100 * share) for step, share in curve], strict=True), color="#8fa3b8", linewidth=0.9)
    steps = [step for step, _ in curves[0]]
    means = [100 * statistics.fmean(curve[i][1] for curve in curves) for i in range(len(steps))]
    axes.plot(steps, means, color="#b3401f", linewidth=2.2)
    axes.annotate(f"{means[0]:.1f} %", (steps[0], means[0]), xytext=(4, 8), textcoords="offset points")
    axes.annotate(f"{means[-1]:.1f} %", (steps[-1], means[-1]), xytext=(-40, 10), textcoords="offset points")
    axes.set(xlabel="steps of GRPO", ylabel="held-out sums that are right, %", xlim=(0, steps[-1]))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
    plt.rcParams["svg.hashsalt"] = "danlu"  # the same file for the same numbers
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run the seeds and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, choices=T95)
    parser.add_argument("--start-seed", type=int, default=0, help="of the warm start (default 0)")
    parser.add_argument("--out", type=Path, default=Path("danlu-reasoning"), help="where the runs are kept")
    parser.add_argument("--figure", type=Path, help="SVG or PNG to draw the curve into")
    given = parser.parse_args()
    curves = [run(given.out, seed, given.start_seed) for seed in range(given.seeds)]
    gains = [100 * (curve[-1][1] - curve[0][1]) for curve in curves]
    for seed, (curve, gain) in enumerate(zip(curves, gains, strict=True)):
        print(f"seed {seed}: {100 * curve[0][1]:.1f} % before, {100 * curve[-1][1]:.1f} % after, {gain:+.1f} points")
    mean = statistics.fmean(gains)
    half = T95[given.seeds] * statistics.stdev(gains) / math.sqrt(given.seeds)
    print(f"mean gain {mean:+.1f} points (95 % {mean - half:+.1f} to {mean + half:+.1f})")
    if given.figure is not None:
        draw(curves, given.figure)
    print(
        json.dumps({"benchmark": "reasoning", "curves": curves, "gain": mean, "interval": [mean - half, mean + half]})
    )


if __name__ == "__main__":
    main()
