"""The metadata of a GGUF file, which comes from outside: values are checked, and what nobody has read is refused."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from danlu.errors import DanluError
from danlu.formats.gguf_blocks import PackedTensor
from danlu.formats.weights import TensorInfo


class Stored(Protocol):
    """What is needed of a :class:`danlu.formats.gguf_file.GGUFFile`."""

    @property
    def path(self) -> Path:
        """What was opened."""

    @property
    def metadata(self) -> dict[str, Any]:
        """Key -> value."""

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Name -> what is known of the tensor."""

    def tensor(self, name: str) -> Tensor:
        """A tensor, dequantised to fp32 where it is quantised."""

    def packed(self, name: str) -> PackedTensor:
        """A tensor as its bytes lie in the file."""


class Metadata:
    """The metadata of a file's architecture, and which of its keys have been read."""

    def __init__(self, file: Stored) -> None:
        self.path, self._all = file.path, file.metadata
        kind = self._all.get("general.type", "model")
        if kind != "model":
            raise DanluError(f"{file.path}: is of the type {kind!r}, not a model")
        architecture = self._all.get("general.architecture")
        if not isinstance(architecture, str):
            raise DanluError(f"{file.path}: names no architecture (general.architecture)")
        self.architecture = architecture
        self._read: set[str] = set()

    def error(self, key: str, message: str) -> DanluError:
        """An error that names file and key."""
        return DanluError(f"{self.path}: {self.architecture}.{key} {message}")

    def get(self, key: str) -> Any:
        """The value of a key, None where it is absent; the architecture stands in front of the key."""
        self._read.add(key)
        return self._all.get(f"{self.architecture}.{key}")

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = 2**31 - 1) -> int:
        """A whole number; required without a default. A list that says the same for every layer counts as one."""
        value = self.get(key)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if isinstance(value, list):
            raise self.error(key, "differs from layer to layer, which is not supported")
        if value is None and default is not None:
            return default
        if value is None:
            raise self.error(key, "is missing")
        if type(value) is not int or not least <= value <= most:
            raise self.error(key, f"is {value!r:.60}; expected a whole number from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number; required without a default."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise self.error(key, "is missing")
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.error(key, f"is {value!r:.60}; expected a number")
        return shortest(float(value))

    def only(self, key: str, *values: Any) -> None:
        """Refuse a value that cannot be honoured; absent ones can."""
        value = self.get(key)
        if value is not None and value not in values:
            expected = " or ".join(map(repr, values))
            raise self.error(key, f"is {value!r:.60}, which is not supported; supported: {expected}")

    def token_id(self, name: str) -> int | None:
        """The id of a token by its role."""
        value = self._all.get(f"tokenizer.ggml.{name}")
        return value if type(value) is int else None

    def finish(self) -> None:
        """Refuse keys of the architecture that nobody has read. Zero, false and empty stand for their absence."""
        prefix = f"{self.architecture}."
        unread = [
            key
            for key, value in self._all.items()
            if key.startswith(prefix) and key.removeprefix(prefix) not in self._read and value not in (0, False, "", [])
        ]
        if unread:
            raise DanluError(
                f"{self.path}: {', '.join(sorted(unread))}: not known for this architecture, and may change what the "
                "model computes"
            )


def shortest(value: float) -> float:
    """The shortest decimal that is the same number in fp32: 1e-05 where a file says 9.999999747378752e-06."""
    try:
        raw = struct.pack("<f", value)
    except OverflowError:
        return value
    if struct.unpack("<f", raw)[0] != value:
        return value
    return next(short for n in range(6, 18) if struct.pack("<f", short := float(f"{value:.{n}g}")) == raw)


def rounded(value: float) -> float:
    """The number that fp32 has for it."""
    found: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return found
