"""What the model to stay near says of given answers: computed once and kept on disk, or asked anew each time.

Its dropout is off, and so is that of whoever is compared with it here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from danlu import console, files
from danlu.models.causal_lm import CausalLM
from danlu.posttraining.preferences import Group, GroupBatch, batch_of
from danlu.training.logprobs import target_logprobs


class Reference(Protocol):
    """Log-probabilities of the targets of a batch, (examples, width) fp32, 0 behind the end of an example."""

    def __call__(self, batch: GroupBatch) -> Tensor: ...


@dataclass(frozen=True)
class StoredReference:
    """What was computed before, of all groups of a list.

    Attributes:
        logps_n: (targets of all examples,) fp32, in the order of the list.
        ends_e: (examples,) where those of each example end.
        firsts_g: (groups,) the number of each group's first example.
    """

    logps_n: Tensor
    ends_e: Tensor
    firsts_g: list[int]

    def __call__(self, batch: GroupBatch) -> Tensor:
        """See :class:`Reference`."""
        found: list[Tensor] = []
        for number, group in zip(batch.numbers, batch.groups, strict=True):
            for e in range(self.firsts_g[number], self.firsts_g[number] + len(group.examples)):
                start = 0 if e == 0 else int(self.ends_e[e - 1])
                found.append(self.logps_n[start : int(self.ends_e[e])])
        return pad_sequence(found, batch_first=True).to(batch.device)

    @classmethod
    def of(cls, groups: Sequence[Group], logps_n: Tensor) -> StoredReference:
        """Numbers in the order of these groups."""
        lengths = [sum(mask[1:]) for group in groups for _, mask in group.examples]
        counts = [len(group.examples) for group in groups]
        return cls(logps_n, torch.tensor(lengths).cumsum(0), (np.cumsum(counts) - counts).tolist())


@torch.no_grad()
def compute_logps(
    model: CausalLM, groups: Sequence[Group], *, micro_tokens: int, device: torch.device, pad_id: int
) -> Tensor:
    """Log-probabilities of the targets of all examples, one after the other, (n,) fp32 on the CPU."""
    found: list[Tensor] = []
    was_training = model.training
    model.eval()
    batch = batch_of(groups, pad_id).to(device)
    with console.progress("reference", total=len(groups), unit="rows") as advance:
        for micro in batch.split(max(1, micro_tokens // batch.room)):
            logps_bt, _ = target_logprobs(model, micro.packed)
            found.append(logps_bt[micro.packed.mask_bt].cpu())
            advance(len(micro.groups))
    model.train(was_training)
    return torch.cat(found)


def stored_logps(path: Path, lists: dict[str, Sequence[Group]]) -> dict[str, Tensor] | None:
    """What :func:`store_logps` wrote for these very groups; None where there is nothing of them."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as stored:
            if (stored.metadata() or {}).get("examples") != _digest(lists):
                return None
            return {name: stored.get_tensor(name) for name in lists}
    except (OSError, SafetensorError) as error:
        console.warn(f"{path}: is damaged ({error}); computing it again")
        return None


def store_logps(path: Path, lists: dict[str, Sequence[Group]], logps: dict[str, Tensor]) -> None:
    """Keep log-probabilities, with a mark of the groups that they are of."""
    with files.atomic_path(path) as temporary:
        save_file(logps, temporary, metadata={"examples": _digest(lists)})


def _digest(lists: dict[str, Sequence[Group]]) -> str:
    digest = hashlib.sha256()
    for name, groups in sorted(lists.items()):
        digest.update(f"{name} {len(groups)}\n".encode())
        for group in groups:
            for ids, mask in group.examples:
                digest.update(np.array([len(ids), *ids, *mask], dtype=np.int64).tobytes())
    return digest.hexdigest()
