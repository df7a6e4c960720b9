"""From a model folder to the first logits: `python benchmarks/load.py`.

A folder in the shape of SmolLM2-135M with random weights, opened by danlu and by transformers in processes of their
own, in turns (A B A B), files in the page cache. Measured inside each process: seconds of imports, seconds from the
path to the logits of a prompt of 16 tokens, and the peak of the resident memory above what the imports take, as a share
of the weights. One JSON line ends the output. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from danlu.models.causal_lm import CausalLM
from danlu.models.families import llama
from danlu.models.hf_config import HFConfig
from danlu.models.load import save_model

SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
    "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "tie_word_embeddings": True,
    "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip

MEASURE = """
import json, sys, time
start = time.perf_counter()
import torch
{imports}
def memory(which):
    return int(open("/proc/self/status").read().split(which + ":")[1].split()[0]) * 1024
ids = torch.arange(16)[None]
(torch.randn(64, 64) @ torch.randn(64, 64)).sum()
imported, before = time.perf_counter(), memory("VmRSS")
with torch.inference_mode():
    {load}
done = time.perf_counter()
print(json.dumps({{"imports": imported - start, "load": done - imported, "peak": memory("VmHWM") - before,
                  "logits": logits[0, -1, :4].float().tolist()}}))
"""
PEERS = {
    "danlu": {
        "imports": "from danlu.models.load import load_model",
        "load": "logits = load_model(sys.argv[1], dtype=None)(ids)",
    },
    "transformers": {
        "imports": "from transformers import AutoModelForCausalLM",
        "load": "logits = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='auto').eval()(ids).logits",
    },
}


def measure(peer: str, folder: Path) -> dict[str, Any]:
    """One process of one peer."""
    code = MEASURE.format(**PEERS[peer])
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run both and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype)
    with tempfile.TemporaryDirectory() as folder:
        model = CausalLM(llama.read(HFConfig(SMOLLM2_135M, "SmolLM2-135M")))
        model.init_weights(torch.Generator().manual_seed(0))
        torch.nn.init.normal_(model.layers[0].mlp.down_proj.weight, std=0.02)
        model.hf_config = SMOLLM2_135M
        save_model(model, folder, dtype=dtype)
        weights = model.num_parameters() * dtype.itemsize
        runs: dict[str, list[dict[str, Any]]] = {peer: [] for peer in PEERS}
        for round_ in range(given.rounds + 1):
            for peer in PEERS:
                found = measure(peer, Path(folder))
                if round_:  # the first round fills the page cache
                    runs[peer].append(found)
    result: dict[str, Any] = {
        "benchmark": "load", "dtype": given.dtype, "rounds": given.rounds, "weights_bytes": weights,
        "cpu": platform.processor() or platform.machine(), "torch": torch.__version__,
    }  # fmt: skip
    print(f"{'':14}{'imports s':>12}{'load s':>12}{'total s':>12}{'peak/weights':>14}")
    for peer, found in runs.items():
        median = {key: statistics.median(run[key] for run in found) for key in ("imports", "load", "peak")}
        total = statistics.median(run["imports"] + run["load"] for run in found)
        share = median["peak"] / weights
        print(f"{peer:14}{median['imports']:12.3f}{median['load']:12.3f}{total:12.3f}{share:14.3f}")
        result[peer] = {**median, "total": total, "peak_share": share}
    ratios = [ours["load"] / theirs["load"] for ours, theirs in zip(runs["danlu"], runs["transformers"], strict=True)]
    result["load_ratio"] = statistics.median(ratios)
    result["total_ratio"] = result["danlu"]["total"] / result["transformers"]["total"]
    ours, theirs = (torch.tensor(runs[peer][0]["logits"]) for peer in PEERS)
    result["logits_differ_by"] = (ours - theirs).abs().max().item()
    print(f"danlu / transformers: load {result['load_ratio']:.2f}, total {result['total_ratio']:.2f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
