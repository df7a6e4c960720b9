"""`danlu reward`: a reward model, one number for how good an answer is, learned from comparisons."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danlu.config import validate
from danlu.evaluation.calibration import calibration_error, reliability_table
from danlu.evaluation.intervals import share_interval
from danlu.hub.pull import with_models
from danlu.models.heads import RewardModel
from danlu.objectives.reward import bradley_terry_losses, centring_losses, ranking_losses
from danlu.posttraining.config import RewardConfig
from danlu.posttraining.judged import Figures, JudgedTask, Tally, learning_rates, open_model, train_on_judged
from danlu.posttraining.preferences import GroupBatch, Judged, read_groups
from danlu.posttraining.scoring import check_decoder, scored, scores_of
from danlu.tokenizer.tokenizer import Tokenizer

RATE, HEAD = 2e-5, 10.0
"""Of all weights, at a width of 768; and how much faster the fresh head learns."""

ADAPTER_RATE = 5e-4


def reward(config: RewardConfig) -> Path:
    """Train a reward model on comparisons of answers, and write its folder.

    A scalar head on the model, read at the token that ends an answer; Bradley-Terry or Plackett-Luce. The card tells
    how often held-out answers are ranked rightly, and whether the odds that the rewards stand for are right.

    Returns:
        The folder of the reward model, or, where an adapter was trained, one in PEFT's layout, head included.

    Raises:
        Problems: impossible options, all at once.
        DanluError: a row that cannot be used (with file and line), no row that fits, a model that cannot be a reward
            model, or an output folder that cannot be used.
        KeyboardInterrupt: stopped by Ctrl-C; the run can be resumed by calling again.
    """
    config = with_models(validate(config), "model")
    return train_on_judged(config, "reward", {}, partial(_prepare, config))


def _prepare(config: RewardConfig, tokenizer: Tokenizer) -> JudgedTask:
    model, tokenizer, details = open_model(config, RewardModel, tokenizer, new_head=True)
    check_decoder(model, config.model)
    judged = read_groups(config, tokenizer, "rankings", with_margins=config.margins)
    judged = Judged(*([scored(group) for group in groups] for groups in (judged.train, judged.held_out)))
    return JudgedTask(
        model, tokenizer, judged, partial(_judge, config, model),
        learning_rates(config, model, RATE, head=HEAD, adapter=ADAPTER_RATE), report=_report, details=details,
    )  # fmt: skip


def _judge(config: RewardConfig, model: RewardModel, batch: GroupBatch, is_held_out: bool) -> tuple[Tensor, Figures]:
    """Losses of groups, (groups,), and what is told of them (a `judged.Judge`)."""
    scores_bk, mask_bk, ranks_bk = _laid_out(batch, scores_of(model, batch.packed))
    better_bij = (ranks_bk[:, :, None] < ranks_bk[:, None, :]) & mask_bk[:, :, None] & mask_bk[:, None, :]
    pairs_of_b, n_pairs_b = better_bij.nonzero()[:, 0], better_bij.sum((1, 2))
    chosen_p = scores_bk[:, :, None].expand(better_bij.shape)[better_bij]
    rejected_p = scores_bk[:, None, :].expand(better_bij.shape)[better_bij]

    def mean_of_pairs(values_p: Tensor) -> Tensor:
        return torch.zeros(len(batch.groups), device=values_p.device).index_add(0, pairs_of_b, values_p) / n_pairs_b

    if config.rankings == "plackett-luce":
        losses = ranking_losses(scores_bk, mask_bk, ranks_bk)
    else:
        margins_p = None
        if config.margins:
            margins_p = torch.tensor([group.margin for group in batch.groups], device=chosen_p.device)[pairs_of_b]
        losses = mean_of_pairs(bradley_terry_losses(chosen_p, rejected_p, margins_p))
    if config.centring:
        losses = losses + config.centring * mean_of_pairs(centring_losses(chosen_p, rejected_p))
    leads_p = (chosen_p - rejected_p).detach()
    return losses, {
        "accuracy": mean_of_pairs((leads_p > 0).float() + 0.5 * (leads_p == 0)),
        "margin": leads_p,
        "reward_chosen": chosen_p,
        "reward_rejected": rejected_p,
        "reward": scores_bk[mask_bk],
    }


def _laid_out(batch: GroupBatch, scores_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, which of them are there, and their ranks, (groups, most answers) each."""
    counts = torch.tensor([len(group.examples) for group in batch.groups], device=scores_n.device)
    mask_bk = torch.arange(int(counts.max()), device=scores_n.device) < counts[:, None]
    ranks_n = torch.tensor([rank for group in batch.groups for rank in group.ranks], device=scores_n.device)
    scores_bk = scores_n.new_zeros(mask_bk.shape).masked_scatter(mask_bk, scores_n)
    return scores_bk, mask_bk, ranks_n.new_zeros(mask_bk.shape).masked_scatter(mask_bk, ranks_n)


def _report(tally: Tally) -> tuple[dict[str, Any], dict[str, Any]]:
    """How often the better answer gets more, the spread of the rewards, and whether ``sigmoid`` of a difference is the
    probability that the answer with more is the better one."""
    accuracies, leads, rewards = (tally.values(name) for name in ("accuracy", "margin", "reward"))
    table = reliability_table(leads.abs().sigmoid().tolist(), (leads > 0).tolist(), low=0.5)
    metrics = {
        "heldout_accuracy_interval": share_interval(accuracies.mean().item(), len(accuracies)),
        "heldout_reward_std": rewards.std(correction=0).item(),
        "heldout_calibration_error": calibration_error(table),
        "heldout_pairs": len(leads),
    }
    return metrics, {"reliability": table}
