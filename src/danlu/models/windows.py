"""Which layers see a sliding window only, as the configs of the Qwen, Gemma and Phi families say it."""

from __future__ import annotations

from danlu.models.hf_config import HFConfig


def read_window(
    hf: HFConfig, n_layers: int, *, switch: str | None = "use_sliding_window"
) -> tuple[int | None, tuple[int, ...]]:
    """The window in tokens, and the layers that see everything all the same.

    Args:
        switch: the field without which the window is off; None for families whose window is always on.
    """
    used = hf.flag(switch) if switch else True
    window = hf.integer("sliding_window", None)
    first = hf.integer("max_window_layers", 0, least=0)  # Qwen: the layers below have none
    full = hf.layers("layer_types", n_layers, {"full_attention": True, "sliding_attention": False})
    if not used or window is None:
        return None, ()
    return window, full if full is not None else tuple(range(min(first, n_layers)))
