"""A file as memory: pages are read when they are touched, and no copy is made until somebody writes."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import stat
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from danlu.errors import DanluError

if TYPE_CHECKING:
    import torch

MAP_NORESERVE = 0x4000
"""Linux's flag, which Python's mmap does not name: without it a writable private mapping counts as memory promised, and
a file larger than RAM cannot be mapped."""

_MAPS: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()
"""Address -> the mapping that begins there."""


def map_file(path: str | Path) -> mmap.mmap:
    """Map a whole file. Writing to it changes this process's copy of the page and never the file.

    Raises:
        DanluError: it is no regular file, is empty, or cannot be read.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its other end
            raise DanluError(f"{path}: is not a file")
        if status.st_size == 0:
            raise DanluError(f"{path}: is empty; fetch or make it again")
        with open(path, "rb") as file:
            access = mmap.PROT_READ | mmap.PROT_WRITE
            mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | MAP_NORESERVE, prot=access)
    except OSError as error:
        raise DanluError(f"{path}: cannot be read ({error.strerror or error})") from error
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    _MAPS[address] = mapped
    return mapped


def forget(tensor: torch.Tensor) -> None:
    """Give back the memory of a tensor that lies in a mapped file and was not written to: the next look reads the file.
    Other tensors are left alone."""
    begin = tensor.data_ptr()
    end = begin + tensor.numel() * tensor.element_size()
    for address, mapped in list(_MAPS.items()):
        if address <= begin and end <= address + len(mapped) and tensor.is_contiguous():
            first = -(-(begin - address) // mmap.PAGESIZE) * mmap.PAGESIZE  # its neighbours share the outer pages
            last = (end - address) // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                mapped.madvise(mmap.MADV_DONTNEED, first, last - first)


def view(mapped: mmap.mmap, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor that lies at ``offset`` (bytes) of a mapped file; it keeps the mapping alive.

    A copy is made only where the offset is not a multiple of the element size.
    """
    import torch

    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    if offset % dtype.itemsize:
        raw = torch.frombuffer(mapped, dtype=torch.uint8, count=count * dtype.itemsize, offset=offset)
        return raw.clone().view(dtype).reshape(shape)
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset).reshape(shape)
