"""Weights at rest, whatever the file: names, dtypes and shapes at once, tensors when asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from danlu.errors import DanluError

if TYPE_CHECKING:
    from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a stored tensor before it is read.

    Attributes:
        dtype: as the format names it: "F32", "BF16", "I64", ..., or a GGUF type such as "Q4_1".
        shape: outermost dimension first, as in torch.
        n_bytes: size in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int


class Weights(Protocol):
    """Tensors by name. ``infos`` is in the order of the file."""

    @property
    def path(self) -> Path:
        """What was opened."""

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Name -> what is known of the tensor."""

    def tensor(self, name: str) -> Tensor:
        """A tensor on the CPU: a view of the file where torch has the stored dtype, so nothing is read before it is
        used and writing to it leaves the file alone; GGUF's quantised types are dequantised to fp32.

        Raises:
            DanluError: there is no tensor of this name, or its type is not supported.
        """


def open_weights(path: str | Path) -> Weights:
    """Open weights by their path.

    Args:
        path: a model folder with `model.safetensors`, with shards and `model.safetensors.index.json`, or with a single
            `.gguf` file; or a `.safetensors` or `.gguf` file. A whole `model.safetensors` goes before shards.

    Raises:
        DanluError: nothing is there, the file is damaged or of another kind, or it is a pickle, which would run code.
    """
    from danlu.formats.gguf_file import GGUFFile
    from danlu.formats.safetensors_files import SafetensorsWeights

    source = weights_file(path)
    return GGUFFile(source) if source.suffix == ".gguf" else SafetensorsWeights(source)


def weights_file(path: str | Path) -> Path:
    """The file by which :func:`open_weights` opens a path: a `.safetensors` or `.gguf` file or the index of shards."""
    given = Path(path)
    if given.is_dir():
        return _file_in(given)
    if not given.exists():
        raise DanluError(f"{given}: does not exist")
    if given.suffix in PICKLE_SUFFIXES:
        raise DanluError(_no_pickle(given))
    if given.suffix not in (".safetensors", ".gguf") and given.name != INDEX_FILE:
        raise DanluError(f"{given}: is no weights file that danlu reads; give a model folder, .safetensors or .gguf")
    return given


def _file_in(folder: Path) -> Path:
    for name in (SINGLE_FILE, INDEX_FILE):
        if (folder / name).exists():
            return folder / name
    found = sorted(member for member in folder.iterdir() if not member.name.startswith("."))
    ggufs = [member for member in found if member.suffix == ".gguf"]
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        raise DanluError(f"{folder}: holds {len(ggufs)} GGUF files ({ggufs[0].name}, ...); give the path of one")
    if others := [member.name for member in found if member.suffix == ".safetensors"]:
        raise DanluError(f"{folder}: has no {SINGLE_FILE} and no {INDEX_FILE}; give the path of one file ({others[0]})")
    if pickles := [member for member in found if member.suffix in PICKLE_SUFFIXES]:
        raise DanluError(_no_pickle(pickles[0]))
    raise DanluError(f"{folder}: holds no weights; expected {SINGLE_FILE}, {INDEX_FILE} with shards, or a .gguf file")


def _no_pickle(path: Path) -> str:
    return (
        f"{path}: is a pickle file, and unpickling runs whatever code it holds; fetch the model as .safetensors, or "
        "convert it on a machine you can lose (transformers: from_pretrained(...).save_pretrained(folder))"
    )
