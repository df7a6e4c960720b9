"""Compiles the kernels with the system's C++ compiler. Used by the package's build, where danlu is not importable yet:
standard library only.

Each instruction set is a library of its own, compiled for just that set; which one runs is decided where it runs, so
what is built on one machine works on every x86-64. One library for all would not be safe: of an inline function of the
C++ library that several objects bring, the linker keeps one, which may be compiled for more than the CPU has.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread")
EXPORTS = "{ global: danlu_*; local: *; };"


class InstructionSet(NamedTuple):
    """``flags`` compile for it, ``example`` is an instruction that only it has."""

    name: str
    flags: tuple[str, ...]
    example: str

    @property
    def library(self) -> str:
        return f"_native_{self.name}.so"

    @property
    def define(self) -> str:
        """Tells cpu.cpp what to look for."""
        return f"-DDANLU_{self.name.upper()}"


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
SETS = (
    InstructionSet("amx", (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"), "tdpbf16ps %tmm0, %tmm1, %tmm2"),
    InstructionSet("avx512_bf16", (*_AVX512, "-mavx512bf16"), "vdpbf16ps %zmm0, %zmm1, %zmm2"),
    InstructionSet("avx512", _AVX512, "vpdpbusd %zmm0, %zmm1, %zmm2"),
    InstructionSet("avx2", _AVX2, "vpaddd %ymm0, %ymm1, %ymm2"),
)
"""The best first."""


def compiler() -> str | None:
    """The C++ compiler: what CXX names, else c++, g++ or clang++."""
    named = os.environ.get("CXX")
    return next(
        (found for name in ([named] if named else ["c++", "g++", "clang++"]) if (found := shutil.which(name))), None
    )


def why_not() -> str | None:
    """Why the kernels cannot be built here; None where they can."""
    if platform.machine().lower() not in ("x86_64", "amd64") or sys.platform != "linux":
        return f"the kernels are for x86-64 Linux, this is {platform.machine()} {sys.platform}"
    return None if compiler() else "there is no C++ compiler (c++, g++ or clang++)"


def build(source: Path, target: Path) -> list[Path]:
    """Compile the sources of a folder into ``target``, a library for each set that the compiler knows; each is written
    whole or not at all, those of other sets are removed.

    Raises:
        RuntimeError: there is no compiler, it knows no set, or it fails; the message is its own.
    """
    if reason := why_not():
        raise RuntimeError(reason)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        known = [a_set for a_set in SETS if _knows(a_set, Path(scratch))]
        if not known:
            raise RuntimeError(f"{compiler()} knows none of {', '.join(a_set.name for a_set in SETS)}")
        made = [build_one(source, Path(scratch), a_set.library, a_set.flags, a_set.define) for a_set in known]
        for library in made:
            beside = target / f"{library.name}.{os.getpid()}"
            shutil.copyfile(library, beside)
            os.replace(beside, target / library.name)
    for a_set in set(SETS) - set(known):
        (target / a_set.library).unlink(missing_ok=True)
    return [target / library.name for library in made]


def build_one(source: Path, target: Path, library: str, flags: Sequence[str], define: str) -> Path:
    """One library: the kernels compiled with ``flags``; what decides whether they can run, without.

    Raises:
        RuntimeError: the compiler fails; the message is its own.
    """
    exports = target / f"{library}.exports"
    exports.write_text(EXPORTS)
    running = []
    for name, own in {"api.cpp": flags, "cpu.cpp": [define]}.items():
        command = [str(compiler()), *FLAGS, *own, "-c", str(source / name), "-o", f"{target}/{library}.{name}.o"]
        running.append((name, command[-1], subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
    for name, _, process in running:
        _, told = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{compiler()} could not compile {name} for {library}:\n{told}")
    made = target / library
    command = [str(compiler()), "-shared", "-pthread", f"-Wl,--version-script={exports}", "-o", str(made)]
    linked = subprocess.run([*command, *(file for _, file, _ in running)], capture_output=True, text=True)
    if linked.returncode:
        raise RuntimeError(f"{compiler()} could not link {library}:\n{linked.stderr}")
    return made


def _knows(a_set: InstructionSet, scratch: Path) -> bool:
    """Whether compiler and assembler are recent enough."""
    source = f'int has() {{ asm("{a_set.example}"); return 0; }}\n#include "{Path(__file__).with_name("cpu.cpp")}"\n'
    command = [str(compiler()), *a_set.flags, a_set.define, "-x", "c++", "-", "-c", "-o", str(scratch / "known.o")]
    return subprocess.run(command, input=source, capture_output=True, text=True).returncode == 0


if __name__ == "__main__":  # after an edit of the sources: python -m danlu.kernels.build
    here = Path(__file__).parent
    for built in build(here, here):
        print(built)
