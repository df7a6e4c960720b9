"""Memory of fine-tuning, whole, with LoRA and with QLoRA: `python benchmarks/finetune_memory.py`.

SmolLM2-135M (the 4-bit file of `danlu pull smollm2`, dequantised to bf16 once) learns instructions mined from the
standard library: all weights (fp32 master weights, gradients and moments of AdamW, bf16 activations and products), a
LoRA adapter on bf16 weights, the same adapter on weights in 4 bits, which are in the file's own blocks again, and on
weights in NF4, as those of a model would be that was never in 4 bits. Each is a process of its own with the same rows,
rates for its kind, AdamW and recomputed activations. Reported: the peak of the resident memory, the part of it that
importing alone takes, and the loss on held-out rows after the last step, in bits per byte. One JSON line ends the
output. Not a timing: other programs may run.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"adapter": "lora"},
    "qlora": {"adapter": "qlora"},
    "nf4": {"adapter": "qlora"},
}


def run(model: Path, data: Path, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune in this process, and what it took."""
    import torch

    from danlu import hardware
    from danlu.quantization import four_bits
    from danlu.training.config import FinetuneConfig
    from danlu.training.finetune import finetune

    if kind == "nf4":
        four_bits.FILE_TYPES = ()  # the file's blocks are not looked for
    cpu = torch.device("cpu")
    (torch.randn(64, 64) @ torch.randn(64, 64)).sum()
    imports = hardware.peak_memory_bytes(cpu)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / kind
        finetune(
            FinetuneConfig(
                model=model, data=data, out=out, optimizer="adamw", precision="bf16", gradient_checkpointing=True,
                compile="never", device="cpu", log_to=(), heldout_every=1_000_000, **options, **KINDS[kind],
            )
        )  # fmt: skip
        peak = hardware.peak_memory_bytes(cpu)
        metrics = json.loads((out / "danlu.json").read_text())["metrics"]
    return {
        "peak_bytes": peak,
        "imports_bytes": imports,
        "heldout_bits_per_byte": metrics["heldout_bits_per_byte"],
        "trained_parameters": metrics["trained_parameters"],
    }


def prepare(folder: Path) -> tuple[Path, Path]:
    """The model in bf16 and the rows, made if they are not there."""
    from danlu.data.build import build_data
    from danlu.data.config import DataConfig
    from danlu.data.mining import MineConfig, mine_instructions
    from danlu.hub.config import PullConfig
    from danlu.hub.pull import pull
    from danlu.models.convert import convert
    from danlu.models.convert_config import ConvertConfig

    model, corpus, chats = folder / "model", folder / "corpus", folder / "chats"
    convert(ConvertConfig(source=next(pull(PullConfig(source="smollm2")).glob("*.gguf")), out=model, dtype="bf16"))
    build_data(DataConfig(corpus=("stdlib",), out=corpus))
    mine_instructions(MineConfig(data=corpus, out=chats))
    return model, chats


def main() -> None:
    """Run each kind and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(KINDS), help="kinds, with commas (default all)")
    parser.add_argument("--folder", type=Path, help="where model and rows are kept (default: made anew)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--heldout-tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    names = ("steps", "seq_len", "batch_tokens", "micro_batch_tokens", "heldout_tokens", "threads")
    options = {name: getattr(given, name) for name in names}
    if given.worker:
        print(json.dumps(run(given.folder / "model", given.folder / "chats", given.worker, options)))
        return
    kinds = given.only.split(",")
    if wrong := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"there is no {', '.join(wrong)}; choose from {', '.join(KINDS)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        prepare(folder)
        found = {}
        for kind in kinds:
            arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
            command = [sys.executable, __file__, "--worker", kind, "--folder", str(folder), *arguments]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[kind] = one = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{kind:6} peak {one['peak_bytes'] / 2**20:6,.0f} MiB, of which imports "
                f"{one['imports_bytes'] / 2**20:4,.0f}; {one['trained_parameters'] / 1e6:6.2f} M weights trained; "
                f"held-out {one['heldout_bits_per_byte']:.4f} bits per byte",
                flush=True,
            )
    shares = {}
    if {"full", "qlora"} <= found.keys():
        full, small = found["full"], found["qlora"]
        shares["peak_share"] = small["peak_bytes"] / full["peak_bytes"]
        shares["peak_share_above_imports"] = (small["peak_bytes"] - small["imports_bytes"]) / (
            full["peak_bytes"] - full["imports_bytes"]
        )
    if {"lora", "qlora"} <= found.keys():
        shares["loss_ratio"] = found["qlora"]["heldout_bits_per_byte"] / found["lora"]["heldout_bits_per_byte"]
    print(json.dumps({"options": options, **found, **shares, "machine": platform.machine()}))


if __name__ == "__main__":
    main()
