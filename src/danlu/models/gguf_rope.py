"""Rotary positions as GGUF files say them: base and scaling in metadata, Llama 3's and LongRoPE's dividers of the
frequencies as tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from danlu.errors import DanluError
from danlu.models.gguf_metadata import Metadata, Stored, shortest
from danlu.models.gguf_names import Architecture

FREQUENCIES = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"


def rope_fields(
    file: Stored, metadata: Metadata, architecture: Architecture, content: Mapping[str, Any], head_dim: int
) -> dict[str, Any]:
    """``rope_theta`` and its like, which both generations of transformers read."""
    found: dict[str, Any] = {"rope_theta": metadata.number("rope.freq_base", 10_000.0)}
    turned = metadata.integer("rope.dimension_count", head_dim)
    if turned != head_dim or architecture.model_type == "glm4":
        found["partial_rotary_factor"] = turned / head_dim
    if architecture.model_type == "gemma3_text":
        found["rope_local_base_freq"] = metadata.number("rope.freq_base_swa", 10_000.0)
    metadata.get("rope.scaling.finetuned")  # tells of the training
    kind = metadata.get("rope.scaling.type")
    factor = metadata.number("rope.scaling.factor", metadata.number("rope.scale_linear", 0.0))
    original = metadata.integer("rope.scaling.original_context_length", 0, least=0)
    attention_factor = metadata.number("rope.scaling.attn_factor", 0.0)
    if LONG_FACTORS in file.infos or SHORT_FACTORS in file.infos:
        found["rope_scaling"] = {
            "rope_type": "longrope",
            "short_factor": _factors(file, SHORT_FACTORS, turned),
            "long_factor": _factors(file, LONG_FACTORS, turned),
            **({"attention_factor": attention_factor} if attention_factor else {}),
        }
        found["original_max_position_embeddings"] = original or content["max_position_embeddings"]
        return found
    if kind not in (None, "none", "linear", "yarn"):
        raise metadata.error("rope.scaling.type", f"is {kind!r:.60}, which is not supported; supported: linear, yarn")
    if FREQUENCIES in file.infos:
        if factor not in (0.0, 1.0):
            raise metadata.error("rope.scaling.factor", f"comes with {FREQUENCIES}, which scales already")
        dividers = _factors(file, FREQUENCIES, turned)
        if any(divider != 1.0 for divider in dividers):
            scaling = llama3_scaling(dividers, found["rope_theta"], turned, original)
            if scaling is None:
                raise DanluError(f"{file.path}: {FREQUENCIES} scales the positions in another way than Llama 3 does")
            found["rope_scaling"] = scaling
    elif kind == "yarn" and factor not in (0.0, 1.0):
        metadata.only("rope.scaling.yarn_ext_factor", 1.0)
        metadata.only("rope.scaling.yarn_attn_factor", 1.0)
        # llama.cpp multiplies YaRN's own factor, 0.1 ln(s) + 1, by the file's.
        own = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        found["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original or content["max_position_embeddings"],
            "beta_fast": metadata.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": metadata.number("rope.scaling.yarn_beta_slow", 1.0),
            **({"attention_factor": attention_factor * own} if attention_factor not in (0.0, 1.0) else {}),
        }
        return found
    elif kind != "none" and factor not in (0.0, 1.0):
        found["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    if attention_factor not in (0.0, 1.0):
        raise metadata.error("rope.scaling.attn_factor", f"is {attention_factor:g}, which is not supported here")
    return found


def _factors(file: Stored, name: str, turned: int) -> list[float]:
    """A divider for each pair of dimensions."""
    info = file.infos.get(name)
    if info is None or info.shape != (turned // 2,) or info.dtype not in ("F32", "F16", "BF16"):
        raise DanluError(f"{file.path}: {name} must hold {turned // 2} numbers")
    values = file.tensor(name).float()
    if not (values.isfinite() & (values > 0)).all():
        raise DanluError(f"{file.path}: {name} must hold positive numbers")
    return [shortest(value) for value in values.tolist()]


def llama3_scaling(dividers: Sequence[float], base: float, turned: int, original: int = 0) -> dict[str, Any] | None:
    """Llama 3.1's parameters that give these dividers of the frequencies, None if none do.

    Between the ends the divider d of frequency f mixes 1 and the factor s: (1/d - 1/s) / (1 - 1/s) =
    (original f / 2 pi - low) / (high - low), a straight line in f. Its slope and its zero are all there is to know: the
    three parameters may be scaled together, so ``original`` is free to choose.

    Args:
        dividers: one for each pair of dimensions, frequencies falling.
        base: of the rotary positions.
        turned: how many dimensions of a head are turned.
        original: the trained context, if it is known.
    """
    original = original or 8192  # of every Llama 3
    factor = max(dividers)
    candidates = [(1.0, 4.0)]
    turns = [original * base ** (-2 * i / turned) / (2 * math.pi) for i in range(turned // 2)]
    points = [
        (turn, (1 / divider - 1 / factor) / (1 - 1 / factor))
        for turn, divider in zip(turns, dividers, strict=True)
        if 1.0 < divider < factor
    ]
    if len(points) >= 2:
        (x0, y0), (x1, y1) = points[0], points[-1]
        width = (x0 - x1) / (y0 - y1) if y0 != y1 else math.inf
        low = x0 - y0 * width
        candidates.append((float(f"{low:.4g}"), float(f"{low + width:.4g}")))
        candidates.append((low, low + width))
    for low, high in candidates:
        if 0 < low < high and _is_llama3(dividers, turns, factor, low, high):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    return None


def _is_llama3(dividers: Sequence[float], turns: Sequence[float], factor: float, low: float, high: float) -> bool:
    found = llama3_dividers(turns, factor, low, high)
    return all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(found, dividers, strict=True))


def llama3_dividers(turns: Sequence[float], factor: float, low: float, high: float) -> list[float]:
    """What Llama 3.1 divides each frequency by.

    Args:
        turns: how often each pair of dimensions turns within the original context.
        factor, low, high: ``factor``, ``low_freq_factor`` and ``high_freq_factor``.
    """
    mixed = [min(max((turn - low) / (high - low), 0.0), 1.0) for turn in turns]
    return [1 / ((1 - share) / factor + share) for share in mixed]
