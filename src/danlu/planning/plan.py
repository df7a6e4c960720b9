"""`danlu plan`: the memory, work and time that a model needs, for training and for inference."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import torch
import yaml

from danlu import hardware
from danlu.config import validate
from danlu.console import out as stdout
from danlu.errors import DanluError
from danlu.hub.pull import model_path
from danlu.models.causal_lm import CausalLM
from danlu.models.load import read_config
from danlu.nn.config import ModelConfig, Rope
from danlu.planning import memory
from danlu.planning.config import PlanConfig
from danlu.planning.memory import Budget

PRODUCTS_ACHIEVED = 0.4
"""Share of the peak that large products reach in good training code; prefill is counted with it too."""
BANDWIDTH_ACHIEVED = 0.7
"""Share of the memory bandwidth that decoding reaches."""

# Shapes of the Llama family, for sizes that are given as a number: parameters in billions -> layers, width, heads,
# key/value heads, feed-forward width, vocabulary. From the models' published configs.
SHAPES = {
    0.135: (30, 576, 9, 3, 1536, 49152),
    0.36: (32, 960, 15, 5, 2560, 49152),
    1.1: (22, 2048, 32, 4, 5632, 32000),
    3.2: (28, 3072, 24, 8, 8192, 128256),
    7.0: (32, 4096, 32, 32, 11008, 32000),
    8.0: (32, 4096, 32, 8, 14336, 128256),
    13.0: (40, 5120, 40, 40, 13824, 32000),
    34.0: (48, 8192, 64, 8, 22016, 32000),
    70.0: (80, 8192, 64, 8, 28672, 128256),
    405.0: (126, 16384, 128, 8, 53248, 128256),
}


@dataclass(frozen=True)
class Machine:
    """Memory in GB, bandwidth in GB/s, dense peak in TFLOP/s; None where the hardware has no such products."""

    name: str
    memory: float
    bandwidth: float
    fp32: float | None
    fp16: float | None
    int8: float | None
    source: str


@dataclass(frozen=True)
class Times:
    """What a machine does with the most precise format that fits, of 16 bits where it computes those; None where none
    does.

    Attributes:
        fits: that format.
        decode: tokens per second of one sequence, bound by reading the weights.
        prefill: prompt tokens per second, bound by products.
        train_days: days for the training tokens, full BF16; whether it fits one device or not.
        devices: how many of them the training state fills.
    """

    machine: str
    fits: str | None
    decode: float | None
    prefill: float | None
    train_days: float | None
    devices: int


@dataclass(frozen=True)
class Plan:
    """The whole estimate; bytes, FLOPs."""

    model: str
    parameters: int
    active_parameters: int
    context: int
    batch: int
    flops_per_token: int
    training_flops_per_token: int
    inference: tuple[Budget, ...]
    training: tuple[Budget, ...]
    machines: tuple[Times, ...]


def plan(config: PlanConfig) -> Plan:
    """Print the estimate for a model, and return it.

    Raises:
        DanluError: no such model, and not a size either.
    """
    config = validate(config)
    shape, parameters = model_shape(config.model)
    found = make_plan(config, shape, parameters)
    if config.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        _print(found, config)
    return found


def model_shape(model: str) -> tuple[ModelConfig, int]:
    """Shape and number of weights of a model folder, a GGUF file, a name (smollm2), or a size such as ``7B``."""
    if size := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MBT])", model, re.IGNORECASE):
        parameters = float(size[1]) * {"M": 1e6, "B": 1e9, "T": 1e12}[size[2].upper()]
        if not 1e6 <= parameters <= 1e13:
            raise DanluError(f"model: {model} is out of range; give a size between 1M and 10T")
        nearest = min(SHAPES, key=lambda billions: abs(billions * 1e9 / parameters - 1))
        layers, dim, heads, kv_heads, ffn, vocab = SHAPES[nearest]
        shape = ModelConfig(vocab, layers, dim, heads, kv_heads, dim // heads, ffn, rope=Rope())
        return shape, round(parameters)
    path = model_path(model)
    if not path.exists():
        raise DanluError(f"model: {model} is neither a model folder or GGUF file nor a size such as 135M, 7B or 70B")
    shape = read_config(path)
    with torch.device("meta"):
        return shape, CausalLM(shape).num_parameters()


def make_plan(config: PlanConfig, shape: ModelConfig, parameters: int) -> Plan:
    """The estimate for a shape; ``parameters`` may differ from the shape's own count."""
    with torch.device("meta"):
        model = CausalLM(shape)
    scale = parameters / model.num_parameters()
    training_flops = int(model.estimate_flops(config.context) * scale)
    active = parameters
    if shape.experts is not None:
        sleeping = 1 - shape.experts.top_k / shape.experts.number
        active -= int(sum(p.numel() for p in model.layers.parameters() if p.ndim == 3) * sleeping * scale)
    inference = tuple(
        memory.inference(shape, parameters, form, config.context, config.batch) for form in memory.BYTES_PER_WEIGHT
    )
    adapters = memory.lora_parameters(shape, config.lora_rank)
    train = functools.partial(
        memory.training, shape, parameters,
        seq_len=config.context, batch=config.batch, optimizer=config.optimizer,
        checkpointing=config.gradient_checkpointing,
    )  # fmt: skip
    training = (
        train(name="full, FP32"),
        train(name="full, BF16 products", precision="bf16"),
        *(
            train(name=name, precision="bf16", trained=adapters, frozen_bytes=memory.BYTES_PER_WEIGHT[form])
            for name, form in (("LoRA on BF16", "FP16/BF16"), ("LoRA on INT8", "INT8"), ("QLoRA on INT4", "INT4"))
        ),
    )
    times = tuple(
        estimate_times(machine, shape, inference, training[1], active / parameters, training_flops, config)
        for machine in machines()
    )
    return Plan(
        config.model, parameters, active, config.context, config.batch, training_flops // 3, training_flops,
        inference, training, times,
    )  # fmt: skip


