"""What a teacher says of each token of a data set, computed once and kept on disk: its k likeliest next tokens.

    CACHE/teacher/<key>/ids-00000.npy            (rows, row_len, k) uint16 (vocabularies up to 65,536) or uint32
                        probabilities-00000.npy  (rows, row_len, k) fp16, at the temperature of the run
                        part-00000.json          written last: SHA-256 of the two

The probability of all other tokens together is what these leave of 1. The key is a hash of teacher, rows, k,
temperature and precision. A process killed at any moment loses the work on one part at most; a part that is damaged is
made again; whole ones are read through memory maps.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from danlu import console, files
from danlu.data.packing import Batch
from danlu.errors import DanluError
from danlu.models.causal_lm import CausalLM
from danlu.objectives.distillation import top_k_logprobs
from danlu.posttraining.taught_rows import TaughtRows

FORMAT = 1  # part of the key: raise it when the meaning of the files changes
PART_BYTES = 64 << 20
LOGITS = 1 << 25
"""Logits held at once: 128 MB in fp32."""
LEAST = 2.0**-25
"""Half of the least fp16 above 0: what a probability that was rounded to 0 counts as."""


@dataclass(frozen=True)
class TeacherCache:
    """The teacher's top k of each position of numbered rows. Parts hold ``rows_per_part`` rows, the last one fewer."""

    path: Path
    rows_per_part: int
    ids: list[npt.NDArray[Any]]
    probabilities: list[npt.NDArray[np.float16]]

    def of(self, numbers_b: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs, fp32 nats, and ids, int64, of these rows, (rows, row_len, k) each."""
        places = [divmod(number, self.rows_per_part) for number in numbers_b.tolist()]
        ids = np.stack([self.ids[part][row] for part, row in places]).astype(np.int64)
        found = np.stack([self.probabilities[part][row] for part, row in places]).astype(np.float32)
        return torch.from_numpy(found).clamp(min=LEAST).log(), torch.from_numpy(ids)


def cache_teacher(
    teacher: CausalLM, fingerprint: str, rows: TaughtRows, *, k: int, temperature: float, micro_rows: int
) -> TeacherCache:
    """What the teacher says of all rows of a stream, from the cache where that is already there.

    Args:
        teacher: in the dtype that it computes in.
        fingerprint: of its folder.
        k: fewer than the vocabulary has tokens.
        micro_rows: rows of a forward pass.

    Raises:
        DanluError: the disk has no room, or the cache cannot be written.
    """
    n_rows, row_len = rows.rows_per_epoch, rows.row_len
    dtype = np.dtype(np.uint16 if teacher.config.vocab_size <= 1 << 16 else np.uint32)
    about = [FORMAT, fingerprint, _hash_of(rows), k, temperature, str(teacher.dtype)]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
    folder = files.require_writable(files.cache_home() / "teacher" / key)
    row_bytes = row_len * k * (2 + dtype.itemsize)
    per_part = max(1, PART_BYTES // row_bytes)
    starts = range(0, n_rows, per_part)
    absent = [number for number in range(len(starts)) if not _is_whole(folder, number)]
    if absent:
        files.require_space(folder, len(absent) * per_part * row_bytes, f"the teacher's {k} likeliest tokens")
        with console.progress("asking the teacher", total=n_rows, unit="rows") as advance:
            advance(n_rows - sum(min(per_part, n_rows - starts[number]) for number in absent))
            for number in absent:
                wanted = range(starts[number], min(starts[number] + per_part, n_rows))
                ids = np.empty((len(wanted), row_len, k), dtype)
                probabilities = np.empty((len(wanted), row_len, k), np.float16)
                for at in range(0, len(wanted), micro_rows):
                    batch = rows.batch(wanted[at : at + micro_rows]).batch
                    logps, found = _top_k(teacher, batch, k, temperature)
                    ids[at : at + micro_rows] = found.cpu().numpy()
                    probabilities[at : at + micro_rows] = logps.exp().cpu().numpy()
                    advance(len(batch))
                _write(folder, number, ids, probabilities)
    names = [(f"ids-{number:05d}.npy", f"probabilities-{number:05d}.npy") for number in range(len(starts))]
    maps = [[np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in pair] for pair in names]
    return TeacherCache(folder, per_part, [pair[0] for pair in maps], [pair[1] for pair in maps])


def _hash_of(rows: TaughtRows) -> str:
    """Of all that the teacher reads, and of where."""
    digest = hashlib.sha256(f"{rows.rows_per_epoch} {rows.row_len}".encode())
    for number in range(rows.rows_per_epoch):
        batch = rows.batch([number]).batch
        for tensor in (batch.ids, batch.targets, batch.segments):
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


@torch.inference_mode()
def _top_k(teacher: CausalLM, batch: Batch, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and ids, (rows, row_len, k)."""
    batch = batch.to(teacher.device)
    hidden_btd = teacher.hidden_states(batch.ids, batch.positions, batch.segments)
    rows = max(1, LOGITS // teacher.config.vocab_size)
    pieces = torch.split(hidden_btd.flatten(0, 1), rows)
    parts = [top_k_logprobs(teacher.head(hidden), k, temperature) for hidden in pieces]
    shape = (*batch.ids.shape, k)
    return torch.cat([part[0] for part in parts]).view(shape), torch.cat([part[1] for part in parts]).view(shape)


def _write(folder: Path, number: int, ids: npt.NDArray[Any], probabilities: npt.NDArray[np.float16]) -> None:
    digests = {}
    for name, array in (("ids", ids), ("probabilities", probabilities)):
        path = folder / f"{name}-{number:05d}.npy"
        with files.atomic_path(path) as temporary:
            np.save(temporary, array, allow_pickle=False)
        digests[name] = files.sha256_file(path)
    files.write_json(folder / f"part-{number:05d}.json", digests)


def _is_whole(folder: Path, number: int) -> bool:
    """Whether a part is there as it was written."""
    index = folder / f"part-{number:05d}.json"
    if not index.exists():
        return False
    try:
        digests = files.read_json(index)
        for name in ("ids", "probabilities"):
            if files.sha256_file(folder / f"{name}-{number:05d}.npy") != digests[name]:
                raise DanluError(f"{name} are not what was written")
    except (DanluError, OSError, KeyError, TypeError) as error:
        console.warn(f"{index}: is damaged ({error}); this part is made again")
        index.unlink(missing_ok=True)
        return False
    return True
