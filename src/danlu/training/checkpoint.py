"""Checkpoints that are whole or not there, and that hold everything a run needs to go on bit for bit.

A checkpoint is a folder `checkpoints/step-00000100` with `state.safetensors` (weights, optimizer state, torch RNG) and
`state.json` (position in the data, counters, Python and NumPy RNG, and the hash of the tensors). It is written under
another name, fsynced and renamed; a reader checks the hash and falls back to the one before.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from danlu import console, files
from danlu.errors import DanluError

FOLDER = "checkpoints"


def save_checkpoint(out: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Write one checkpoint and delete all but the newest ``keep``.

    Raises:
        DanluError: the disk is full or read-only; earlier checkpoints are intact.
    """
    folder = out / FOLDER
    target = folder / f"step-{step:08d}"
    temporary = folder / f".step-{step:08d}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / "state.safetensors")
        files.fsync_file(temporary / "state.safetensors")
        state = {**state, "step": step, "sha256": files.sha256_file(temporary / "state.safetensors")}
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
        files.fsync_file(temporary / "state.json")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        files.fsync_folder(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = ", ".join(path.name for path in list_checkpoints(out)[-1:]) or "none yet"
        why = files.as_user_error(error, target) if isinstance(error, OSError) else DanluError(f"{target}: {error}")
        raise DanluError(f"{why} (last good checkpoint: {kept})") from error
    for old in list_checkpoints(out)[:-keep]:
        shutil.rmtree(old)
    return target


def list_checkpoints(out: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted((out / FOLDER).glob("step-*"))


def load_latest(out: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and state of the newest whole checkpoint; a damaged one is passed over with a warning. None when there is
    none."""
    for folder in reversed(list_checkpoints(out)):
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            if files.sha256_file(folder / "state.safetensors") != state["sha256"]:
                raise ValueError("the tensors do not match their hash")
            return load_file(folder / "state.safetensors"), state
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            console.warn(f"{folder}: is damaged ({error}); using the checkpoint before it")
    return None


def training_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Everything made of numbers that moves: weights that are trained, optimizer state, RNG states of torch."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for o, optimizer in enumerate(optimizers):
        for i, p in enumerate(_params(optimizer)):
            for key, value in optimizer.state.get(p, {}).items():
                tensors[f"optimizer.{o}.{i}.{key}"] = value.detach()
    tensors["rng.torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def restore_tensors(tensors: dict[str, Tensor], model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """The reverse of :func:`training_tensors`."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(tensors[f"model.{name}"])
    for o, optimizer in enumerate(optimizers):
        params = _params(optimizer)
        for name, value in tensors.items():
            if name.startswith(f"optimizer.{o}."):
                _, _, i, key = name.split(".", 3)
                weight = params[int(i)]
                optimizer.state[weight][key] = value.to(weight.device)
    torch.set_rng_state(tensors["rng.torch"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])


def random_states() -> dict[str, Any]:
    """Python's and NumPy's global generators as JSON."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """The reverse of :func:`random_states`."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


def _params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
