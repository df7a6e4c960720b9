"""`danlu convert`: round trips, types, what is refused, and the real SmolLM2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import MODELS, VOCAB_SIZE, model_config, save_reference, tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from danlu.config import Problems
from danlu.errors import DanluError
from danlu.formats.card import Card
from danlu.formats.gguf_file import GGUFFile
from danlu.models.convert import convert
from danlu.models.convert_config import ConvertConfig
from danlu.models.gguf_export import kind_for
from danlu.models.load import load_model
from danlu.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reference(tmp_path_factory.mktemp("models") / "tiny-llama", model_config("llama"))


def run(source: Path, out: Path, **options: Any) -> Path:
    return convert(ConvertConfig(source=source, out=out, **options))


def weights_in(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def changed(
    folder: Path, out: Path, drop: tuple[str, ...] = (), more: dict[str, Tensor] | None = None, **fields: Any
) -> Path:
    """A copy of a model folder with other fields in `config.json` or other tensors."""
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    content = json.loads((folder / "config.json").read_text()) | fields
    (out / "config.json").write_text(json.dumps(content))
    tensors = {name: t for name, t in weights_in(folder).items() if name not in drop} | (more or {})
    save_file(tensors, out / "model.safetensors")
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_comes_back_from_gguf(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit; but Gemma's norms, stored plus one, lose what is below an ulp of one in fp32."""
    folder = save_reference(tmp_path / "hf", model_config(name), dtype)
    again = run(run(folder, tmp_path / "m.gguf"), tmp_path / "again")
    ours, theirs = weights_in(again), weights_in(folder)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        if "gemma" in name and "norm" in key:
            assert (tensor - theirs[key].float()).abs().max() <= 2**-23
        else:
            assert torch.equal(tensor, theirs[key].to(tensor.dtype)), key
    model, info = AutoModelForCausalLM.from_pretrained(again, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(20, 44)[None]
    with torch.no_grad():
        assert (model(ids).logits - load_model(folder)(ids)).abs().max() < 1e-3
    theirs_tokenizer = AutoTokenizer.from_pretrained(again)
    assert theirs_tokenizer.encode("def f(x):", add_special_tokens=False) == tokenizer().encode("def f(x):")
    assert Card.load(again).metrics["tensors"] == len(ours)


def test_folders_are_cast_and_cut_in_shards(folder: Path, tmp_path: Path) -> None:
    cut = run(folder, tmp_path / "cut", dtype="bf16", shard_size=3e-5)
    assert len(list(cut.glob("model-*.safetensors"))) > 2
    ours = weights_in(cut)
    assert {t.dtype for t in ours.values()} == {torch.bfloat16}
    whole = weights_in(folder)
    assert all(torch.equal(ours[name], t.bfloat16()) for name, t in whole.items())
    assert json.loads((cut / "config.json").read_text())["dtype"] == "bfloat16"
    assert Tokenizer.load(cut).fingerprint == Tokenizer.load(folder).fingerprint
    back = run(cut, tmp_path / "back", dtype="f32")
    assert [path.name for path in back.glob("*.safetensors")] == ["model.safetensors"]
    assert all(torch.equal(t, whole[name].bfloat16().float()) for name, t in weights_in(back).items())


def test_gguf_is_requantized(folder: Path, tmp_path: Path) -> None:
    source = GGUFFile(run(folder, tmp_path / "f32.gguf"))
    q8 = GGUFFile(run(source.path, tmp_path / "q8.gguf", dtype="q8_0"))
    direct = GGUFFile(run(folder, tmp_path / "direct.gguf", dtype="q8_0"))
    for name, info in direct.infos.items():
        assert q8.infos[name] == info
        assert torch.equal(q8.packed(name).data, direct.packed(name).data)
    assert q8.metadata == direct.metadata | {"general.name": source.metadata["general.name"]}
    copy = run(q8.path, tmp_path / "copy.gguf")
    assert copy.read_bytes() == q8.path.read_bytes()


def test_rows_that_are_no_whole_blocks_are_told(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = run(folder, tmp_path / "q4k.gguf", dtype="q4_k")
    assert "written as Q8_0" in capfd.readouterr().err
    assert {info.dtype for info in GGUFFile(path).infos.values()} == {"F32", "Q8_0"}


def test_types_of_tensors() -> None:
    cases = [
        ("blk.0.attn_q.weight", (64, 256), "Q4_K", "Q4_K"),
        ("blk.0.attn_q.weight", (64, 288), "Q4_K", "Q8_0"),
        ("blk.0.attn_q.weight", (64, 48), "Q4_K", "F16"),
        ("blk.0.attn_q.weight", (64, 48), "Q4_0", "F16"),
        ("blk.0.attn_norm.weight", (256,), "Q4_K", "F32"),
        ("blk.0.ffn_gate_inp.weight", (4, 256), "Q8_0", "F32"),
        ("token_embd.weight", (100, 256), "Q4_1", "Q8_0"),
        ("output.weight", (100, 256), "Q4_K", "Q8_0"),
        ("output.weight", (100, 256), "F16", "F16"),
    ]
    for name, shape, wanted, expected in cases:
        fallbacks: dict[str, str] = {}
        assert kind_for(name, shape, wanted, fallbacks) == expected
        assert bool(fallbacks) == (shape[-1] in (288, 48))


def test_a_vocabulary_smaller_than_the_embedding_is_padded(tmp_path: Path) -> None:
    folder = save_reference(tmp_path / "hf", model_config("llama", vocab_size=VOCAB_SIZE + 5))
    file = GGUFFile(run(folder, tmp_path / "m.gguf"))
    assert file.metadata["tokenizer.ggml.tokens"][-5:] == [f"[PAD{VOCAB_SIZE + i}]" for i in range(5)]
    assert file.metadata["tokenizer.ggml.token_type"][-5:] == [5] * 5
    assert load_model(file.path).config.vocab_size == VOCAB_SIZE + 5
    smaller = save_reference(tmp_path / "smaller", model_config("llama", vocab_size=VOCAB_SIZE - 1))
    with pytest.raises(DanluError, match="vocab_size is 319, and the tokenizer has 1 more"):
        run(smaller, tmp_path / "smaller.gguf")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "activation is 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope.scaling.type"),
        ({"model_type": "mistral", "sliding_window": 8, "attention_bias": None, "mlp_bias": None}, "window is 8"),
        ({"model_type": "bloom"}, "bloom"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2."),
        ({"num_hidden_layers": 1}, "holds model.layers.1."),
        ({"intermediate_size": 128}, "has shape"),
        ({"secret_gate": 0.5}, "secret_gate: not known"),
    ],
)  # fmt: skip
def test_what_gguf_cannot_say_is_refused_by_name(
    folder: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(DanluError, match=message):
        run(changed(folder, tmp_path / "hf", **fields), tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf"))


def test_tensors_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(DanluError, match=f"lacks {name}"):
        run(changed(folder, tmp_path / "a", drop=(name,)), tmp_path / "m.gguf")
    with pytest.raises(DanluError, match=r"holds score\.weight"):
        run(changed(folder, tmp_path / "b", more={"score.weight": torch.zeros(2, 64)}), tmp_path / "m.gguf")
    other = {"lm_head.weight": torch.zeros(VOCAB_SIZE, 64)}
    with pytest.raises(DanluError, match=r"lm_head\.weight is not model\.embed_tokens\.weight"):
        run(changed(folder, tmp_path / "c", more=other), tmp_path / "m.gguf")
    large = {name: torch.full((64, 64), 1e6)}
    for out in ("m.gguf", "out"):
        with pytest.raises(DanluError, match=r"1e\+06, which is beyond"):
            run(changed(folder, tmp_path / f"d{out}", more=large), tmp_path / out, dtype="f16")
    assert not (tmp_path / "m.gguf").exists()
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_outputs_are_not_overwritten_unasked(folder: Path, tmp_path: Path) -> None:
    out = run(folder, tmp_path / "m.gguf")
    before = out.read_bytes()
    with pytest.raises(DanluError, match="exists already"):
        run(folder, out, dtype="f16")
    assert out.read_bytes() == before
    assert run(folder, out, dtype="f16", overwrite=True).stat().st_size < len(before)
    with pytest.raises(DanluError, match="is the source itself"):
        run(out, out, overwrite=True)
    (tmp_path / "d.gguf").mkdir()
    with pytest.raises(DanluError, match="is a folder"):
        run(folder, tmp_path / "d.gguf")

    hf = run(out, tmp_path / "hf")
    card = (hf / "danlu.json").read_bytes()
    assert run(out, tmp_path / "hf") == hf  # the same again: nothing to do
    assert (hf / "danlu.json").read_bytes() == card
    with pytest.raises(DanluError, match="holds another run"):
        run(out, tmp_path / "hf", dtype="bf16")


def test_sources_that_are_no_models_are_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    Card("data", "data build", "0", {}).save(tmp_path / "data")
    with pytest.raises(DanluError, match="is a data folder"):
        run(tmp_path / "data", tmp_path / "m.gguf")
    bare = changed(folder, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(DanluError, match="tokenizer"):
        run(bare, tmp_path / "m.gguf")


@pytest.mark.slow
def test_memory_is_that_of_a_tensor_and_not_of_the_model(tmp_path: Path) -> None:
    """Anonymous memory: pages of the mapped files are the system's to take back."""
    config = model_config("llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=4)
    folder = save_reference(tmp_path / "hf", config)
    size = (folder / "model.safetensors").stat().st_size
    script = """
import sys, threading, time
from pathlib import Path
from danlu.models.convert import convert
from danlu.models.convert_config import ConvertConfig
anonymous = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024
convert(ConvertConfig(source=Path(sys.argv[1]), out=Path(sys.argv[2]) / "warm.gguf", dtype="q8_0"))
start, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
convert(ConvertConfig(source=Path(sys.argv[1]), out=Path(sys.argv[2]) / "m.gguf", dtype="q4_0"))
convert(ConvertConfig(source=Path(sys.argv[2]) / "m.gguf", out=Path(sys.argv[2]) / "again", dtype="f32"))
done = True
thread.join()
print(peak - start)
"""
    command = [sys.executable, "-c", script, str(folder), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout.split()[-1]) < size / 2


def test_impossible_options_are_told() -> None:
    for options, message in (
        ({"out": Path("x"), "to": "gguf"}, "must end in .gguf"),
        ({"out": Path("x.gguf"), "to": "hf"}, "is the name of a GGUF file"),
        ({"out": Path("x"), "dtype": "q4_0"}, "exists in GGUF files only"),
    ):
        with pytest.raises(Problems, match=message):
            convert(ConvertConfig(source=Path("y"), **options))  # type: ignore[arg-type]
