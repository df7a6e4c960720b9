"""Which layers see a sliding window only, as the configs of the Mistral, Qwen and Gemma families say it."""

from __future__ import annotations

from danlu.models.hf_config import HFConfig

Windows = tuple[int | None, tuple[int, ...]]
"""The window in tokens (None: none), and the layers that see everything all the same."""


def window_size(hf: HFConfig, default: int | None) -> int | None:
    """``sliding_window`` in tokens. Null means no window; only where the field is missing does the default hold."""
    size: int | None = hf.integer("sliding_window", None if "sliding_window" in hf.content else default)
    return size


def read_window(hf: HFConfig, n_layers: int) -> Windows:
    """Qwen: off without ``use_sliding_window``, and not for the lowest ``max_window_layers`` layers."""
    used, window = hf.flag("use_sliding_window"), window_size(hf, 4096)
    first = hf.integer("max_window_layers", 28, least=0)
    if not used or window is None:
        return layer_windows(hf, n_layers, None, tuple(range(n_layers)))
    return layer_windows(hf, n_layers, window, tuple(range(min(first, n_layers))))


def layer_windows(hf: HFConfig, n_layers: int, window: int | None, full_layers: tuple[int, ...]) -> Windows:
    """``layer_types`` decides which layers have the window; where it is missing, all but ``full_layers``.

    Raises:
        DanluError: layers are to have a window, and there is none.
    """
    listed = hf.layers("layer_types", n_layers, {"full_attention": True, "sliding_attention": False})
    full = full_layers if listed is None else listed
    if window is not None:
        return window, full
    if len(full) < n_layers:
        raise hf.error("some layers are to see a sliding window (layer_types), but the config switches it off")
    return None, ()
