"""What sparsity costs: `python benchmarks/moe.py`.

A mixture of experts in the proportions of Mixtral (8 experts, top 2, an expert 1.75 times as wide as the model; width
1,024 and 4,096 tokens, so that a run takes seconds on two cores), forward and forward + backward. Two tables, one JSON
line:

- beside the dense gated MLP that does the same work (hidden width top-k x F), and beside the Mixtral block of
  transformers, loop and grouped product, in turns (A B C D A B C D): median seconds, median ratio to the dense one of
  the same turn, and the share of the matmul peak of this machine, measured before and after in the same process.
- against the number of experts at the same top-k, in turns too: the cost follows the active experts. What grows with
  all of them is their gradient, which the backward pass has to write even for few tokens.

Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time

import torch
from torch import Tensor, nn

from danlu import hardware
from danlu.nn.mlp import GatedMLP
from danlu.nn.moe import MoE


def seconds_of(layer: nn.Module, x: Tensor, backward: bool) -> float:
    """Wall time of one pass; the input takes a gradient too, as inside a model."""
    layer.zero_grad(set_to_none=True)
    x.grad = None
    hardware.synchronize(x.device)
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        y = layer(x)
        if backward:
            y.backward(torch.ones_like(y))
    hardware.synchronize(x.device)
    return time.perf_counter() - start


def in_turns(layers: dict[str, nn.Module], x: Tensor, backward: bool, rounds: int) -> dict[str, list[float]]:
    """Seconds of each layer in each round, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in layers}
    for round_ in range(rounds + 1):
        for name, layer in layers.items():
            seconds = seconds_of(layer, x, backward)
            if round_:
                times[name].append(seconds)
            layer.zero_grad(set_to_none=True)
    return times


def transformers_block(dim: int, hidden_dim: int, n_experts: int, top_k: int, experts: str) -> nn.Module:
    """The Mixtral block of transformers; ``experts``: eager (a loop with index_add) or grouped_mm."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=dim, intermediate_size=hidden_dim, num_local_experts=n_experts, num_experts_per_tok=top_k,
        experts_implementation=experts,
    )  # fmt: skip
    block = MixtralSparseMoeBlock(config)
    for weight in block.parameters():
        nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)
    return block


def beside_dense(arguments: argparse.Namespace, x: Tensor) -> dict[str, object]:
    """The layer, the dense one of the same active width, and the peer."""
    dim, hidden_dim, n_experts, top_k = arguments.dim, arguments.hidden_dim, arguments.experts, arguments.top_k
    layers: dict[str, nn.Module] = {
        "danlu": MoE(dim, hidden_dim, n_experts, top_k, normalize_top_k=True),
        "dense": GatedMLP(dim, top_k * hidden_dim),
        "transformers eager": transformers_block(dim, hidden_dim, n_experts, top_k, "eager"),
        "transformers grouped_mm": transformers_block(dim, hidden_dim, n_experts, top_k, "grouped_mm"),
    }
    layers = {name: layer.to(x.device, x.dtype) for name, layer in layers.items()}
    flops = 6 * arguments.tokens * top_k * dim * hidden_dim  # forward: three products, 2 FLOPs a weight and token
    peaks = [measure_peak(x)]
    timed = {how: in_turns(layers, x, how != "forward", arguments.rounds) for how in ("forward", "forward+backward")}
    peaks.append(measure_peak(x))
    found: dict[str, object] = {"matmul_peak_gflops": round(max(peaks) / 1e9, 1)}
    for how, times in timed.items():
        work = flops if how == "forward" else 3 * flops
        print(f"\n{how:<24}  seconds  ratio to dense  share of peak")
        for name, seconds in times.items():
            median, to_dense = statistics.median(seconds), ratio(seconds, times["dense"])
            print(f"{name:<24} {median:8.3f} {to_dense:15.2f} {work / median / max(peaks):14.2f}")
            found[f"{how} {name}"] = {
                "seconds": round(median, 4),
                "ratio_to_dense": round(to_dense, 3),
                "share_of_peak": round(work / median / max(peaks), 3),
            }
    return found


def against_experts(arguments: argparse.Namespace, x: Tensor) -> dict[str, object]:
    """The same work spread over more and more experts."""
    layers: dict[str, nn.Module] = {
        str(n): MoE(arguments.dim, arguments.hidden_dim, n, arguments.top_k, normalize_top_k=True).to(x.device, x.dtype)
        for n in arguments.against
    }
    forward = in_turns(layers, x, False, arguments.rounds)
    both = in_turns(layers, x, True, arguments.rounds)
    first = str(arguments.against[0])
    print(f"\nexperts  weights (M)  forward s  ratio to {first}  forward+backward s  ratio to {first}")
    found: dict[str, object] = {}
    for name, layer in layers.items():
        row = {
            "parameters": sum(p.numel() for p in layer.parameters()),
            "forward_seconds": round(statistics.median(forward[name]), 4),
            "forward_ratio": round(ratio(forward[name], forward[first]), 3),
            "forward_backward_seconds": round(statistics.median(both[name]), 4),
            "forward_backward_ratio": round(ratio(both[name], both[first]), 3),
        }
        print(
            f"{name:>7} {row['parameters'] / 1e6:12.1f} {row['forward_seconds']:10.3f} {row['forward_ratio']:11.2f}"
            f" {row['forward_backward_seconds']:19.3f} {row['forward_backward_ratio']:11.2f}"
        )
        found[name] = row
    return found


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median ratio of the times of the same turn: a disturbance in one turn does not decide."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def measure_peak(x: Tensor) -> float:
    """The matmul peak now, not the remembered one."""
    hardware.matmul_peak.cache_clear()
    return hardware.matmul_peak(x.dtype, x.device)


def main() -> None:
    """Measure, print two tables and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=1024, help="width of the model (default 1024; Mixtral 8x7B: 4096)")
    parser.add_argument("--hidden-dim", type=int, default=1792, help="width of an expert (default 1792)")
    parser.add_argument("--experts", type=int, default=8, help="number of experts (default 8)")
    parser.add_argument("--top-k", type=int, default=2, help="experts a token is sent to (default 2)")
    parser.add_argument("--tokens", type=int, default=4096, help="batch x seq (default 4096)")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each layer, in turns (default 7)")
    parser.add_argument("--dtype", choices=hardware.DTYPES, default="fp32", help="of weights and input (default fp32)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--against", type=int, nargs="*", default=[4, 8, 16, 32], help="numbers of experts of the second table"
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device, dtype = hardware.pick_device(arguments.device), hardware.DTYPES[arguments.dtype]
    x = torch.randn(1, arguments.tokens, arguments.dim, device=device, dtype=dtype).requires_grad_()
    settings = {name: value for name, value in vars(arguments).items() if name != "against"}
    result: dict[str, object] = {"benchmark": "moe", "cpu": platform.machine(), "threads": torch.get_num_threads(),
                                 "torch": torch.__version__, **settings}  # fmt: skip
    result["beside_dense"] = beside_dense(arguments, x)
    if arguments.against:
        result["against_experts"] = against_experts(arguments, x)
    print(f"\n{json.dumps(result)}")


if __name__ == "__main__":
    main()
