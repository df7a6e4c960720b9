"""What the report tells of a training run: curves from its log, figures from its card, for each way of learning."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from danlu.formats.card import Card
from danlu.report import numbers
from danlu.report.answers import AskedPrompt, read_answers
from danlu.report.figures import Curve, Panel, draw_curves, draw_reliability, last
from danlu.report.lineage import Artifact
from danlu.training.metrics import read_metrics

Facts = dict[str, str]
"""What is told -> its value, as it is shown; those that a card does not hold are left out."""

_RATE = Panel("Learning rate", {"lr": "peak {:.2g}"}, max, from_zero=True)
_SPEED = Panel("Throughput", {"tokens_per_second": "median {:,.0f} tokens/s"}, statistics.median, from_zero=True)

TEXT = (
    Panel("Held out", {"heldout_bits_per_byte": "last {:.4f} bits per byte"}),
    Panel("Training loss", {"loss": "last {:.3f} nats per token"}),
    _RATE,
    _SPEED,
)
LABELS = (Panel("Loss", {"heldout_loss": "held out {:.3f} nats", "loss": "training {:.3f}"}), _RATE, _SPEED)
POLICY = (
    Panel("KL to the reference", {"kl": "last {:.4f} nats per token"}, from_zero=True),
    Panel("Entropy", {"entropy": "last {:.3f} nats per token"}, from_zero=True),
    Panel("Length of answers", {"answer_tokens": "last {:,.0f} tokens"}, from_zero=True),
    Panel("Answers cut off", {"cut_off": "last {:.1%}"}, from_zero=True),
    Panel("Tokens whose step was clipped", {"clipped": "last {:.2%}"}, from_zero=True),
    Panel("Error of the critic", {"value_loss": "last {:.4f}"}, from_zero=True),
)
_LEADS = (
    Panel("Comparisons right", {"heldout_accuracy": "held out {:.1%}", "accuracy": "training {:.1%}"}),
    Panel("Lead of the better answer", {"heldout_margin": "held out {:.3f}", "margin": "training {:.3f}"}),
)
REWARD = (
    Panel("Loss", {"heldout_loss": "held out {:.3f} nats", "loss": "training {:.3f}"}),
    *_LEADS,
    Panel("Rewards in training", {"reward_chosen": "better answer {:.2f}", "reward_rejected": "worse {:.2f}"}),
)
PREFERENCES = (
    Panel("Loss", {"heldout_loss": "held out {:.3f}", "loss": "training {:.3f}"}),
    *_LEADS,
    Panel("Implicit rewards", {"reward_chosen": "chosen {:.3f}", "reward_rejected": "rejected {:.3f}"}),
    Panel("Implicit rewards", {"reward_good": "good {:.3f}", "reward_bad": "bad {:.3f}"}),
    Panel("KL to the reference", {"heldout_kl": "held out {:.4f} nats per token", "kl": "training {:.4f}"}),
)
DISTIL = (
    Panel("Held out", {"heldout_bits_per_byte": "last {:.4f} bits per byte"}),
    Panel("Held out", {"heldout_loss": "last {:.3f} nats"}),
    Panel("Loss against the teacher", {"loss": "last {:.3f} nats"}),
    _RATE,
    _SPEED,
)


@dataclass
class Training:
    """A training run's card, with its curves.

    Attributes:
        how: the way of learning, as readers name it: GRPO, reward model, fine-tuning.
        results, run: what came of it, and how it was done.
        scores: who -> score -> value on the held-out rows, where there is somebody to compare with.
        answers: held-out prompts with their answers as a policy changed.
    """

    name: str
    card: Card
    how: str
    curves: list[Curve] = field(default_factory=list)
    results: Facts = field(default_factory=dict)
    run: Facts = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    answers: list[AskedPrompt] = field(default_factory=list)

    @classmethod
    def of(cls, artifact: Artifact, samples: int) -> Training:
        """Curves and answers are drawn if the folder is still there.

        Args:
            samples: most prompts whose answers are shown.
        """
        card = artifact.card
        assert card is not None
        rows = read_metrics(artifact.folder / "metrics.jsonl") if artifact.folder else []
        rows = [row for row in rows if isinstance(row, dict)]
        found = cls(artifact.name, card, way_of_learning(card), results=results(card, rows), run=run_facts(card))
        found.results |= adapter_facts(card.details.get("adapter"))
        found.scores = compared(card)
        if is_policy(card):
            before = {key.removesuffix("_before"): v for key, v in card.metrics.items() if key.endswith("_before")}
            rows = [{"step": 0, **before}, *rows]
            found.answers = read_answers(artifact.folder, card, samples)
        found.curves = draw_curves(rows, panels(card, rows))
        if isinstance(table := card.details.get("reliability"), list):
            error = numbers.decimal(card.metrics.get("heldout_calibration_error"))
            curve = draw_reliability([row for row in table if isinstance(row, dict)], f"off by {error} on average")
            found.curves += [curve] if curve is not None else []
        return found


def is_policy(card: Card) -> bool:
    """A model that learned from its own answers."""
    return card.verb == "align" and card.config.get("method") in ("grpo", "ppo")


def way_of_learning(card: Card) -> str:
    """What was done, as readers name it."""
    if card.verb == "align":
        method, variant, loss = (str(card.config.get(name) or "") for name in ("method", "variant", "loss"))
        if method == "dpo":
            return "DPO" if loss in ("", "sigmoid") else f"DPO ({loss})"
        return method.upper() if variant in ("", "grpo") or method != "grpo" else f"GRPO ({variant})"
    names = {"pretrain": "pre-training", "finetune": "fine-tuning", "reward": "reward model", "distil": "distillation"}
    return names.get(card.verb, card.verb)


def panels(card: Card, rows: Sequence[Mapping[str, Any]]) -> Sequence[Panel]:
    """What is drawn of a run."""
    if is_policy(card):
        return *_reward_panels(rows), *POLICY
    if card.verb == "align":
        return PREFERENCES
    if card.verb == "finetune" and card.config.get("task", "causal") != "causal":
        return LABELS
    return {"reward": REWARD, "distil": DISTIL}.get(card.verb, TEXT)


def _reward_panels(rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """The reward, each of its parts, and what is not rewarded."""
    notes = ("held out {:.3f}", "training {:.3f}")
    found = [Panel("Reward", dict(zip(("heldout_reward", "reward"), notes, strict=True)))]
    for part in _parts({key for row in rows for key in row}):
        keys = (f"heldout_reward_{part}", f"reward_{part}")
        found.append(Panel(f"Reward: {numbers.verifier(part)}", dict(zip(keys, notes, strict=True))))
    return [*found, Panel("Not rewarded, only watched", {"heldout_other": "held out {:.3f}"})]


def _parts(keys: set[str]) -> list[str]:
    """The verifiers that a reward is made of, where there are several."""
    found = {key.removeprefix("heldout_").removeprefix("reward_") for key in keys if "reward_" in key}
    return sorted(part for part in found - {"std"} if not part.endswith("_before"))


# ---- figures


def results(card: Card, rows: Sequence[Mapping[str, Any]]) -> Facts:
    """What came of a run."""
    metrics = card.metrics
    if is_policy(card):
        return _told(_policy_results(card, rows))
    if card.verb in ("align", "reward"):
        return _told(
            {
                "held-out comparisons that come out right": _with_interval(metrics, "heldout_accuracy"),
                "lead of the better answer, held out": numbers.decimal(metrics.get("heldout_margin")),
                "spread of the rewards, held out": numbers.decimal(metrics.get("heldout_reward_std")),
                "KL to the reference, held out": _unit(numbers.decimal(metrics.get("heldout_kl"), 4), "nats/token"),
                "calibration error": numbers.decimal(metrics.get("heldout_calibration_error")),
                "rows": numbers.count(metrics.get("rows")),
                "held-out rows": numbers.count(metrics.get("heldout_rows")),
            }
        )
    found = {
        "training loss at the end": _unit(numbers.decimal(metrics.get("train_loss")), "nats"),
        "held out, at the end": _unit(numbers.decimal(metrics.get("heldout_bits_per_byte"), 4), "bits/byte"),
        "parameters of the teacher": numbers.count(metrics.get("teacher_parameters")),
        "smaller by": numbers.percent(metrics.get("smaller_by"), 1),
        "keeps of the teacher's lead over chance": numbers.percent(metrics.get("share_of_teacher"), 1),
        "reads faster by a factor of": numbers.decimal(metrics.get("faster_by"), 2),
        "answers by the teacher": numbers.count(metrics.get("answers")),
        "time of the teacher": numbers.duration(metrics.get("teacher_seconds")),
    }
    return _told(found)


def _policy_results(card: Card, rows: Sequence[Mapping[str, Any]]) -> Facts:
    metrics, config = card.metrics, card.config
    found = {
        name: ", ".join(numbers.verifier(spec) for spec in config.get(option) or ())
        for name, option in (("rewarded", "reward"), ("only watched", "heldout_reward"))
    }
    kept = [key for key in metrics if key.startswith("heldout_reward") and not key.endswith("_before")]
    for key in [*kept, "heldout_other"]:
        part = numbers.verifier(key.removeprefix("heldout_reward").removeprefix("_"))
        name = "of what is only watched" if key == "heldout_other" else part
        before, after = numbers.decimal(metrics.get(f"{key}_before")), numbers.decimal(metrics.get(key))
        change = after if before == numbers.MISSING or after == numbers.MISSING else f"{before} → {after}"
        found[f"held-out reward{', ' * bool(name)}{name}"] = change
    found["held-out prompts"] = numbers.count(metrics.get("heldout_prompts"))
    found["prompts to learn from"] = numbers.count(metrics.get("prompts"))
    for key, name, digits in (("kl", "KL to the reference", 4), ("entropy", "entropy", 3)):
        values = [row[key] for row in rows if numbers.decimal(row.get(key)) != numbers.MISSING]
        found[name] = _unit(numbers.decimal(last(values), digits), "nats/token") if values else ""
    apart = [row["rollout_mismatch"] for row in rows if isinstance(row.get("rollout_mismatch"), float)]
    found["engine and trainer, at most apart"] = f"{max(apart):.1e} nats" if apart else ""
    found["ended early"] = str(card.details.get("stopped_early") or "")
    return found


def run_facts(card: Card) -> Facts:
    """How a run was done."""
    metrics, details = card.metrics, card.details
    threads = details.get("threads")
    device = str(details.get("device", ""))
    return _told(
        {
            "steps": numbers.count(metrics.get("steps")),
            "tokens": numbers.count(metrics.get("tokens")),
            "throughput": _unit(numbers.count(metrics.get("tokens_per_second")), "tokens/s"),
            "arithmetic": numbers.flops(metrics.get("flops_per_second")),
            "machine's matmul peak": numbers.flops(metrics.get("matmul_peak_flops")),
            "share of that peak": numbers.percent(metrics.get("share_of_peak"), 1),
            "time in training": numbers.duration(metrics.get("train_seconds")),
            "time compiling": numbers.duration(metrics.get("compile_seconds")),
            "peak memory": numbers.size(metrics.get("peak_memory_bytes")),
            "precision": str(details.get("precision", "")),
            "torch.compile": {True: "yes", False: "no"}.get(details.get("compiled"), ""),  # type: ignore[arg-type]
            "device": f"{device}, {threads} thread{'s' if threads != 1 else ''}" if threads else device,
        }
    )


def adapter_facts(adapter: object) -> Facts:
    """Of an adapter, as its card describes it."""
    if not isinstance(adapter, dict):
        return {}
    kind = {"lora": "LoRA", "dora": "DoRA"}.get(str(adapter.get("kind")), str(adapter.get("kind", "")))
    quantized = str(adapter.get("quantize", "none"))
    tokens = adapter.get("token_ids")
    found = {
        "adapter": kind + (" with rank-stabilised scale" if adapter.get("rslora") else ""),
        "rank": numbers.count(adapter.get("rank")),
        "alpha": numbers.decimal(adapter.get("alpha"), 1).removesuffix(".0"),
        "targets": _listed(adapter.get("targets")),
        "base is kept in": "" if quantized == "none" else quantized.upper(),
        "tokens with rows of their own": numbers.count(len(tokens)) if tokens and isinstance(tokens, list) else "",
        "trained share of the weights": numbers.percent(adapter.get("trained_share"), 2),
    }
    return _told(found)


_BASELINES = {"majority": "commonest label", "tfidf": "TF-IDF, linear"}


def compared(card: Card) -> dict[str, dict[str, float]]:
    """Scores on the held-out rows, of the model and of those it is compared with."""
    metrics = card.metrics
    others = {"teacher": metrics.get("teacher"), "without a teacher": metrics.get("control")}
    if isinstance(baselines := metrics.get("baselines"), dict):
        others |= {_BASELINES.get(str(name), str(name)): scores for name, scores in baselines.items()}
    if "teacher_bits_per_byte" in metrics:
        others["teacher"] = {"bits_per_byte": metrics["teacher_bits_per_byte"]}
        if isinstance(alone := metrics.get("control"), dict):
            others["without a teacher"] = {"bits_per_byte": alone.get("heldout_bits_per_byte")}
    scores = {who: s for who, given in others.items() if isinstance(given, dict) and (s := _numbers(given))}
    names = {name for own in scores.values() for name in own}
    mine = {name: metrics.get(f"heldout_{name}") for name in sorted(names)}
    return {"this model": _numbers(mine), **scores} if scores else {}


def _numbers(given: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in given.items() if numbers.decimal(value) != numbers.MISSING}


def _with_interval(metrics: Mapping[str, Any], name: str) -> str:
    """A share, with its 95 % interval where the card has one."""
    share, interval = numbers.percent(metrics.get(name), 1), metrics.get(f"{name}_interval")
    if not isinstance(interval, list) or len(interval) != 2:
        return share
    return f"{share} ({numbers.percent(interval[0])} to {numbers.percent(interval[1])})"


def _unit(number: str, unit: str) -> str:
    return number if number == numbers.MISSING else f"{number} {unit}"


def _listed(values: object) -> str:
    return ", ".join(map(str, values)) if isinstance(values, (list, tuple)) else str(values or "")


def _told(facts: Facts) -> Facts:
    return {name: value for name, value in facts.items() if value not in ("", numbers.MISSING)}
