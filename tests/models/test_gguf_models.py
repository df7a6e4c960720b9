"""GGUF files as models: against the folders they were written from, and against llama.cpp."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import LLAMA3, MODELS, VOCAB_SIZE, model_config, save_reference, tokenizer
from torch import Tensor

from danlu.engine.verbs import generate
from danlu.engine.verbs_config import GenerateConfig
from danlu.errors import DanluError
from danlu.formats.gguf_file import GGUFFile
from danlu.formats.gguf_write import GGUFTensor, write_gguf
from danlu.models.causal_lm import CausalLM
from danlu.models.convert import convert
from danlu.models.convert_config import ConvertConfig
from danlu.models.gguf import from_gguf, halves, neighbours
from danlu.models.gguf_metadata import shortest
from danlu.models.gguf_names import ARCHITECTURES, Stacked, architecture_of
from danlu.models.gguf_rope import llama3_dividers, llama3_scaling
from danlu.models.load import load_model
from danlu.nn.config import RopeScaling
from danlu.tokenizer.tokenizer import Tokenizer

LENGTH = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_reference(root / str(i), model_config(name)) for i, name in enumerate(MODELS)}


def as_gguf(folder: Path, out: Path, dtype: str = "f32") -> Path:
    return convert(ConvertConfig(source=folder, out=out, dtype=dtype))  # type: ignore[arg-type]


def random_ids(seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(20, VOCAB_SIZE, (LENGTH,), generator=generator).tolist()  # type: ignore[no-any-return]


def logits_of(model: CausalLM, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]))[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_gguf_file_is_the_model_it_was_made_from(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    path = as_gguf(folders[name], tmp_path / "model.gguf")
    theirs, ours = load_model(folders[name]), load_model(path)
    expected = dict(theirs.named_parameters())
    for key, value in ours.named_parameters():
        if "gemma" in name and "norm" in key:  # stored plus one, which costs up to an ulp of one
            assert (value - expected.pop(key)).abs().max() <= 2**-23
        else:
            assert torch.equal(value, expected.pop(key)), key
    assert not expected
    assert (logits_of(ours, random_ids()) - logits_of(theirs, random_ids())).abs().max() < 1e-5
    assert Tokenizer.load(path).encode("def f(x):") == tokenizer().encode("def f(x):")


# ---- llama.cpp


def llama_cpp_logits(path: Path, ids: list[int]) -> Tensor:
    """Logits after each token. Keys and values in fp32, as here."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="the oracle is llama-cpp-python, which is not installed")
    model = llama_cpp.Llama(
        str(path),
        n_ctx=64,
        n_batch=64,
        n_threads=1,
        logits_all=True,
        verbose=False,
        flash_attn=False,
        type_k=0,
        type_v=0,
    )
    model.eval(ids)
    found = torch.tensor(model.scores[: len(ids)]).clone()
    model.close()
    return found


