"""Safetensors: one file or shards with an index, read as views of the mapped files and written in one pass.

The layout is Hugging Face's: `model.safetensors`, or `model-00001-of-0000N.safetensors` and
`model.safetensors.index.json`, which tells for each tensor the shard it is in.
"""

from __future__ import annotations

import json
import math
import mmap
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from danlu import files
from danlu.errors import DanluError
from danlu.formats.mapped import map_file, view
from danlu.formats.safetensors_header import METADATA, TORCH_DTYPES, Entry, read_header
from danlu.formats.weights import INDEX_FILE, SINGLE_FILE, TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_INDEX_BYTES = 64 * 2**20
"""The index of a model of 700 billion parameters has 9 MB."""

_NAME_OF_DTYPE = {dtype: name for name, dtype in TORCH_DTYPES.items()}

_SHARD = re.compile(r"model-\d{5}-of-(\d{5})\.safetensors")


class SafetensorsWeights:
    """The tensors of a `.safetensors` file, or of all the shards that an index names.

    Every header is read and checked at once; a shard is mapped when one of its tensors is first asked for.

    Raises:
        DanluError: a file is damaged, or index and shards do not agree.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._place: dict[str, tuple[Path, Entry]] = {}
        self._mapped: dict[Path, mmap.mmap] = {}
        if self.path.suffix == ".json":
            self._open_shards(read_index(self.path))
        else:
            self._place = {name: (self.path, entry) for name, entry in read_header(self.path).entries.items()}
        self.infos = {
            name: TensorInfo(name, entry.dtype, entry.shape, entry.end - entry.begin)
            for name, (_, entry) in self._place.items()
        }

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped file; writing to it leaves the file alone."""
        if name not in self._place:
            raise DanluError(f"{self.path}: has no tensor {name!r}")
        path, entry = self._place[name]
        import torch

        if entry.dtype not in TORCH_DTYPES:
            raise DanluError(f"{path}: {name} is of type {entry.dtype}, which torch has no dtype for")
        if path not in self._mapped:
            self._mapped[path] = map_file(path)
        return view(self._mapped[path], entry.begin, getattr(torch, TORCH_DTYPES[entry.dtype]), entry.shape)

    def _open_shards(self, shard_of: dict[str, str]) -> None:
        for shard in dict.fromkeys(shard_of.values()):
            path = _shard_path(self.path, shard)
            for name, entry in read_header(path).entries.items():
                if name in self._place:
                    raise DanluError(f"{path}: {name} is also in {self._place[name][0].name}; fetch the model again")
                if shard_of.get(name) != shard:
                    raise DanluError(
                        f"{path}: holds {name}, which {self.path.name} does not place there; fetch the model again"
                    )
                self._place[name] = (path, entry)
        if lost := [name for name in shard_of if name not in self._place]:
            raise DanluError(
                f"{self.path}: places {lost[0]} in {shard_of[lost[0]]}, which lacks it ({len(lost)} such tensors); "
                "fetch the model again"
            )


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard, from an index file.

    Raises:
        DanluError: it is too large or not an index.
    """
    if not path.is_file():
        raise DanluError(f"{path}: is not a file")
    if (size := path.stat().st_size) > MAX_INDEX_BYTES:
        raise DanluError(f"{path}: has {files.human_bytes(size)}; an index is never larger than 64 MB")
    content = files.read_json(path)
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shard_of, dict) or not shard_of or not all(map(_is_text, (*shard_of, *shard_of.values()))):
        raise DanluError(f'{path}: must hold "weight_map", an object of tensor names and shard files')
    return shard_of


def _is_text(value: object) -> bool:
    """JSON can spell halves of characters, which are no text and no file name."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _shard_path(index: Path, shard: str) -> Path:
    """Where a shard lies; an index must not lead out of its folder, except into the hub cache that its folder is in."""
    if Path(shard).name != shard or "\\" in shard or "\0" in shard or not shard.endswith(".safetensors"):
        raise DanluError(f"{index}: names the shard {shard!r}; shards are .safetensors files in the same folder")
    folder, path = index.parent.resolve(), index.parent / shard
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead in a circle
        raise DanluError(f"{path}: is missing, and {index.name} needs it; fetch the model again") from error
    blobs = target.parent  # danlu's and Hugging Face's caches link SNAPSHOT/.../NAME to blobs/HASH beside the snapshots
    in_cache = blobs.name == "blobs" and blobs.parent in folder.parents
    if folder not in target.parents and not in_cache:
        raise DanluError(f"{path}: is a link out of the model folder, to {target}; put the file itself there")
    return path


