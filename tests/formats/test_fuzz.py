"""Damaged and hostile weights: always read cleanly or refused with a DanluError, fast and in little memory."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import fuzz_child
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from danlu.errors import DanluError
from danlu.formats.gguf_file import GGUFFile
from danlu.formats.gguf_write import GGUFTensor, Typed, write_gguf
from danlu.formats.safetensors_files import save_safetensors
from danlu.formats.weights import SINGLE_FILE


def gguf_tensor(name: str, kind: str, *shape: int) -> GGUFTensor:
    return GGUFTensor(name, kind, shape, lambda: torch.ones(shape))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file, a safetensors file and a folder of shards that have a little of everything."""
    folder = tmp_path_factory.mktemp("fuzz")
    metadata = {
        "general.architecture": "llama",
        "general.alignment": 8,
        "llama.block_count": 2,
        "llama.attention.head_count": Typed("UINT32", [2, 1]),
        "f": 0.5,
        "b": [True, False],
        "d": Typed("FLOAT64", 1.0),
        "i": Typed("INT64", [-1, 1]),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "", "é"],
    }
    tensors = [gguf_tensor("a", "F32", 2, 3), gguf_tensor("q", "Q4_1", 32), gguf_tensor("h", "F16", 1)]
    write_gguf(folder / "whole.gguf", metadata, tensors)
    data = min(place.begin for place in GGUFFile(folder / "whole.gguf")._places.values())
    (folder / "gguf_header").write_text(str(data))
    small = {"a": torch.ones(2, 3), "b": torch.ones(3, dtype=torch.float16), "c": torch.tensor(1)}
    save_safetensors(folder, small)
    (folder / SINGLE_FILE).rename(folder / "whole.safetensors")
    save_safetensors(folder / "sharded", small, max_shard_bytes=8)
    return folder


def test_thousands_of_mutants_in_little_memory_and_time(whole: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, fuzz_child.__file__, str(whole)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["failure"] is None, told["failure"]
    assert told["refused"] > 5_000
    assert told["read"] > 100  # some changes change no more than a name
    assert told["slowest"] < 1


def survives(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with contextlib.suppress(DanluError):
        fuzz_child.read_all(path)


edits = st.lists(
    st.tuples(
        st.floats(0, 1), st.sampled_from(["flip", "insert", "delete", "repeat"]), st.binary(min_size=1, max_size=9)
    ),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("name", ["whole.gguf", "whole.safetensors"])
@settings(max_examples=100, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=edits)
def test_random_edits(whole: Path, tmp_path: Path, name: str, edits: list[tuple[float, str, bytes]]) -> None:
    content = bytearray((whole / name).read_bytes())
    for where, what, piece in edits:
        at = int(where * len(content))
        if what == "flip":
            content[at : at + len(piece)] = bytes(a ^ b for a, b in zip(content[at:], piece, strict=False))
        elif what == "insert":
            content[at:at] = piece
        elif what == "delete":
            del content[at : at + len(piece)]
        else:
            content[at:at] = content[at : at + 40]
    survives(tmp_path / f"mutant{Path(name).suffix}", bytes(content))


@settings(max_examples=100, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200), suffix=st.sampled_from([".gguf", ".safetensors"]), magic=st.booleans())
def test_random_bytes(tmp_path: Path, content: bytes, suffix: str, magic: bool) -> None:
    start = b"GGUF\3\0\0\0" if suffix == ".gguf" else len(content).to_bytes(8, "little")
    survives(tmp_path / f"random{suffix}", start * magic + content)


@pytest.mark.parametrize("name", ["x.gguf", "x.safetensors"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(DanluError, match="is not a file"):
        fuzz_child.read_all(tmp_path / name)
