"""Compiles the kernels with the system's C++ compiler. Used by the package's build, where danlu is not importable yet:
standard library only.

Each instruction set is a file of its own, compiled for just that set; which one runs is decided where it runs, so what
is built on one machine works on every x86-64.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LIBRARY = "_native.so"
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread")
SOURCES: dict[str, tuple[str, ...]] = {
    "api.cpp": (),
    "step_avx2.cpp": ("-mavx2", "-mfma", "-mf16c"),
}


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


def build(source: Path, target: Path) -> Path:
    """Compile the sources of a folder into ``target / LIBRARY``, written whole or not at all.

    Raises:
        RuntimeError: there is no compiler, or it fails; the message is its own.
    """
    if reason := why_not():
        raise RuntimeError(reason)
    cxx = compiler()
    assert cxx is not None
    with tempfile.TemporaryDirectory() as scratch:
        running = []
        for name, flags in SOURCES.items():
            command = [cxx, *FLAGS, *flags, "-c", str(source / name), "-o", f"{scratch}/{name}.o"]
            running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        for name, process in zip(SOURCES, running, strict=True):
            _, told = process.communicate()
            if process.returncode:
                raise RuntimeError(f"{cxx} could not compile {name}:\n{told}")
        made = f"{scratch}/{LIBRARY}"
        objects = [f"{scratch}/{name}.o" for name in SOURCES]
        linked = subprocess.run([cxx, "-shared", "-pthread", "-o", made, *objects], capture_output=True, text=True)
        if linked.returncode:
            raise RuntimeError(f"{cxx} could not link the kernels:\n{linked.stderr}")
        target.mkdir(parents=True, exist_ok=True)
        beside = target / f"{LIBRARY}.{os.getpid()}"
        shutil.copyfile(made, beside)
        os.replace(beside, target / LIBRARY)
    return target / LIBRARY


if __name__ == "__main__":  # after an edit of the sources: python -m danlu.kernels.build
    here = Path(__file__).parent
    print(build(here, here))
