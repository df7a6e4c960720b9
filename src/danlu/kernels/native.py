"""The compiled kernels, by ctypes: a plain C interface, which releases the GIL and knows nothing of torch's.

The structures here are those of `abi.h`, field by field.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

from danlu.errors import DanluError
from danlu.kernels.build import SETS

VARIABLE = "DANLU_KERNELS"
"""Environment variable: "off" runs on torch; the name of a path (avx2, ...) forces it, and so does a file, a library
that was built in another way."""

TILE = 16
MOST_HEAD_DIM = 1024
BLOCK = 32
WEIGHT_KINDS = ("F32", "BF16", "F16", "Q8_0", "Q4_0", "Q4_1")
CACHE_KINDS = ("fp32", "bf16", "int8")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
QK_NORMS = (None, "head", "full")


class Weight(Structure):
    _fields_ = [("data", c_void_p), ("bias", c_void_p), ("kind", c_int32), ("n", c_int32), ("k", c_int32)]


class Layer(Structure):
    _fields_ = [
        *((name, Weight) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *(
            (name, c_void_p)
            for name in (
                "attention_norm", "mlp_norm", "post_attention_norm", "post_mlp_norm", "q_norm", "k_norm",
            )
        ),
        ("scale", c_float),
        *((name, c_int32) for name in ("group", "layer_in_group", "window", "rope", "interleaved")),
    ]  # fmt: skip


class Model(Structure):
    _fields_ = [
        ("layers", POINTER(Layer)),
        ("embed", Weight),
        ("head", Weight),
        ("norm", c_void_p),
        *((name, c_int32) for name in ("n_layers", "dim", "n_heads", "n_kv_heads", "head_dim", "ffn_dim")),
        *((name, c_int32) for name in ("activation", "qk_norm", "cache_kind")),
        *((name, c_float) for name in ("norm_eps", "attention_softcap", "logit_softcap", "embed_scale", "head_scale")),
    ]


class LowRank(Structure):
    _fields_ = [("a", Weight), ("b", Weight)]


class AdapterLayer(Structure):
    _fields_ = [(name, LowRank) for name in ("q", "k", "v", "o", "gate", "up", "down")]


class Adapter(Structure):
    _fields_ = [("layers", POINTER(AdapterLayer)), ("head", LowRank), ("rank", c_int32)]


class Cache(Structure):
    _fields_ = [("keys", c_void_p), ("values", c_void_p), ("n_layers", c_int64)]


class Batch(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("n_tokens", "n_sequences", "n_rows", "prompt_from")),
        *((name, c_void_p) for name in ("ids", "positions", "starts", "rows")),
        ("tables", POINTER(c_void_p)),
        ("table_widths", c_void_p),
        ("cos", POINTER(c_void_p)),
        ("sin", POINTER(c_void_p)),
        ("rotated", c_void_p),
        ("caches", POINTER(Cache)),
        ("logits", c_void_p),
        ("hidden", c_void_p),
        ("adapters", POINTER(POINTER(Adapter))),
    ]


@cache
def _load(path: Path) -> ctypes.CDLL:
    try:
        found = ctypes.CDLL(str(path))
        found.danlu_works.argtypes = []
        found.danlu_open.restype = c_void_p
        found.danlu_open.argtypes = [POINTER(Model), c_int]
        found.danlu_run.argtypes = [c_void_p, POINTER(Batch)]
        found.danlu_close.argtypes = [c_void_p]
        found.danlu_pack.argtypes = [c_int, c_void_p, c_int, c_int, c_void_p]
    except (OSError, AttributeError) as error:
        raise DanluError(f"{path}: cannot be loaded ({error}); reinstall danlu, or set {VARIABLE}=off") from error
    return found


def paths() -> dict[str, bool]:
    """The instruction sets that there is a library for, the best first, and whether this machine has them."""
    files = {known.name: _file(known.name) for known in SETS}
    return {name: bool(_load(file).danlu_works()) for name, file in files.items() if file.exists()}


def library() -> ctypes.CDLL | None:
    """The library of the path that runs here; None: torch.

    Raises:
        DanluError: see :func:`choose`.
    """
    path, _ = choose()
    return None if path is None else _load(_file(path))


def _file(path: str) -> Path:
    return Path(path) if os.sep in path else Path(__file__).with_name(f"_native_{path}.so")


def choose() -> tuple[str | None, str]:
    """The path that runs here, and why; None: torch.

    Raises:
        DanluError: the environment variable names a path that is unknown or that this machine lacks.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted == "off":
        return None, f"{VARIABLE}=off"
    known = paths()
    if wanted != "auto":
        if not (_load(Path(wanted)).danlu_works() if os.sep in wanted else known.get(wanted)):
            works = ", ".join(name for name, ok in known.items() if ok) or "none"
            raise DanluError(f"{VARIABLE}={wanted}: is no path that works here; these do: {works}; or off")
        return wanted, f"{VARIABLE}={wanted}"
    if not known:
        from danlu.kernels.build import why_not

        reason = why_not()
        return None, reason or "the package was built without its kernels; reinstall it now that there is a compiler"
    best = next((name for name, ok in known.items() if ok), None)
    if best is None:
        return None, f"this CPU has none of {', '.join(known)}"
    return best, "the best that this CPU has"
