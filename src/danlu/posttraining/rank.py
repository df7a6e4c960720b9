"""`danlu rank`: a model's own answers, ranked by whatever judges them: what a reward model, and DPO, can learn from
where nobody has compared answers by hand (as in RLAIF: Lee et al. 2023, arXiv:2309.00267)."""

from __future__ import annotations

import json
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from danlu import console, files, hardware
from danlu.config import validate
from danlu.data.prompts import Prompt, read_prompts
from danlu.engine.config import SamplingParams
from danlu.errors import DanluError
from danlu.formats.card import Stage
from danlu.hub.pull import with_models
from danlu.models.causal_lm import CausalLM
from danlu.models.load import load_model
from danlu.posttraining.rank_config import RankConfig
from danlu.posttraining.rollouts import RolloutEngine, longest_prompt
from danlu.posttraining.verifiers import Sample, Verifiers, model_folders
from danlu.tokenizer.tokenizer import Tokenizer

PARTS = {"train": "train.jsonl", "heldout": "heldout.jsonl"}


def rank(config: RankConfig) -> Path:
    """Answer prompts, judge the answers, and write rows of ``prompt``, ``answers`` and ``scores``.

    Prompts whose answers are all worth the same compare nothing: they are left out and counted. A run that was stopped
    goes on where it was, and ends with the same rows.

    Returns:
        The folder, with train.jsonl and heldout.jsonl.

    Raises:
        Problems: impossible options, all at once.
        DanluError: model, prompts or verifiers cannot be used, or no two answers differ.
        KeyboardInterrupt: stopped by Ctrl-C; the run can be resumed by calling again.
    """
    config = with_models(validate(config), "model")
    inputs = {"model": config.model, "data": config.data}
    if config.heldout is not None:
        inputs["heldout"] = config.heldout
    for number, folder in enumerate(model_folders(config.reward), 1):
        inputs[f"reward {number}"] = folder
    stage = Stage.open(config.out, kind="data", verb="rank", config=config, inputs=inputs, overwrite=config.overwrite)
    if stage.finished:
        console.note(f"{config.out}: already made, nothing to do")
        return config.out
    with ExitStack() as opened:
        with stage.preparing():
            device = hardware.pick_device(config.device)
            model, tokenizer = load_model(config.model, CausalLM), Tokenizer.load(config.model)
            model.to(device).compute_dtype = hardware.DTYPES[hardware.pick_precision(config.precision, device)]
            max_prompt = longest_prompt(config, model.config.context)
            prompts = _prompts(config, tokenizer, max_prompt)
            verifiers = opened.enter_context(Verifiers.within(config, config.reward))
            engine = RolloutEngine(
                model, tokenizer, context=max_prompt + config.max_new_tokens, max_running=config.max_running
            )
            opened.callback(engine.close)
        ranker = Ranker(config, engine, verifiers)
        counts = {part: ranker.write(config.out / name, prompts[part]) for part, name in PARTS.items()}
    if not counts["train"]["rows"]:
        raise DanluError(
            f"{config.data}: no prompt has two answers that are worth different rewards ({ranker.why_not()}); raise n "
            "or the temperature, or judge by something finer, and replace the folder with --overwrite"
        )
    metrics = {f"{part}_{name}": value for part, found in counts.items() for name, value in found.items()}
    stage.finish(metrics, {"problems": [{"reason": r, "answers": n} for r, n in ranker.problems.most_common(20)]})
    console.note(
        f"{config.out}: {counts['train']['rows']:,} of {len(prompts['train']):,} prompts with answers to compare, "
        f"{counts['heldout']['rows']:,} of {len(prompts['heldout']):,} held out; reward "
        f"{counts['train']['reward_mean']:.3f}, of the best answers {counts['train']['reward_best']:.3f}"
    )
    return config.out


