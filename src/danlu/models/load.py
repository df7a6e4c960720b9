"""Model folders in the Hugging Face layout: weights in, weights out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from danlu import files
from danlu.errors import DanluError
from danlu.models import qwen3
from danlu.models.causal_lm import CausalLM

if TYPE_CHECKING:
    from danlu.tokenizer.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"


def load_model(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> CausalLM:
    """Open a model folder.

    Args:
        folder: holds `config.json` and `model.safetensors`.
        dtype: the weights are converted to it.

    Raises:
        DanluError: not a model folder, a family that is not known, or weights that do not fit the config.
    """
    path = Path(folder)
    if path.is_file() and path.suffix == ".gguf":
        raise DanluError(f"{path}: GGUF files can be pulled but not run yet; use a model folder with {WEIGHTS}")
    if not path.is_dir():
        raise DanluError(f"{path}: no such model folder")
    if not (path / "config.json").exists():
        hint = (
            "; it is being trained: run the same command again to finish it" if (path / "checkpoints").exists() else ""
        )
        raise DanluError(f"{path}: is not a model folder (no config.json){hint}")
    if not (path / WEIGHTS).exists():
        raise DanluError(f"{path}: has no {WEIGHTS}")
    content = files.read_json(path / "config.json")
    if not isinstance(content, dict):
        raise DanluError(f"{path / 'config.json'}: must hold an object")
    config = qwen3.config_from_hf(content, str(path / "config.json"))
    with torch.device("meta"):  # no memory is spent before the weights are known to fit the config
        model = CausalLM(config)
    model.load_state_dict(
        _read_weights(path / WEIGHTS, qwen3.tensor_names(config), model, dtype), strict=False, assign=True
    )
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
    model.rope = type(model.rope)(config.head_dim, config.context, config.rope_base)
    return model.to(device).requires_grad_(True).eval()


def _read_weights(path: Path, names: dict[str, str], model: CausalLM, dtype: torch.dtype) -> dict[str, Tensor]:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = {}
    try:
        with safe_open(path, framework="pt") as file:
            stored = set(file.keys())
            if missing := sorted(set(names.values()) - stored):
                raise DanluError(f"{path}: lacks {missing[0]} ({len(missing)} of {len(names)} tensors are missing)")
            surplus = sorted(stored - set(names.values()) - {"lm_head.weight"})
            if surplus:
                raise DanluError(
                    f"{path}: holds {surplus[0]}, which config.json has no place for ({len(surplus)} such tensors)"
                )
            for ours, theirs in names.items():
                tensor = file.get_tensor(theirs)
                if tuple(tensor.shape) != expected[ours]:
                    raise DanluError(
                        f"{path}: {theirs} has shape {tuple(tensor.shape)}; config.json says {expected[ours]}"
                    )
                if not tensor.is_floating_point():
                    raise DanluError(f"{path}: {theirs} is {tensor.dtype}; quantized weights are not supported yet")
                weights[ours] = tensor.to(dtype)
    except SafetensorError as error:
        raise DanluError(f"{path}: is not a readable safetensors file ({error}); fetch or make it again") from error
    return weights


def save_model(model: CausalLM, folder: str | Path, tokenizer: Tokenizer) -> None:
    """Write `config.json`, `generation_config.json`, `model.safetensors` (fp32) and the tokenizer's files, each
    atomically.

    The weights come last: a folder with weights is whole.
    """
    path = Path(folder)
    files.require_space(path, 4 * model.num_parameters(), "the model")
    tokenizer.save(path)
    stop_ids = list(tokenizer.stop_ids)
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    files.write_json(path / "config.json", qwen3.config_to_hf(model.config, **ids))
    generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stop_ids, "pad_token_id": tokenizer.pad_id}
    files.write_json(path / "generation_config.json", generation)
    state = model.state_dict()
    weights = {
        theirs: state[ours].detach().to("cpu", torch.float32).contiguous()
        for ours, theirs in qwen3.tensor_names(model.config).items()
    }
    with files.atomic_path(path / WEIGHTS) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