def estimate_times(
    machine: Machine, shape: ModelConfig, inference: Sequence[Budget], training: Budget, active: float,
    training_flops: int, config: PlanConfig,
) -> Times:  # fmt: skip
    """Roofline estimate: decoding reads all active weights and the cache for each token; prompts and training are
    products."""
    room = machine.memory * 1e9
    peak = machine.fp16 or machine.fp32 or 0.0
    usual = [budget for budget in inference if budget.name != "FP32" or not machine.fp16]  # 16 bits where they are fast
    fitting = next((budget for budget in usual if budget.total <= room), None)
    decode = prefill = None
    if fitting is not None:
        products = machine.fp32 if fitting.name == "FP32" else peak
        bytes_read = fitting.weights * active + fitting.kv_cache
        bound_by_memory = machine.bandwidth * 1e9 * BANDWIDTH_ACHIEVED / bytes_read * config.batch
        prefill = (products or 0.0) * 1e12 * PRODUCTS_ACHIEVED / (training_flops / 3)
        decode = min(bound_by_memory, prefill)
    seconds = config.tokens * training_flops / (peak * 1e12 * PRODUCTS_ACHIEVED)
    return Times(
        machine.name, fitting.name if fitting else None, decode, prefill, seconds / 86400,
        -(-training.total // int(room)),
    )  # fmt: skip


def machines() -> list[Machine]:
    """This machine, measured now, and those of `hardware.yaml`."""
    content = yaml.safe_load(resources.files("danlu.planning").joinpath("hardware.yaml").read_text("utf-8"))
    return [this_machine(), *(Machine(**entry) for entry in content)]


@functools.cache
def this_machine() -> Machine:
    """The device that verbs pick here: its memory, and products and bandwidth measured in about a second."""
    device = hardware.pick_device("auto")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, room = f"this GPU ({properties.name})", properties.total_memory
    else:
        name, room = f"this CPU ({torch.get_num_threads()} threads)", hardware.total_memory_bytes()
    fp16 = None
    if hardware.computes_bf16(device):
        fp16 = hardware.matmul_peak(torch.bfloat16, device) / 1e12
    fp32 = hardware.matmul_peak(torch.float32, device) / 1e12
    return Machine(name, room / 1e9, _bandwidth(device) / 1e9, fp32, fp16, None, "measured")


def _bandwidth(device: torch.device) -> float:
    """Bytes per second of reading memory: the best of several sums over 256 MB."""
    numbers = torch.ones(64 << 20, device=device)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        numbers.sum()
        hardware.synchronize(device)
        best = max(best, numbers.nbytes / (time.perf_counter() - start))
    return best


def _print(found: Plan, config: PlanConfig) -> None:
    from rich.text import Text

    console = stdout()
    active = f", {_count(found.active_parameters)} active" if found.active_parameters != found.parameters else ""
    console.print(Text(f"{found.model}: {_count(found.parameters)} parameters{active}", style="bold"))
    console.print(
        f"{found.batch} x {found.context:,} tokens; {_count(found.flops_per_token)}FLOP per token to run, "
        f"{_count(found.training_flops_per_token)}FLOP to train\n"
    )
    gb = _gigabytes
    _table(
        "inference", ("format", "weights", "KV cache", "activations", "total"),
        [(b.name, gb(b.weights), gb(b.kv_cache), gb(b.activations), gb(b.total)) for b in found.inference],
    )  # fmt: skip
    _table(
        f"training ({config.optimizer}{', checkpointing' if config.gradient_checkpointing else ''})",
        ("mode", "weights", "gradients", "optimizer", "activations", "peak"),
        [
            (b.name, gb(b.weights), gb(b.gradients), gb(b.optimizer), gb(b.activations), gb(b.total))
            for b in found.training
        ],
    )
    _table(
        f"time: decoding and prefill in tokens/s, training on {_count(config.tokens).strip()} tokens",
        ("hardware", "runs in", "decode", "prefill", "training", "devices"),
        [
            (t.machine, t.fits or "no room", _rate(t.decode), _rate(t.prefill), _days(t.train_days), str(t.devices))
            for t in found.machines
        ],
    )  # fmt: skip
    console.print(
        Text(
            f"GB = 10^9 bytes. Decoding at {BANDWIDTH_ACHIEVED:.0%} of the memory bandwidth, products at "
            f"{PRODUCTS_ACHIEVED:.0%} of the peak; devices: how many the training state of BF16 products fills.\n"
            "INT8 and INT4 with a 16-bit scale for every 32 weights. Peak: activations and gradients are not at "
            "their largest together. On Linux the C library may keep freed memory on top; a run with "
            "MALLOC_MMAP_THRESHOLD_=65536 in its environment gives it back.",
            style="dim",
        )
    )


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold cyan")
    for number, column in enumerate(columns):
        table.add_column(column, no_wrap=True, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    stdout().print(Text(title, style="bold"))
    stdout().print(table, soft_wrap=False)
    stdout().print()


def _gigabytes(n_bytes: int) -> str:
    return "-" if not n_bytes else f"{n_bytes / 1e9:,.2f} GB" if n_bytes < 1e11 else f"{n_bytes / 1e9:,.0f} GB"


def _count(number: float) -> str:
    for unit, size in (("T", 1e12), ("G" if number != round(number) else "B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f} "


def _rate(per_second: float | None) -> str:
    return "-" if per_second is None else f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2g}"


def _days(days: float | None) -> str:
    if days is None:
        return "-"
    if days < 1 / 24:
        return f"{days * 1440:.0f} min"
    return f"{days * 24:.1f} h" if days < 2 else f"{days:,.0f} days" if days < 730 else f"{days / 365:,.0f} years"
