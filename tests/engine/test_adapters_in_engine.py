"""Many adapters in one batch: each request is answered as by its adapter merged into the model, whatever else runs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from paged_sequences import SHAPE, VOCAB, Sequences, random_model
from test_torch_runner import LENGTHS
from torch import Tensor

from danlu.engine.batch import Batch
from danlu.engine.config import SamplingParams
from danlu.engine.engine import Engine
from danlu.engine.engine_config import EngineConfig
from danlu.engine.native_runner import NativeRunner
from danlu.engine.request import Generation
from danlu.engine.torch_runner import TorchRunner
from danlu.errors import DanluError
from danlu.kernels import native
from danlu.models.causal_lm import CausalLM
from danlu.nn.config import ModelConfig, Rope
from packed_weights import packed
from random_adapters import merged, random_adapter

NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(native.choose()[0] is None, reason=f"no kernels: {native.choose()[1]}")
)
# Outputs that fill no tile, three query heads a key head, biases, an own head.
OWN: dict[str, Any] = {
    **SHAPE, "dim": 96, "n_heads": 6, "n_kv_heads": 2, "head_dim": 16, "ffn_dim": 72, "context": 96, "rope": Rope(),
    "qkv_bias": True, "ffn_bias": True,
}  # fmt: skip
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"rank": 3},
    "wide": {"rank": 20},
    "some": {"rank": 16, "targets": ("q_proj", "v_proj", "down_proj", "lm_head")},
}
GREEDY = SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True)


def model_of(**changes: Any) -> CausalLM:
    return random_model(lambda: CausalLM(ModelConfig(**{**OWN, **changes})))


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return model_of()


@pytest.fixture(scope="module")
def folders(model: CausalLM, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: random_adapter(model, folder / name, **shape) for name, shape in ADAPTERS.items()}


def runner_of(kind: str, model: CausalLM, **options: Any) -> Any:
    if kind == "torch":
        return TorchRunner(model)
    runner = NativeRunner.of(model, threads=2, **{"kv_dtype": "fp32", **options})
    runner.model = model  # type: ignore[attr-defined]
    return runner


class AdaptedSequences(Sequences):
    """Sequences that have an adapter each, or none."""

    def __init__(self, runner: Any, names: Sequence[str | None], lengths: Sequence[int] = LENGTHS) -> None:
        super().__init__(runner, lengths)
        self.names = names

    def poison(self, group: int, blocks: list[int]) -> None:
        if isinstance(self.runner, TorchRunner):
            super().poison(group, blocks)
        else:
            for stored in self.runner._caches[group]:
                stored[blocks] = 0xFF

    def batch(self, pieces: Sequence[tuple[int, int]], logits_at: Sequence[int] | None = None) -> Batch:
        adapters = tuple(self.names[sequence] for sequence, _ in pieces)
        return replace(super().batch(pieces, logits_at), adapters=adapters if any(self.names) else ())

    def expected(self, sequence: int, model: CausalLM) -> Tensor:
        with torch.inference_mode():
            return model(self.ids[sequence][None])[0]


@pytest.mark.parametrize("kind", ["torch", NATIVE])
def test_steps_of_any_mixture_give_the_logits_of_the_merged_models(
    kind: str, model: CausalLM, folders: dict[str, Path]
) -> None:
    runner = runner_of(kind, model)
    for name, folder in folders.items():
        runner.load_adapter(name, folder)
    names = ["all", None, "some", "wide", "all", "some", None]
    sequences = AdaptedSequences(runner, names)
    found = sequences.play()
    without = AdaptedSequences(runner, [None] * len(names)).play()
    for i, (name, logits) in enumerate(zip(names, found, strict=True)):
        expected = sequences.expected(i, model if name is None else merged(model, folders[name]))
        assert (logits - expected).abs().max() < 1e-4
        if name is None:
            assert torch.equal(logits, without[i])
        else:
            assert (logits - without[i]).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["torch", NATIVE])
@pytest.mark.parametrize("changes", [{"arrangement": "sandwich"}, {"tie_embeddings": True}], ids=str)
def test_other_shapes(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = model_of(**changes)
    folder = random_adapter(model, tmp_path / "adapter", 5)
    runner = runner_of(kind, model)
    runner.load_adapter("mine", folder)
    sequences = AdaptedSequences(runner, ["mine"] * 2, [20, 30])
    for i, logits in enumerate(sequences.play()):
        assert (logits - sequences.expected(i, merged(model, folder))).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["torch", NATIVE])
def test_long_prompts_in_one_step(kind: str, tmp_path: Path) -> None:
    """More rows than a weight tile is kept for, of two adapters that meet within."""
    model = model_of(context=512)
    folders = {name: random_adapter(model, tmp_path / name, rank) for name, rank in (("a", 4), ("b", 17))}
    runner = runner_of(kind, model)
    for name, folder in folders.items():
        runner.load_adapter(name, folder)
    sequences = AdaptedSequences(runner, ["a", "b", "a"], [150, 200, 90])
    for i, logits in enumerate(sequences.advance([(0, 150), (1, 200), (2, 90)])):
        expected = sequences.expected(i, merged(model, folders["ab"[i % 2]]))
        assert (logits - expected).abs().max() < 2e-4


def test_dora_runs_on_torch_and_is_refused_by_the_kernels(model: CausalLM, tmp_path: Path) -> None:
    folder = random_adapter(model, tmp_path / "dora", 4, kind="dora")
    runner = runner_of("torch", model)
    runner.load_adapter("dora", folder)
    sequences = AdaptedSequences(runner, ["dora", None, "dora"], [20, 30, 7])
    for i, logits in enumerate(sequences.play()):
        expected = sequences.expected(i, model if i == 1 else merged(model, folder))
        assert (logits - expected).abs().max() < 1e-4
    if native.choose()[0] is not None:
        with pytest.raises(DanluError, match=r"DoRA.*danlu merge.*kernels=torch"):
            runner_of("native", model).load_adapter("dora", folder)


@pytest.mark.skipif(native.choose()[0] is None, reason=f"no native kernels: {native.choose()[1]}")
@pytest.mark.parametrize("weights", ["F32", "Q8_0", "Q4_1"])
def test_a_token_is_computed_alike_whatever_else_runs(weights: str, tmp_path: Path) -> None:
    """To the bit: alone, among others of its adapter, of other adapters, of none, in any pieces."""
    model = model_of(dim=128, ffn_dim=160, n_heads=8, context=256)
    folders = {name: random_adapter(model, tmp_path / name, rank) for name, rank in (("a", 4), ("b", 17))}
    how: Any = dict(model.named_parameters()) if weights == "F32" else packed(model, weights)
    found = []
    for seed, names in enumerate([["a"], ["a", "a", "b", None, "a", "b", None], ["a", "b"], ["a", None]]):
        runner = NativeRunner(model.config, how, kv_dtype="fp32", threads=2)
        for name, folder in folders.items():
            runner.load_adapter(name, folder)
        sequences = AdaptedSequences(runner, names, [150, 130, 140, 60, 120, 90, 33][: len(names)])
        sequences.ids[0] = torch.arange(150) % VOCAB
        sequences.random.seed(seed)
        found.append(sequences.play()[0])
    for logits in found[1:]:
        assert torch.equal(found[0], logits)
    # Apart from the rounding of activations, these are the packed weights with the update beside them.
    expected = sequences.expected(0, merged(model, folders["a"]))
    error = (found[0] - expected).pow(2).mean().sqrt() / expected.std()
    assert error < (1e-5 if weights == "F32" else 0.1)


def engine_of(kind: str, model: CausalLM, folders: dict[str, Path], **options: Any) -> Engine:
    engine = Engine(runner_of(kind, model), EngineConfig(**{"kv_memory": 4, "max_running": 6, **options}))
    for name, folder in folders.items():
        engine.load_adapter(name, folder)
    return engine


def outcome(generation: Generation) -> list[Any]:
    return [(c.token_ids, c.finish_reason) for c in generation.completions]


def prompts_for(seed: int, n: int) -> list[list[int]]:
    """Many of them begin alike."""
    draw = random.Random(seed)
    stems = [draw.choices(range(VOCAB), k=k) for k in (3, 17, 33)]
    return [[*draw.choice(stems), *draw.choices(range(VOCAB), k=draw.randrange(20))] for _ in range(n)]


@pytest.mark.parametrize("kind", ["torch", NATIVE])
def test_requests_are_answered_as_by_the_merged_models(kind: str, model: CausalLM, folders: dict[str, Path]) -> None:
    """Prompts that begin alike, and share no cache across adapters."""
    prompts = prompts_for(0, 9)
    expected = {None: Engine(runner_of(kind, model), EngineConfig(kv_memory=4)).generate(prompts, GREEDY)}
    for name, folder in folders.items():
        alone = Engine(runner_of(kind, merged(model, folder)), EngineConfig(kv_memory=4))
        expected[name] = alone.generate(prompts, GREEDY)
    assert len({str([outcome(one) for one in found]) for found in expected.values()}) == 4
    with engine_of(kind, model, folders) as engine:
        submitted = {
            engine.submit(prompt, GREEDY, adapter=name): (name, i)
            for i, prompt in enumerate(prompts)
            for name in expected
        }
        done: dict[str, Generation] = {}
        while engine.has_work:
            done.update((event.request_id, event.generation) for event in engine.step() if event.generation)
            engine.check()
        assert engine.stats.cached_tokens > 0
        for request_id, (name, i) in submitted.items():
            assert outcome(done[request_id]) == outcome(expected[name][i])
        scored = engine.score(prompts[:1], adapter="all")[0]
        ids = torch.tensor(prompts[0])
        with torch.inference_mode():
            logps = merged(model, folders["all"])(ids[None])[0].log_softmax(-1)
        for place, one in enumerate(scored[1:]):
            assert one is not None
            assert abs(one.logprob - logps[place, ids[place + 1]]) < 1e-4
        assert not torch.equal(engine.embed(prompts[:1]), engine.embed(prompts[:1], adapter="all"))


@pytest.mark.parametrize("kind", ["torch", NATIVE])
@pytest.mark.parametrize("seed", range(3))
def test_a_storm_of_adapters(kind: str, seed: int, model: CausalLM, folders: dict[str, Path]) -> None:
    """Submits, aborts, loads and unloads in any order, few blocks: who is not aborted gets the answer it gets alone."""
    draw = random.Random(seed)
    params = [replace(GREEDY, max_new_tokens=n, seed=n, temperature=draw.choice([0.0, 1.0])) for n in range(1, 20)]
    todo = [(prompt, draw.choice(params), draw.choice([None, *folders])) for prompt in prompts_for(seed, 30)]
    engine = engine_of(kind, model, folders, max_running=5, step_tokens=20, kv_memory=1, context=96)
    submitted: dict[str, tuple[Any, ...]] = {}
    done: dict[str, Generation] = {}
    aborted = set()
    while todo or engine.has_work:
        for _ in range(draw.randrange(4)):
            if todo:
                prompt, how, name = todo.pop()
                if name is not None and name not in engine.adapters:
                    engine.load_adapter(name, folders[name])
                submitted[engine.submit(prompt, how, adapter=name)] = (prompt, how, name)
        if submitted and draw.random() < 0.1:
            aborted.add(one := draw.choice(list(submitted)))
            engine.abort(one)
        running = {submitted[one][2] for one in submitted.keys() - done.keys() - aborted}
        if draw.random() < 0.3 and (idle := sorted(set(engine.adapters) - running)):
            engine.unload_adapter(idle[0])
        done.update((event.request_id, event.generation) for event in engine.step() if event.generation)
        engine.check()
    assert done.keys() == submitted.keys()
    assert (engine.stats.running, engine.stats.blocks_used) == (0, 0)
    alone = engine_of(kind, model, folders)
    for request_id in done.keys() - aborted:
        prompt, how, name = submitted[request_id]
        assert outcome(done[request_id]) == outcome(alone.generate([prompt], how, adapter=name)[0])


@pytest.mark.parametrize("kind", ["torch", NATIVE])
def test_a_name_can_come_to_mean_another_adapter(kind: str, model: CausalLM, folders: dict[str, Path]) -> None:
    prompt = prompts_for(1, 1)[0] + list(range(40))  # whole blocks that are cached
    with engine_of(kind, model, {"mine": folders["all"]}) as engine:
        first = outcome(engine.generate([prompt], GREEDY, adapter="mine")[0])
        prepared = engine.prepare(prompt, GREEDY, adapter="mine")
        running = engine.submit(prompt, GREEDY, adapter="mine")
        engine.step()
        with pytest.raises(DanluError, match="1 requests use 'mine'"):
            engine.unload_adapter("mine")
        with pytest.raises(DanluError, match="'mine' is loaded already"):
            engine.load_adapter("mine", folders["wide"])
        engine.abort(running)
        engine.step()
        engine.unload_adapter("mine")
        assert engine.adapters == ()
        with pytest.raises(DanluError, match="none of the name 'mine'; loaded: none"):
            engine.submit(prompt, GREEDY, adapter="mine")
        engine.load_adapter("mine", folders["wide"])
        with pytest.raises(DanluError, match="unloaded since"):
            engine.enqueue(prepared)
        second = outcome(engine.generate([prompt], GREEDY, adapter="mine")[0])
        assert second != first
    with engine_of(kind, model, {"other": folders["wide"]}) as engine:
        assert second == outcome(engine.generate([prompt], GREEDY, adapter="other")[0])


@pytest.mark.parametrize("kind", ["torch", NATIVE])
def test_what_cannot_be_applied_is_refused_and_the_model_goes_on(
    kind: str, model: CausalLM, folders: dict[str, Path], tmp_path: Path
) -> None:
    other = random_adapter(model_of(dim=64), tmp_path / "other", 4)
    tokens = random_adapter(model, tmp_path / "tokens", 4, token_ids=(3, 5))
    with engine_of(kind, model, {"all": folders["all"]}) as engine:
        before = outcome(engine.generate([[1, 2, 3]], GREEDY, adapter="all")[0])
        for folder, told in ((other, "has shape"), (tokens, "danlu merge"), (tmp_path, "not an adapter folder")):
            with pytest.raises(DanluError, match=told):
                engine.load_adapter("broken", folder)
        assert engine.adapters == ("all",)
        assert outcome(engine.generate([[1, 2, 3]], GREEDY, adapter="all")[0]) == before


def test_the_weights_may_change_below_an_adapter(folders: dict[str, Path]) -> None:
    model, other = model_of(), random_model(lambda: CausalLM(ModelConfig(**OWN)), seed=1)
    for kind in ("torch", "native") if native.choose()[0] is not None else ("torch",):
        with engine_of(kind, model, {"all": folders["all"]}) as engine:
            engine.update(other)
            expected = Engine(runner_of(kind, merged(other, folders["all"]))).generate([[1, 2]], GREEDY)
            assert outcome(engine.generate([[1, 2]], GREEDY, adapter="all")[0]) == outcome(expected[0])
