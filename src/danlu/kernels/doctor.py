"""`danlu doctor`: what danlu finds on this machine, and which of its fast paths run here, and why."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
from dataclasses import dataclass
from typing import Any

from danlu import __version__
from danlu.config import option, validate
from danlu.console import out as stdout
from danlu.errors import DanluError

EXTRAS = {
    "data": ("trafilatura", "pypdfium2", "py3langid"),
    "sentencepiece": ("sentencepiece",),
    "tasks": ("sklearn",),
    "verifiers": ("jsonschema",),
    "tracing": ("opentelemetry.sdk", "opentelemetry.exporter.otlp"),
}
"""Extra -> the modules that it brings."""

INTERESTING = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """What `danlu doctor` takes."""

    json: bool = option(False, "Print a JSON object in place of the table.")


def doctor(config: DoctorConfig) -> dict[str, Any]:
    """Print what there is and return it.

    Returns:
        ``danlu``, ``python``, ``torch`` (versions), ``cpu``: {name, cores, features}, ``memory`` in bytes, ``gpus``:
        names, ``kernels``: {active (a path's name or None), why, built: name -> whether this CPU has it, compiler},
        ``extras``: name -> modules that are missing, ``sandbox``: what confines code that a model wrote -> whether it
        is in force.
    """
    config = validate(config)
    found = examine()
    if config.json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        _show(found)
    return found


def examine() -> dict[str, Any]:
    """See :func:`doctor`."""
    import torch

    from danlu import hardware
    from danlu.kernels import build, native

    try:
        active, why = native.choose()
        built = native.paths()
    except DanluError as error:
        active, why, built = None, str(error), {}
    flags = hardware.cpu_flags()
    return {
        "danlu": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": {
            "name": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "features": [name for name in INTERESTING if name in flags],
        },
        "memory": hardware.total_memory_bytes(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "kernels": {"active": active, "why": why, "built": built, "compiler": build.compiler()},
        "sandbox": _sandbox(),
        "extras": {
            name: [module for module in modules if importlib.util.find_spec(module) is None]
            for name, modules in EXTRAS.items()
        },
    }


def _sandbox() -> dict[str, bool]:
    from danlu.posttraining.verifiers.sandbox import protections

    try:
        return {one.name: one.in_force for one in protections()}
    except DanluError as error:
        return {str(error): False}


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _show(found: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    cpu, kernels = found["cpu"], found["kernels"]
    table.add_row("danlu", f"{found['danlu']}, Python {found['python']}, torch {found['torch']}")
    table.add_row("CPU", f"{cpu['name']}, {cpu['cores']} cores; {', '.join(cpu['features']) or 'no vector extensions'}")
    table.add_row("memory", f"{found['memory'] / 2**30:.1f} GiB")
    table.add_row("GPU", ", ".join(found["gpus"]) or "none")
    built = ", ".join(
        f"{name} {'works here' if works else 'not on this CPU'}" for name, works in kernels["built"].items()
    )
    table.add_row("CPU kernels", f"{kernels['active'] or 'torch'}: {kernels['why']}")
    table.add_row("", f"built: {built or 'none'}; C++ compiler: {kernels['compiler'] or 'none'}")
    lacking = [name for name, in_force in found["sandbox"].items() if not in_force]
    table.add_row("sandbox", f"lacks {', '.join(lacking)}" if lacking else "complete: code of models can be run")
    for name, missing in found["extras"].items():
        told = "installed" if not missing else f"not installed (pip install 'danlu[{name}]'): {', '.join(missing)}"
        table.add_row(f"extra {name}", told)
    stdout().print(table)
