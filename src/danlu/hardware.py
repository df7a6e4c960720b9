"""What this machine computes well: dtypes, threads, and its measured matmul peak."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import time
from pathlib import Path

import torch

from danlu.errors import DanluError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device a config names; auto takes a GPU when there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DanluError(
            f"device={name}: this PyTorch sees no GPU; use device=cpu, or install a CUDA or ROCm build of PyTorch"
        )
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise DanluError(f"device={name}: there are {torch.cuda.device_count()} GPUs, numbered from 0")
    return device


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Instruction-set flags of the CPU as Linux names them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))


_BF16_FLAGS = {"amx_bf16", "avx512_bf16"}


def computes_bf16(device: torch.device) -> bool:
    """True where bf16 products run on hardware: AMX or AVX512-BF16 CPUs, GPUs from Ampere on. Elsewhere they are
    emulated, and slow."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(cpu_flags() & _BF16_FLAGS)


_CPU_COMPUTES_BF16 = computes_bf16(torch.device("cpu"))  # asked in every product, compiled ones too


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to widen operands to in front of a product: fp32 for bf16 on a CPU that lacks such products, where what
    torch emulates them with takes 4 to 45 times as long (AVX2, one core: 73 to 84 GFLOP/s in fp32; in bf16 9 forward,
    1.8 for the gradient of the input, 19 for that of the weight). The sums are the same, rounded once."""
    if dtype == torch.bfloat16 and device.type == "cpu" and not _CPU_COMPUTES_BF16:
        return torch.float32
    return dtype


def pick_precision(name: str, device: torch.device) -> str:
    """fp32, bf16 or fp16; auto takes bf16 where the hardware computes it."""
    return name if name != "auto" else ("bf16" if computes_bf16(device) else "fp32")


def has_compiler() -> bool:
    """torch.compile on the CPU needs a C++ compiler."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


@functools.cache
def matmul_peak(dtype: torch.dtype, device: torch.device, seconds: float = 0.5) -> float:
    """FLOP/s of the best of several square products, measured now: the yardstick for `share_of_peak`.

    2048 x 2048 on a CPU, 8192 x 8192 on a GPU; smaller where the dtype is emulated and one product would take too long.
    """
    wanted = 8192 if device.type == "cuda" else 2048
    best = 0.0
    for size in (512, wanted):
        a, b = torch.randn(size, size, device=device).to(dtype), torch.randn(size, size, device=device).to(dtype)
        if best and 2 * size**3 / best > seconds:
            break
        a @ b
        synchronize(device)
        end = time.perf_counter() + seconds
        for _ in range(100):
            start = time.perf_counter()
            a @ b
            synchronize(device)
            now = time.perf_counter()
            best = max(best, 2 * size**3 / (now - start))
            if now > end or (size != wanted and now > end - 0.9 * seconds):
                break
    return best


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that clocks tell the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def keep_freed_memory() -> None:
    """Have the C library (glibc) keep large blocks that are freed instead of giving each back to the system, which then
    has to clear it page by page when the next step asks for it: training on two cores got 7 to 10 % faster, with the
    same peak (docs/log.md). For the rest of the process; elsewhere nothing happens."""
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # of malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 64 * 2**20)


def return_freed_memory() -> None:
    """Have the C library (glibc) give memory that is freed back to the system now; elsewhere nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def total_memory_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: resident set of this process on the CPU, allocated memory on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # Linux; getrusage would count what the parent process held when it started this one
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
