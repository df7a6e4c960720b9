"""Opens many damaged files in one process that cannot have 200 MB more than it starts with; run by test_fuzz.py.

Prints a JSON object: how many files were read, how many were refused, the slowest in seconds, and the first failure,
which is anything but a DanluError or a clean read, MemoryError included.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from danlu.errors import DanluError
from danlu.formats.inspect import describe
from danlu.formats.weights import INDEX_FILE, open_weights

MEMORY = 200 * 2**20
NUMBERS = {1: (0, 1, 255), 4: (2**31 - 1, 2**32 - 1), 8: (0, 2**40, 2**62, 2**64 - 1)}
"""Bytes that a number takes -> what it is replaced by."""


def file_in_memory(path: Path) -> Callable[[bytes], None]:
    """Make ``path`` a link to a file in memory, and return what sets its content: a disk takes longer than the rest."""
    descriptor = os.memfd_create(path.name)
    path.unlink(missing_ok=True)
    path.symlink_to(f"/proc/{os.getpid()}/fd/{descriptor}")

    def write(content: bytes) -> None:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content, 0)

    return write


def read_all(path: Path) -> None:
    """Everything that danlu does with a file that it accepts."""
    weights = open_weights(path)
    for name, info in weights.infos.items():
        try:
            tensor = weights.tensor(name)
        except DanluError:
            continue  # a type that is listed only
        assert tuple(tensor.shape) == info.shape
        tensor.reshape(-1).view(torch.uint8).sum()  # touches every byte
    describe(path)


def mutants(whole: bytes, header: int) -> Iterator[bytes]:
    """The file cut at every place, and every place of the header overwritten with numbers of 1, 4 and 8 bytes."""
    for end in range(len(whole)):
        yield whole[:end]
    for at in range(header):
        for n_bytes, numbers in NUMBERS.items():
            for number in numbers:
                yield whole[:at] + number.to_bytes(n_bytes, "little") + whole[at + n_bytes :]


def texts(whole: str) -> Iterator[bytes]:
    """JSON with its digits and signs, and some letters, replaced by others, and cut at every place."""
    for end in range(len(whole)):
        yield whole[:end].encode()
    for at, letter in enumerate(whole):
        if letter in '0123456789[]{},:"' or at % 7 == 0:
            for other in ("9" * 19, "1e99", "[", "}", '"', "null", "../", "\\", "\\ud800"):
                yield (whole[:at] + other + whole[at + 1 :]).encode()


def safetensors_mutants(whole: bytes) -> Iterator[bytes]:
    """Also with a right length before the mutated header, so that it gets read."""
    length = int.from_bytes(whole[:8], "little")
    yield from mutants(whole, 8)
    for header in texts(whole[8 : 8 + length].decode()):
        yield len(header).to_bytes(8, "little") + header + whole[8 + length :]


def main(folder: Path) -> None:
    """Every mutant of the files that the test has put there."""
    gguf, single, sharded = folder / "whole.gguf", folder / "whole.safetensors", folder / "sharded"
    header = int((folder / "gguf_header").read_text())
    for path in (gguf, single, sharded):
        read_all(path)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    counts, slowest, failure = {"read": 0, "refused": 0}, 0.0, None
    work = folder / "work"
    shutil.copytree(sharded, work)
    for path, opened, contents in (
        (work / INDEX_FILE, work, texts((sharded / INDEX_FILE).read_text())),
        (work / "mutant.gguf", work / "mutant.gguf", mutants(gguf.read_bytes(), header)),
        (work / "mutant.safetensors", work / "mutant.safetensors", safetensors_mutants(single.read_bytes())),
    ):
        write = file_in_memory(path)
        for content in contents:
            write(content)
            start = time.process_time()
            try:
                read_all(opened)
                counts["read"] += 1
            except DanluError:
                counts["refused"] += 1
            except BaseException:
                failure = failure or f"{content[:3000]!r}\n{traceback.format_exc()}"
            slowest = max(slowest, time.process_time() - start)
    print(json.dumps({**counts, "slowest": slowest, "failure": failure}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
