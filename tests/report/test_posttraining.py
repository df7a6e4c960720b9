"""What the report tells of models that learned from rewards, preferences and teachers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from danlu.evaluation.intervals import mean_interval, share_interval
from danlu.formats.card import Card
from danlu.report import numbers
from danlu.report.answers import read_answers
from danlu.report.build import build_report
from danlu.report.config import ReportConfig, ShowConfig
from danlu.report.lineage import find_evaluations, read_lineage
from danlu.report.scores import score_rows
from danlu.report.show import show
from danlu.report.trainings import compared, way_of_learning
from report_cards import COMPLETIONS, FUNCTIONS, write_card
from report_page import Page, assert_self_contained

ANSWERS = ["bad one", "bad one", "half a one", "a third one", "good <b>one</b>"]
REWARDS = [0.0, 0.0, 0.3, 0.4, 1.1]


def write_policy(life: Path, method: str) -> Path:
    """A model that learned from the reward model and a verifier, measured at steps 0, 5, 10, 15 and 20."""
    reward = life / "reward"
    parts = ("python-parses", f"model={reward}")
    known: dict[str, Any] = {
        "steps": 20, "tokens": 9000, "parameters": 4_200_000, "train_seconds": 40.0, "prompts": 90,
        "heldout_prompts": 8, "heldout_reward": 0.581, "heldout_reward_before": 0.123,
        "heldout_reward_python-parses": 0.9, "heldout_reward_python-parses_before": 0.25,
        "heldout_other": 0.7, "heldout_other_before": 0.72,
    }  # fmt: skip
    folder = write_card(
        life / method, "model", "align",
        {"method": method, "model": str(life / "chat"), "data": str(life / "instructions"), "out": method,
         "reward": [parts[0], f"0.1*{parts[1]}"], "heldout_reward": ["python-tests"]},
        {"model": life / "chat", "data": life / "instructions", "reward": reward},
        metrics=known, details={"samples": [{"prompt": "p", "answer": "the last", "reward": 1.0, "parts": {}}]},
    )  # fmt: skip
    with (folder / "metrics.jsonl").open("w") as log:
        for step in range(1, 21):
            row = {"step": step, "reward": step / 20, "reward_std": 0.1, "reward_python-parses": 0.5, "kl": step / 900,
                   f"reward_{parts[1]}": -2.0, "entropy": 2 - step / 40, "answer_tokens": 30, "cut_off": 0.1,
                   "clipped": 0.02, "loss": 0.01, "rollout_mismatch": 1e-6 * step}  # fmt: skip
            if step % 5 == 0:
                row |= {"heldout_reward": 0.123 + step / 40, "heldout_other": 0.7}
            log.write(json.dumps(row) + "\n")
    with (folder / "samples.jsonl").open("w") as log:
        for step, answer, reward in zip(range(0, 25, 5), ANSWERS, REWARDS, strict=True):
            for prompt in ("write f", "write g"):
                scores = {parts[0]: 1.0, parts[1]: -3.25}
                line = {"step": step, "prompt": prompt, "answer": answer, "reward": reward, "parts": scores}
                log.write(json.dumps({**line, "problem": None}) + "\n")
    return folder


@pytest.fixture
def taught(life: Path) -> Path:
    """The life, with a reward model, two policies that learned from it, and a student of one of them."""
    reliability = [{"from": 0.5, "to": 0.6, "count": 9, "probability": 0.55, "share": 0.6},
                   {"from": 0.9, "to": 1.0, "count": 20, "probability": 0.93, "share": 0.97}]  # fmt: skip
    write_card(
        life / "reward", "model", "reward", {"model": str(life / "chat"), "data": "pairs.jsonl", "out": "reward"},
        {"model": life / "chat"}, details={"reliability": reliability},
        metrics={"steps": 9, "heldout_accuracy": 0.8, "heldout_accuracy_interval": [0.62, 0.91],
                 "heldout_calibration_error": 0.042, "heldout_margin": 0.7, "rows": 100, "heldout_rows": 29},
    )  # fmt: skip
    for method in ("grpo", "ppo"):
        write_policy(life, method)
    write_card(
        life / "distilled", "model", "distil", {"teacher": str(life / "grpo"), "out": "distilled"},
        {"teacher": life / "grpo", "data": life / "instructions"},
        metrics={"steps": 9, "parameters": 1_600_000, "teacher_parameters": 4_200_000, "smaller_by": 0.619,
                 "heldout_bits_per_byte": 1.31, "teacher_bits_per_byte": 1.2, "control":
                 {"steps": 9, "heldout_bits_per_byte": 1.4}, "faster_by": 1.9},
    )  # fmt: skip
    for name in ("grpo", "ppo", "distilled"):
        samples = [{**f, "completion": text, "parses": True, "compiles": name == "grpo"}
                   for f, text in zip(FUNCTIONS, COMPLETIONS["chat"], strict=True)]  # fmt: skip
        write_card(
            life / f"eval-{name}", "evaluation", "evaluate", {"model": name, "data": "data"},
            {"model": life / name, "data": life / "data"}, details={"samples": samples},
            metrics={"bits_per_byte": 1.21, "functions": 100, "parse_rate": 0.9, "compile_rate": 0.9},
        )  # fmt: skip
    return life


def test_stages_stand_in_the_order_they_were_made_with_those_beside(taught: Path) -> None:
    student, ppo = taught / "distilled", taught / "ppo"
    alone = find_evaluations([student], read_lineage(student))
    assert [e.label for e in alone] == ["untrained", "pre-trained", "fine-tuned", "GRPO", "distilled"]
    both = find_evaluations([student, ppo], read_lineage(student, ppo))
    assert [e.label for e in both] == ["untrained", "pre-trained", "fine-tuned", "PPO", "GRPO", "distilled"]
    given = find_evaluations([student], read_lineage(student), [*sorted(taught.glob("eval-*"))])
    assert [e.label for e in given][:3] == ["untrained", "pre-trained", "fine-tuned"]
    assert sorted(e.label for e in given[3:5]) == ["GRPO", "PPO"]
    assert read_lineage(student, ppo)[-1].name == "distilled"


def test_the_whole_story_is_on_the_page(taught: Path) -> None:
    page = Page(build_report(ReportConfig(model=taught / "distilled", beside=(taught / "ppo",))).read_text())
    assert_self_contained(page)
    text = " ".join(page.text.split())
    for shown in (
        "0.123 → 0.581", "0.250 → 0.900", "0.720 → 0.700", "python-parses, 0.1*model=reward", "python-tests",
        "80.0 % (62 % to 91 %)", "off by 0.042 on average", "61.9 %", "1.4000", "2.0e-05 nats",
        "Reward: model=reward", "KL to the reference", "Entropy", "Answers cut off", "Not rewarded, only watched",
        "before, and to step 5", "good <b>one</b>", "reward 1.100 · python-parses 1.00, model=reward -3.25",
        "1 more answer, between", "align, GRPO", "90.0 % (83 to 94)", "points over fine-tuned", "danlu align",
    ):  # fmt: skip
        assert shown in text, shown
    assert str(taught / "reward") not in " ".join(page.text.split("Configuration and versions")[0].split())
    boxes = [str(a["class"]) for tag, a in page.elements if tag == "g" and str(a.get("class")).startswith("node")]
    assert len(boxes) == len(read_lineage(taught / "distilled", taught / "ppo"))


def test_answers_of_a_run_that_is_gone_are_those_of_its_card(taught: Path) -> None:
    card = Card.load(taught / "grpo")
    whole = read_answers(taught / "grpo", card, 9)
    assert [asked.prompt for asked in whole] == ["write f", "write g"]
    assert [answer.when for answer in whole[0].shown] == ["before, and to step 5", "step 15", "step 20"]
    assert [answer.better for answer in whole[0].shown] == [False, True, True]
    assert [answer.when for answer in whole[0].others] == ["step 10"]
    assert len(read_answers(taught / "grpo", card, 1)) == 1
    (left,) = read_answers(None, card, 9)
    assert [(answer.when, answer.text) for answer in left.shown] == [("step 20", "the last")]
    card.details["samples"] = "rubbish"
    assert read_answers(None, card, 9) == []


def test_intervals_are_those_of_shares_and_of_paired_differences(taught: Path) -> None:
    evaluations = find_evaluations([taught / "grpo"], read_lineage(taught / "grpo"))
    rows = {row.evaluation.label: row for row in score_rows(evaluations)}
    low, high = share_interval(0.83, 100)
    assert rows["fine-tuned"].parsed == f"83.0 % ({100 * low:.0f} to {100 * high:.0f})"
    assert rows["untrained"].change == numbers.MISSING
    assert rows["fine-tuned"].change == "+100.0 points over pre-trained (+100 to +100)"
    assert rows["GRPO"].change == "+0.0 points over fine-tuned (+0 to +0)"
    changes = [1.0] * 30 + [0.0] * 60 + [-1.0] * 10
    error = 1.959964 * math.sqrt((0.4 - 0.2**2) * 100 / 99 / 100)
    assert mean_interval(changes) == pytest.approx([0.2 - error, 0.2 + error])


def test_who_a_student_is_compared_with(taught: Path) -> None:
    card = Card.load(taught / "distilled")
    assert {who: s["bits_per_byte"] for who, s in compared(card).items()} == {
        "this model": 1.31, "teacher": 1.2, "without a teacher": 1.4,
    }  # fmt: skip
    card.metrics = {
        "heldout_accuracy": 0.9,
        "teacher": {"accuracy": 0.95},
        "baselines": {"majority": {"accuracy": 0.5}},
    }
    assert list(compared(card).items()) == [
        ("this model", {"accuracy": 0.9}), ("teacher", {"accuracy": 0.95}), ("commonest label", {"accuracy": 0.5}),
    ]  # fmt: skip
    assert compared(Card("model", "pretrain", "f", {})) == {}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"method": "dpo", "loss": "sigmoid"}, "DPO"), ({"method": "dpo", "loss": "kto"}, "DPO (kto)"),
        ({"method": "grpo", "variant": "grpo"}, "GRPO"), ({"method": "grpo", "variant": "dapo"}, "GRPO (dapo)"),
        ({"method": "ppo", "variant": "grpo"}, "PPO"),
    ],
)  # fmt: skip
def test_names_of_methods(config: dict[str, Any], told: str) -> None:
    assert way_of_learning(Card("model", "align", "f", config)) == told


def write_adapter(life: Path) -> Path:
    shape = {"kind": "lora", "rank": 8, "alpha": 16.0, "rslora": True, "targets": ["q_proj", "v_proj"],
             "quantize": "nf4", "trained_share": 0.00125}  # fmt: skip
    folder = write_card(
        life / "adapter", "adapter", "align", {"method": "dpo", "model": str(life / "chat"), "adapter": "lora"},
        {"model": life / "chat"}, details={"adapter": shape},
        metrics={"steps": 5, "parameters": 4_200_000, "trained_parameters": 5250, "heldout_accuracy": 0.75},
    )  # fmt: skip
    peft = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": "chat"}
    (folder / "adapter_config.json").write_text(json.dumps(peft))
    return folder


def test_adapters_are_told(life: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_adapter(life)
    text = " ".join(Page(build_report(ReportConfig(model=folder)).read_text()).text.split())
    for shown in ("An adapter of 5,250 trained parameters", "LoRA with rank-stabilised scale", "q_proj, v_proj", "NF4",
                  "0.12 %", "75.0 %", "align, DPO"):  # fmt: skip
        assert shown in text, shown
    found = show(ShowConfig(folder))
    assert (found["kind"], found["adapter"]["trained_share"]) == ("adapter", 0.00125)
    told = capsys.readouterr().out
    assert "q_proj, v_proj" in told
    (folder / "danlu.json").unlink()  # as PEFT writes it
    assert show(ShowConfig(folder))["kind"] == "adapter"
    assert show(ShowConfig(folder))["adapter"] == peft_of(folder)


def peft_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return content


def test_cards_with_rubbish_in_them_are_told_as_far_as_they_go(taught: Path) -> None:
    for name in ("grpo", "reward", "distilled"):
        card = Card.load(taught / name)
        rubbish: Any = "<script>alert(1)</script>"
        card.details |= {"adapter": rubbish, "samples": [rubbish, {"prompt": 1}], "reliability": [rubbish, {}]}
        card.metrics |= {"heldout_reward": rubbish, "control": rubbish, "teacher": [rubbish], "baselines": rubbish}
        card.metrics |= {"heldout_accuracy_interval": rubbish, "heldout_accuracy": rubbish}
        card.save(taught / name)
        (taught / name / "samples.jsonl").write_text('{"step": "x"}\n[]\n{"step": 1, "answer": null}\n')
        (taught / name / "metrics.jsonl").write_text('{"step": 1, "kl": "x"}\n7\n{"reward_<b>": 1, "step": 2}\n')
        assert_self_contained(Page(build_report(ReportConfig(model=taught / name)).read_text()))
