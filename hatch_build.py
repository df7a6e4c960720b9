"""The package's build: compiles the CPU kernels where it can. Without a compiler the package is whole but slower."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KERNELS = Path("src/danlu/kernels")


class KernelsHook(BuildHookInterface[Any]):
    """``DANLU_BUILD_KERNELS``: auto (default), require (fail without), never."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        wanted = os.environ.get("DANLU_BUILD_KERNELS", "auto")
        if wanted == "never":
            return
        folder = Path(self.root) / KERNELS
        builder = _load(folder / "build.py")
        try:
            libraries = builder.build(folder, folder)
        except RuntimeError as error:
            if wanted == "require":
                raise
            self.app.display_warning(f"danlu is installed without its CPU kernels: {error}")
            return
        build_data["artifacts"] += [str(KERNELS / library.name) for library in libraries]
        build_data["pure_python"] = False
        # Plain C behind ctypes: any Python 3, but this platform.
        from packaging.tags import sys_tags

        build_data["tag"] = f"py3-none-{next(iter(sys_tags())).platform}"


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("danlu_kernels_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