def _prompts(config: RankConfig, tokenizer: Tokenizer, max_prompt: int) -> dict[str, list[Prompt]]:
    train, held_out = read_prompts(
        config.data, tokenizer, longest=max_prompt, heldout=config.heldout, share=config.heldout_share,
        on_error=config.on_error,
    )  # fmt: skip
    for prompt in (*train, *held_out):
        if prompt.text is not None:
            raise DanluError(f"{prompt.where}: is a text to go on with; answers are ranked to prompts of chats")
    found = {}
    for part, prompts, limit in (("train", train, config.limit), ("heldout", held_out, config.heldout_limit)):
        order = random.Random(config.seed).sample(range(len(prompts)), min(len(prompts), limit or len(prompts)))
        found[part] = [prompts[i] for i in order]
    return found


class Ranker:
    """Writes ranked answers to a file, so many prompts at a time."""

    def __init__(self, config: RankConfig, engine: RolloutEngine, verifiers: Verifiers) -> None:
        self.config, self.engine, self.verifiers = config, engine, verifiers
        self.params = SamplingParams(
            n=config.n, temperature=config.temperature, max_new_tokens=config.max_new_tokens
        )  # fmt: skip
        self.problems: Counter[str] = Counter()
        self.alike = 0

    def write(self, path: Path, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Answer, judge, write; returns counts and mean rewards. Every prompt has a line while the run goes on, so that
        it can be seen how far it came."""
        begun = path.with_name(f".{path.name}.begun")
        rows = _read_lines(begun)
        each = max(1, 4 * self.config.max_running // self.config.n)
        with console.progress(f"answering ({path.stem})", len(prompts), "prompts") as advance:
            advance(len(rows))
            with begun.open("a", encoding="utf-8") as file:
                for start in range(len(rows), len(prompts), each):
                    new = self._rank(prompts[start : start + each], start)
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in new)
                    file.flush()
                    rows += new
                    advance(len(new))
        for row in rows:
            self.problems.update(row.pop("problems"))
        different = [row for row in rows if len(set(row["scores"])) > 1]
        self.alike += len(rows) - len(different)
        files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in different))
        begun.unlink()
        judged = [row["scores"] for row in rows if row["scores"]]
        return {
            "prompts": len(prompts),
            "rows": len(different),
            "reward_mean": statistics.fmean(map(statistics.fmean, judged)) if judged else None,
            "reward_best": statistics.fmean(map(max, judged)) if judged else None,
        }

    def _rank(self, prompts: Sequence[Prompt], start: int) -> list[dict[str, Any]]:
        """Rows of some prompts; equal answers stand there once. What answers are drawn follows from the number of the
        prompt, however the run is cut."""
        groups = self.engine.draw(prompts, self.params, seed=self.config.seed + start)
        samples = [Sample(one.prompt.messages, one.text, one.prompt.row) for group in groups for one in group]
        judgements = iter(self.verifiers.judge(samples))
        rows = []
        for prompt, group in zip(prompts, groups, strict=True):
            worth: dict[str, float] = {}
            problems = []
            for rollout in group:
                judgement = next(judgements)
                if judgement.score is None:
                    problems.append(judgement.problem or "not judged")
                elif rollout.text.strip():
                    worth[rollout.text] = judgement.score
                else:
                    problems.append("empty")
            rows.append(
                {
                    "prompt": prompt.messages,
                    "answers": list(worth),
                    "scores": list(worth.values()),
                    "where": prompt.where,
                    "problems": problems,
                }
            )
        return rows

    def why_not(self) -> str:
        """What became of the answers."""
        problem = self.problems.most_common(1)
        return f"{self.alike:,} prompts whose answers are all alike" + (
            f"; {problem[0][1]:,} answers could not be used: {problem[0][0]}" if problem else ""
        )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of an interrupted run; a last line that is not whole is cut off."""
    if not path.exists():
        return []
    whole, _, torn = path.read_text(encoding="utf-8").rpartition("\n")
    if torn:
        files.write_text(path, whole + "\n" if whole else "")
    return [json.loads(line) for line in whole.split("\n") if line]