@dataclass(frozen=True)
class PendingTensor:
    """A tensor that is made when its turn to be written comes, so that a conversion holds one at a time."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    layout: str = "torch.strided"

    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def save_safetensors(
    folder: str | Path, tensors: Mapping[str, Tensor | PendingTensor], *, max_shard_bytes: int = 5 * 10**9
) -> list[Path]:
    """Write the weights of a model folder: `model.safetensors`, or shards and their index.

    Tensors are brought to the CPU and made contiguous one at a time, so that no second copy of the model is in memory;
    those that share memory are written once each. The new weights count from one last rename (or removal) on: a folder
    never mixes old and new ones, and at worst holds none. Weights of the other layout are removed.

    Args:
        tensors: name -> tensor, in the order wanted.
        max_shard_bytes: most bytes of tensors in one file; a larger tensor gets a file of its own.

    Returns:
        The files written, the index last.

    Raises:
        DanluError: the disk is full, the folder cannot be written, or safetensors has no name for a tensor's dtype.
    """
    target = Path(folder)
    for name, tensor in tensors.items():
        if _dtype_name(tensor) is None or str(tensor.layout) != "torch.strided":
            raise DanluError(f"{name}: is {tensor.dtype}, {tensor.layout}; safetensors cannot hold it")
    shards = _shards(tensors, max_shard_bytes)
    files.require_space(target, sum(map(_n_bytes, tensors.values())), "the model")
    if len(shards) == 1:
        _write_file(target / SINGLE_FILE, tensors, shards[0])
        (target / INDEX_FILE).unlink(missing_ok=True)
        _remove_shards(target, keep=0)
        return [target / SINGLE_FILE]
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    if (target / names[0]).exists():  # an index would point at old and new shards while they are replaced
        (target / INDEX_FILE).unlink(missing_ok=True)
    for shard, members in zip(names, shards, strict=True):
        _write_file(target / shard, tensors, members)
    files.write_json(
        target / INDEX_FILE,
        {
            "metadata": {"total_size": sum(map(_n_bytes, tensors.values()))},
            "weight_map": {name: shard for shard, members in zip(names, shards, strict=True) for name in members},
        },
    )
    (target / SINGLE_FILE).unlink(missing_ok=True)
    _remove_shards(target, keep=len(shards))
    return [target / name for name in (*names, INDEX_FILE)]


def _shards(tensors: Mapping[str, Tensor | PendingTensor], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + _n_bytes(tensor) > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += _n_bytes(tensor)
    return shards


def _write_file(path: Path, tensors: Mapping[str, Tensor | PendingTensor], names: Sequence[str]) -> None:
    # Widest elements first, as the safetensors library does: then every tensor is aligned to its element size.
    order = sorted(names, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {METADATA: {"format": "pt"}}
    end = 0
    for name in order:
        begin, end = end, end + _n_bytes(tensors[name])
        dtype, shape = _dtype_name(tensors[name]), list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with files.atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for name in order:
            _write_tensor(file, tensors[name])


def _write_tensor(file: BinaryIO, tensor: Tensor | PendingTensor) -> None:
    import torch

    if isinstance(tensor, PendingTensor):
        announced, tensor = tensor, tensor.make()
        assert (tensor.dtype, tuple(tensor.shape)) == (announced.dtype, announced.shape)
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    if flat.numel():
        file.write(flat.view(torch.uint8).numpy().data)


def _dtype_name(tensor: Tensor | PendingTensor) -> str | None:
    return _NAME_OF_DTYPE.get(str(tensor.dtype).removeprefix("torch."))


def _n_bytes(tensor: Tensor | PendingTensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def _remove_shards(folder: Path, keep: int) -> None:
    """Remove the shards of sets that have another number of them than ``keep``."""
    for path in folder.glob("model-*-of-*.safetensors"):
        if (match := _SHARD.fullmatch(path.name)) and int(match[1]) != keep:
            path.unlink()