def llama_cpp_greedy(path: Path, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    llama_cpp = pytest.importorskip("llama_cpp", reason="the oracle is llama-cpp-python, which is not installed")
    model = llama_cpp.Llama(
        str(path),
        n_ctx=64,
        n_batch=64,
        n_threads=1,
        logits_all=True,
        verbose=False,
        flash_attn=False,
        type_k=0,
        type_v=0,
    )
    model.eval(ids)
    for _ in range(n):
        ids.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(ids[-1:])
    model.close()
    return ids[len(prompt) :]


def greedy(model: CausalLM, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(logits_of(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    path = as_gguf(folders[name], tmp_path / "model.gguf")
    ids = random_ids()
    ours, theirs = logits_of(load_model(path), ids), llama_cpp_logits(path, ids)
    assert ours.std() > 0.1
    tolerance = 5e-3 if "gemma" in name else 1e-3  # ggml looks GELU up in a table of fp16 numbers
    assert (ours - theirs).abs().max() < tolerance * ours.std()


@pytest.mark.parametrize("name", ["llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3"])
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_llama_cpp_continues_alike(name: str, dtype: str, folders: dict[str, Path], tmp_path: Path) -> None:
    path = as_gguf(folders[name], tmp_path / "model.gguf", dtype)
    assert greedy(load_model(path), random_ids()[:8], 16) == llama_cpp_greedy(path, random_ids()[:8], 16)


@pytest.mark.parametrize("dtype", ["bf16", "q8_0", "q4_0", "q4_1", "q4_k"])
def test_llama_cpp_opens_quantized_files(dtype: str, tmp_path: Path) -> None:
    """llama.cpp rounds activations too, to bf16 or 8 bits; with the same weights that is all that is between us: much
    less than between 4-bit weights and the original."""
    folder = save_reference(tmp_path / "hf", model_config("qwen3", hidden_size=256, intermediate_size=512))
    path = as_gguf(folder, tmp_path / "model.gguf", dtype)
    kinds = {info.dtype for info in GGUFFile(path).infos.values()}
    assert kinds == {"F32", dtype.upper()} | ({"Q8_0"} if dtype.startswith("q4") else set())
    ids = random_ids()
    ours, theirs = logits_of(load_model(path), ids), llama_cpp_logits(path, ids)
    assert (ours - theirs).std() < 0.05 * ours.std()
    if dtype.startswith("q4"):
        assert (ours - theirs).std() < 0.2 * (ours - logits_of(load_model(folder), ids)).std()


def test_llama_cpp_reads_the_tokenizer(folders: dict[str, Path], tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="the oracle is llama-cpp-python, which is not installed")
    path = as_gguf(folders["llama"], tmp_path / "model.gguf")
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    text = "def f(x):\n    return x + 12  # 丹炉 it's"
    assert model.tokenize(text.encode(), add_bos=False) == tokenizer().encode(text)
    assert model.token_eos() == tokenizer().eos_id


# ---- names


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_names_are_those_of_gguf_py(arch: str) -> None:
    gguf = pytest.importorskip("gguf", reason="the oracle is gguf-py, which is not installed")
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, 8)
    tables = [architecture_of(arch, n_experts) for n_experts in (0, 8)]
    for ours, source in (line for table in tables if table is not None for line in table.tensors.items()):
        theirs = source if isinstance(source, str) else source.theirs
        if isinstance(source, Stacked):
            theirs = theirs.replace(".{e}", "")
        assert names.get_name(theirs.replace("{i}", "7"), try_suffixes=(".weight", ".bias")) == ours.replace("{i}", "7")


@given(heads=st.integers(1, 5), pairs=st.integers(1, 6), columns=st.integers(0, 3))
def test_rows_turn_back(heads: int, pairs: int, columns: int) -> None:
    rows = 2 * heads * pairs
    shape = (rows, columns) if columns else (rows,)
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    assert torch.equal(halves(neighbours(tensor, heads), heads), tensor)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_shortest_is_the_same_number(value: float) -> None:
    assert struct.pack("<f", shortest(value)) == struct.pack("<f", value)


def test_shortest_is_short() -> None:
    for value in (1e-5, 1e-6, 0.1, 500000.0, 1.5625e-07):
        assert shortest(struct.unpack("<f", struct.pack("<f", value))[0]) == value


@given(
    factor=st.sampled_from([2.0, 8.0, 32.0]),
    low=st.floats(0.5, 2.0),
    width=st.floats(1.0, 8.0),
    original=st.sampled_from([2048, 8192]),
    base=st.sampled_from([1e4, 5e5]),
)
def test_the_dividers_of_llama3_tell_its_parameters(
    factor: float, low: float, width: float, original: int, base: float
) -> None:
    turned = 128
    turns = [original / (2 * math.pi) * base ** (-2 * i / turned) for i in range(turned // 2)]
    dividers = llama3_dividers(turns, factor, low, low + width)
    dividers = torch.tensor(dividers).tolist()  # as fp32
    found = llama3_scaling(dividers, base, turned)
    assert found is not None
    other = [found["original_max_position_embeddings"] / original * turn for turn in turns]
    again = llama3_dividers(other, found["factor"], found["low_freq_factor"], found["high_freq_factor"])
    assert all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(again, dividers, strict=True))


def test_other_dividers_are_none_of_llama3s() -> None:
    assert llama3_scaling([1.0, 3.0, 2.0, 5.0, 8.0, 8.0, 1.0, 8.0], 1e4, 16) is None


def test_the_dividers_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(hidden_size=128, num_attention_heads=2, rope_parameters=LLAMA3)
    plain = 500.0 ** (-torch.arange(0, 64, 2) / 64)
    expected = plain / ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    turns = (64 / (2 * math.pi) * plain).tolist()
    assert torch.allclose(torch.tensor(llama3_dividers(turns, 8.0, 1.0, 4.0)), expected, rtol=1e-5)


# ---- what cannot be honoured


@pytest.fixture(scope="module")
def small(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> GGUFFile:
    return GGUFFile(as_gguf(folders["llama"], tmp_path_factory.mktemp("gguf") / "small.gguf"))


def rewritten(file: GGUFFile, out: Path, drop: str = "", **changes: Any) -> Path:
    """The file with some metadata changed or left out; a tensor is given by its shape."""
    metadata = {key: value for key, value in file.metadata.items() if key != drop}
    tensors = [
        GGUFTensor(name, info.dtype, info.shape, lambda name=name: file.packed(name))
        for name, info in file.infos.items()
        if name != drop
    ]
    for key, value in changes.items():
        if isinstance(value, tuple):
            tensors = [tensor for tensor in tensors if tensor.name != key]
            tensors.append(GGUFTensor(key, "F32", value, lambda value=value: torch.full(value, 0.5)))
        else:
            metadata[key] = value
    write_gguf(out, metadata, tensors)
    return out


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "mamba", "'mamba'; danlu opens llama, qwen2"),
        ("general.type", "adapter", "of the type 'adapter', not a model"),
        ("llama.expert_gating_func", 2, "llama.expert_gating_func is 2, which is not supported"),
        ("llama.attention.causal", False, "llama.attention.causal is False"),
        ("llama.attention.scale", 0.5, "llama.attention.scale is 0.5"),
        ("llama.attention.sliding_window", 8, "llama.attention.sliding_window: not known"),
        ("llama.logit_scale", 8.0, "llama.logit_scale: not known"),
        ("llama.attention.value_length", 8, "llama.attention.value_length is 8"),
        ("llama.attention.head_count_kv", [1, 2], "differs from layer to layer"),
        ("llama.attention.head_count", 0, "expected a whole number from 1"),
        ("llama.attention.head_count", "four", "expected a whole number"),
        ("llama.attention.head_count", 7, "heads"),
        ("llama.block_count", 2**31, "expected a whole number from 1 to 10000"),
        ("llama.block_count", 1, "holds blk.1."),
        ("llama.block_count", 3, "lacks"),
        ("llama.rope.freq_base", math.nan, "llama.rope.freq_base is nan"),
        ("llama.rope.scaling.type", "longrope", "llama.rope.scaling.type is 'longrope'"),
        ("llama.rope.scaling.attn_factor", 2.0, "llama.rope.scaling.attn_factor is 2"),
        ("llama.embedding_length", 128, "has shape"),
        ("llama.expert_count", 8, "expert_used_count is missing"),
        ("rope_freqs.weight", (8,), "scales the positions in another way"),
        ("rope_freqs.weight", (7,), "must hold 8 numbers"),
        ("blk.0.attn_q.scale", (1,), "holds blk.0.attn_q.scale"),
        ("blk.0.ffn_gate.weight", (64, 96), "has shape"),
        ("blk.0.ffn_norm.weight", (64, 1), "has shape"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    small: GGUFFile, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    with pytest.raises(DanluError, match=message):
        load_model(rewritten(small, tmp_path / "model.gguf", **{key: value}))


@pytest.mark.parametrize(
    "drop", ["general.architecture", "llama.block_count", "llama.attention.layer_norm_rms_epsilon", "token_embd.weight"]
)
def test_what_is_missing_is_named(small: GGUFFile, tmp_path: Path, drop: str) -> None:
    with pytest.raises(DanluError, match=drop):
        load_model(rewritten(small, tmp_path / "model.gguf", drop))


def test_what_says_nothing_is_passed_over(small: GGUFFile, tmp_path: Path) -> None:
    path = rewritten(
        small, tmp_path / "model.gguf", "llama.attention.key_length",
        **{"llama.expert_count": 0, "llama.logit_scale": 0.0, "general.tags": ["a"], "llama.rope.scaling.type": "none"},
    )  # fmt: skip
    assert torch.equal(load_model(path).embed.weight, load_model(small.path).embed.weight)


def test_longrope_is_read_from_its_tensors(folders: dict[str, Path], tmp_path: Path) -> None:
    file = GGUFFile(as_gguf(folders["phi3"], tmp_path / "phi3.gguf"))
    factors = {f"rope_factors_{length}.weight": (8,) for length in ("long", "short")}
    more = {"phi3.rope.scaling.original_context_length": 16, "phi3.rope.scaling.attn_factor": 1.25}
    rope = load_model(rewritten(file, tmp_path / "long.gguf", **factors, **more)).config.rope
    assert rope is not None
    assert rope.scaling == RopeScaling(
        "longrope", 4.0, 16, attention_factor=1.25, short_factors=(0.5,) * 8, long_factors=(0.5,) * 8
    )
    with pytest.raises(DanluError, match="must hold 8 numbers"):
        load_model(rewritten(file, tmp_path / "half.gguf", **{"rope_factors_long.weight": (8,)}))


@given(st.dictionaries(
    st.sampled_from([
        "llama.block_count", "llama.attention.head_count", "llama.rope.freq_base", "llama.expert_count",
        "llama.rope.scaling.type", "llama.rope.scaling.factor", "llama.rope.dimension_count", "general.architecture",
        "llama.attention.sliding_window", "tokenizer.ggml.eos_token_id", "llama.attention.layer_norm_rms_epsilon",
    ]),
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**64), st.floats(), st.text(max_size=5),
              st.lists(st.integers(0, 9), max_size=3)),
    min_size=1,
))  # fmt: skip
def test_any_metadata_is_a_config_or_a_message(small: GGUFFile, changes: dict[str, Any]) -> None:
    metadata = {**small.metadata, **changes}
    file = SimpleNamespace(
        path=small.path, metadata=metadata, infos=small.infos, tensor=small.tensor, packed=small.packed
    )
    try:
        weights, content = from_gguf(file)  # type: ignore[arg-type]
    except DanluError:
        return
    json.dumps(content)
    assert "model.embed_tokens.weight" in weights.infos


def test_generate_runs_a_gguf_file_and_a_folder_that_holds_one(small: GGUFFile, tmp_path: Path) -> None:
    shutil.copy(small.path, tmp_path / "model.gguf")
    answers = [
        generate(GenerateConfig(model=path, prompt="def f", temperature=0, max_new_tokens=8, precision="fp32"))
        for path in (small.path, tmp_path, tmp_path / "model.gguf")
    ]
    assert answers[0] == answers[1] == answers[2] != [""]
