"""GGUF written and read, each held against the `gguf` package, and a real model to the bit."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.errors import DanluError
from danlu.formats.gguf_blocks import BLOCKS, PackedTensor, dequantize, quantize
from danlu.formats.gguf_file import GGUFFile
from danlu.formats.gguf_types import VALUE_TYPES
from danlu.formats.gguf_write import GGUFTensor, Typed, write_gguf
from danlu.formats.weights import TensorInfo, open_weights


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def plain(name: str, tensor: torch.Tensor, kind: str = "F32") -> GGUFTensor:
    return GGUFTensor(name, kind, tuple(tensor.shape), lambda: tensor)


@pytest.mark.slow
def test_a_real_model_is_read_to_the_bit(smollm2: Path) -> None:
    ours, reference = GGUFFile(smollm2), gguf.GGUFReader(smollm2)
    assert ours.metadata == {
        key: field.contents() for key, field in reference.fields.items() if not key.startswith("GGUF.")
    }
    assert list(ours.infos) == [tensor.name for tensor in reference.tensors]
    for tensor in reference.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        assert ours.infos[tensor.name] == TensorInfo(tensor.name, tensor.tensor_type.name, shape, tensor.n_bytes)
        packed = ours.packed(tensor.name).data.numpy()
        np.testing.assert_array_equal(packed, tensor.data.view(np.uint8).reshape(packed.shape))
    for tensor in reference.tensors[1:20]:  # without the embedding, for which the reference takes long
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found = ours.tensor(tensor.name)
        np.testing.assert_array_equal(found.numpy().view(np.uint32), expected.view(np.uint32).reshape(found.shape))


scalars: dict[str, st.SearchStrategy[Any]] = {
    **{f"{sign}INT{n}": st.integers(*((0, 2**n - 1) if sign else (-(2 ** (n - 1)), 2 ** (n - 1) - 1)))
       for sign in ("", "U") for n in (8, 16, 32, 64)},
    "FLOAT32": st.floats(width=32, allow_nan=False),
    "FLOAT64": st.floats(allow_nan=False),
    "BOOL": st.booleans(),
    "STRING": st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
}  # fmt: skip
values = st.one_of(
    [
        st.one_of(inner, st.lists(inner, max_size=5)).map(lambda value, kind=kind: Typed(kind, value))
        for kind, inner in scalars.items()
    ]
)
keys = st.text(st.characters(codec="ascii", categories=["L", "N"], include_characters="._"), min_size=1, max_size=30)
shapes = st.lists(st.integers(1, 4), min_size=0, max_size=3)


@settings(max_examples=80, deadline=None)
@given(
    metadata=st.dictionaries(keys.filter(lambda key: not key.startswith(("general.", "split."))), values, max_size=6),
    names=st.lists(keys, max_size=5, unique=True),
    alignment=st.sampled_from([None, 8, 32, 256]),
    data=st.data(),
)
def test_what_is_written_is_what_both_readers_read(
    metadata: dict[str, Typed],
    names: list[str],
    alignment: int | None,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("round") / "model.gguf"
    tensors, content = [], {}
    for name in names:
        kind = data.draw(st.sampled_from(sorted(set(BLOCKS) - {"F32", "F16", "BF16"})))
        elements, n_bytes = BLOCKS[kind]
        outer = tuple(data.draw(shapes))
        raw = torch.randint(0, 256, (*outer, 2 * n_bytes), dtype=torch.uint8)
        packed = PackedTensor(kind, (*outer, 2 * elements), raw)
        tensors.append(GGUFTensor(name, kind, packed.shape, lambda packed=packed: packed))
        content[name] = packed
    more = {} if alignment is None else {"general.alignment": alignment}
    write_gguf(path, {**metadata, **more}, tensors)

    ours = GGUFFile(path)
    assert ours.metadata == {key: typed.value for key, typed in metadata.items()} | more
    assert list(ours.infos) == names
    for name, packed in content.items():
        found = ours.packed(name)
        assert (found.kind, found.shape) == (packed.kind, packed.shape)
        assert torch.equal(found.data, packed.data)

    if any(value.value == [] for value in metadata.values()):
        return  # the reference cannot spell an empty array
    reference = gguf.GGUFReader(path)
    for key, typed in metadata.items():
        types = [kind.name for kind in reference.fields[key].types]
        assert types == (["ARRAY", typed.kind] if isinstance(typed.value, list) else [typed.kind])
        assert reference.fields[key].contents() == typed.value
    for tensor, name in zip(reference.tensors, names, strict=True):
        assert (tensor.name, tensor.tensor_type.name) == (name, content[name].kind)
        assert tuple(reversed(tensor.shape.tolist())) == content[name].shape
        np.testing.assert_array_equal(tensor.data.view(np.uint8).ravel(), content[name].data.numpy().ravel())


def test_plain_values_have_the_types_that_llama_cpp_asks_for(path: Path) -> None:
    values = {
        "i": 7,
        "n": -7,
        "f": 0.5,
        "b": True,
        "s": "文",
        "ls": ["a", ""],
        "li": [1, -2],
        "lf": [1.5],
        "lb": [True],
    }
    write_gguf(path, values, [])
    fields = gguf.GGUFReader(path).fields
    assert {key: [kind.name for kind in fields[key].types] for key in values} == {
        "i": ["UINT32"],
        "n": ["INT32"],
        "f": ["FLOAT32"],
        "b": ["BOOL"],
        "s": ["STRING"],
        "ls": ["ARRAY", "STRING"],
        "li": ["ARRAY", "INT32"],
        "lf": ["ARRAY", "FLOAT32"],
        "lb": ["ARRAY", "BOOL"],
    }
    assert GGUFFile(path).metadata == values


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K"])
def test_tensors_are_packed_on_the_way(path: Path, kind: str) -> None:
    tensor = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(0))
    write_gguf(path, {}, [plain("a", tensor, kind), plain("b", torch.ones(256), kind)])
    weights = open_weights(path)
    found = weights.tensor("a")
    assert torch.equal(found.float(), dequantize(quantize(tensor, kind), kind, (3, 5, 256)))
    assert weights.infos["a"].dtype == kind
    assert torch.equal(weights.tensor("b").float(), dequantize(quantize(torch.ones(256), kind), kind, (256,)))
    assert [tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors] == [kind, kind]


def test_the_references_files_are_read(path: Path) -> None:
    """Two dtypes, arrays and an alignment of its own."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_array("tokenizer.ggml.tokens", ["a", "é", "丹"])
    writer.add_array("tokenizer.ggml.scores", [0.0, -1.5, 2.0])
    writer.add_array("tokenizer.ggml.token_type", [1, 2, -3])
    writer.add_bool("yes", True)
    writer.add_float64("precise", 1e-300)
    writer.add_uint64("large", 2**63)
    contents = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, np.float16), "i": np.arange(6)}
    for name, array in contents.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GGUFFile(path)
    assert found.version == 3
    assert found.metadata["tokenizer.ggml.tokens"] == ["a", "é", "丹"]
    assert found.metadata["tokenizer.ggml.scores"] == [0.0, -1.5, 2.0]
    assert found.metadata["tokenizer.ggml.token_type"] == [1, 2, -3]
    assert (found.metadata["yes"], found.metadata["precise"], found.metadata["large"]) == (True, 1e-300, 2**63)
    for name, array in contents.items():
        assert torch.equal(found.tensor(name), torch.from_numpy(array))


def test_a_tensor_is_a_view_that_leaves_the_file_alone(path: Path) -> None:
    write_gguf(path, {}, [plain("a", torch.arange(64.0))])
    before = path.read_bytes()
    weights = GGUFFile(path)
    first, packed = weights.tensor("a"), weights.packed("a")
    assert first.data_ptr() == packed.data.data_ptr()
    del weights
    first.zero_()
    assert not packed.data.any()
    assert path.read_bytes() == before


def test_a_large_vocabulary_is_read_at_once(path: Path) -> None:
    """150,000 tokens with scores, types and merges; a second is many times what an idle machine takes."""
    n = 150_000
    tokens, merges = [f"Ġtoken{i}" for i in range(n)], [f"Ġt oken{i}" for i in range(n)]
    metadata = {"tokens": tokens, "merges": merges, "scores": [0.5] * n, "types": [1] * n}
    write_gguf(path, metadata, [])
    start = time.process_time()
    found = GGUFFile(path)
    assert time.process_time() - start < 1
    assert found.metadata == metadata


def test_types_that_are_not_supported_can_be_listed_and_packed_but_not_read(path: Path) -> None:
    packed = PackedTensor("IQ2_XXS", (2, 256), torch.zeros(2, 66, dtype=torch.uint8))
    write_gguf(path, {}, [GGUFTensor("a", "IQ2_XXS", (2, 256), lambda: packed)])
    weights = open_weights(path)
    assert weights.infos["a"] == TensorInfo("a", "IQ2_XXS", (2, 256), 132)
    with pytest.raises(DanluError, match="a: IQ2_XXS is not supported"):
        weights.tensor("a")
    with pytest.raises(DanluError, match="has no tensor 'b'"):
        weights.tensor("b")


def test_what_cannot_be_written_leaves_no_file(path: Path) -> None:
    row = torch.zeros(32)

    def wrong() -> torch.Tensor:
        return torch.zeros(2, 32)

    for metadata, tensors, told in (
        ({"k": 2**32}, [], "k cannot be written"),
        ({"k": Typed("UINT8", 256)}, [], "k cannot be written"),
        ({"k": Typed("UINT8", True)}, [], "k cannot be written"),
        ({"k": []}, [], "name the type of an empty one"),
        ({"k": [1, "a"]}, [], "elements of one type"),
        ({"k": None}, [], "k cannot be written"),
        ({"k": [[1]]}, [], "k cannot be written"),
        ({"k": "\ud800"}, [], "k cannot be written"),
        ({"k": Typed("UINT33", 1)}, [], "no type of GGUF"),
        ({"general.alignment": 24}, [], "power of two"),
        ({}, [plain("a", row), plain("a", row)], "same name"),
        ({}, [plain("a", torch.tensor(1.0))], "1 to 4 dimensions"),
        ({}, [plain("a", torch.zeros(0))], "1 to 4 dimensions"),
        ({}, [plain("a", torch.zeros(1, 1, 1, 1, 1))], "1 to 4 dimensions"),
        ({}, [plain("a", torch.zeros(33), "Q4_0")], "row of 33"),
        ({}, [plain("a", row, "Q4_9")], "no type of GGUF"),
        ({}, [plain("a", row, "Q6_K")], "row of 32"),
        ({}, [plain("a", torch.zeros(256), "Q6_K")], "cannot write Q6_K"),
        ({}, [GGUFTensor("a", "F32", (32,), wrong)], "was announced"),
        ({}, [plain("a", torch.full((32,), torch.nan), "Q8_0")], "a: holds NaN"),
    ):
        with pytest.raises(DanluError, match=told):
            write_gguf(path, metadata, tensors)
        assert not list(path.parent.iterdir())


def test_writing_needs_room_for_one_tensor_only(path: Path) -> None:
    """Eight tensors of 32 MB that are made when their turn comes."""
    program = """
import resource, sys, torch
from danlu.formats.gguf_write import GGUFTensor, write_gguf
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def tensor(name): return GGUFTensor(name, "Q8_0", (2048, 4096), lambda: torch.ones(2048, 4096))
write_gguf(sys.argv[1], {}, [GGUFTensor("a", "Q8_0", (32, 32), lambda: torch.ones(32, 32))])
before = peak()
write_gguf(sys.argv[1], {}, [tensor(str(i)) for i in range(8)])
print(peak() - before)
"""
    told = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert int(told.stdout) < 70 * 2**20


def header(version: int = 3, n_tensors: int = 0, n_metadata: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_metadata)


def text(content: str) -> bytes:
    return struct.pack("<Q", len(content.encode())) + content.encode()


def entry(key: str, kind: str, value: bytes) -> bytes:
    number = next(number for number, (name, _) in VALUE_TYPES.items() if name == kind)
    return text(key) + struct.pack("<I", number) + value


def info(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b"GG", "no GGUF file"),
        (b"GGML" + bytes(40), "no GGUF file"),
        (b"PK\x03\x04" + bytes(40), "no GGUF file"),
        (b"GGUF", "ends within version"),
        (header(version=1), "GGUF version 1; .*anew"),
        (header(version=4), "GGUF version 4; danlu reads 2 and 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header(n_tensors=2**62), "ends within 4611686018427387904 tensors"),
        (header(n_metadata=2**64 - 1), "metadata entries"),
        (header(n_metadata=1) + entry("k", "STRING", struct.pack("<Q", 2**63)), "ends within k"),
        (header(n_metadata=1) + entry("k", "STRING", struct.pack("<Q", 2) + b"\xff\xfe"), "not UTF-8"),
        (header(n_metadata=1) + entry("k", "ARRAY", struct.pack("<IQ", 8, 2**61)), "elements of k"),
        (header(n_metadata=1) + entry("k", "ARRAY", struct.pack("<IQ", 9, 1)) + bytes(40), "array of arrays"),
        (header(n_metadata=1) + entry("k", "ARRAY", struct.pack("<IQ", 99, 1)) + bytes(40), "value type 99"),
        (header(n_metadata=1) + text("k") + struct.pack("<II", 13, 1), "value type 13"),
        (header(n_metadata=1) + entry("k", "BOOL", b"\x02"), "neither 0 nor 1"),
        (header(n_metadata=1) + entry("k", "ARRAY", struct.pack("<IQ", 0, 2**22 + 1)) + bytes(2**22 + 1), "elements;"),
        (header(n_metadata=2) + entry("k", "BOOL", b"\1") * 2, "metadata 'k' twice"),
        (header(n_metadata=1) + entry("general.alignment", "UINT32", struct.pack("<I", 24)), "power of two"),
        (header(n_metadata=1) + entry("general.alignment", "UINT32", struct.pack("<I", 2**31)), "power of two"),
        (header(n_metadata=1) + entry("general.alignment", "FLOAT32", struct.pack("<f", 32)), "power of two"),
        (header(n_metadata=1) + entry("split.count", "UINT16", struct.pack("<H", 3)), "one of 3 parts"),
        (header(n_tensors=1) + info("a", (), 0, 0) + bytes(64), "has 0 dimensions"),
        (header(n_tensors=1) + info("a", (1, 1, 1, 1, 1), 0, 0), "has 5 dimensions"),
        (header(n_tensors=1) + info("a", (0,), 0, 0), "dimension of 0"),
        (header(n_tensors=1) + info("a", (2**62, 2**62), 0, 0), "promises"),
        (header(n_tensors=1) + info("a", (33,), 2, 0) + bytes(64), "rows of 33"),
        (header(n_tensors=1) + info("a", (32,), 4, 0), "type 4, which GGUF does not have"),
        (header(n_tensors=1) + info("a", (1,), 0, 4) + bytes(64), "multiple of the alignment"),
        (header(n_tensors=1) + info("a", (1,), 0, 2**63) + bytes(64), "promises"),
        (header(n_tensors=2) + info("a", (1,), 0, 0) + info("a", (1,), 0, 32) + bytes(99), "tensor 'a' twice"),
        (header(n_tensors=2) + info("a", (9,), 0, 0) + info("b", (1,), 0, 32) + bytes(99), "b overlaps"),
        (header(n_tensors=2) + info("a", (1,), 0, 0) + info("b", (1,), 0, 0) + bytes(99), "overlaps"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_and_hostile_files_are_told(path: Path, content: bytes, told: str) -> None:
    path.write_bytes(content)
    with pytest.raises(DanluError, match=told) as caught:
        GGUFFile(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_version_2_and_unpadded_ends_are_fine(path: Path) -> None:
    """The data of the last tensor need not be padded."""
    start = header(version=2, n_tensors=1) + info("a", (2,), 0, 0)
    path.write_bytes(start + bytes(-len(start) % 32) + struct.pack("<2f", 1, 2))
    assert GGUFFile(path).tensor("a").tolist() == [1, 2]


def test_folders_with_gguf_files(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", {}, [plain("x", torch.ones(2))])
    assert open_weights(tmp_path).path == tmp_path / "a.gguf"
    write_gguf(tmp_path / "b.gguf", {}, [])
    with pytest.raises(DanluError, match="holds 2 GGUF files"):
        open_weights(tmp_path)


def test_every_kind_the_reference_reads_is_known() -> None:
    assert {kind.name for kind in GGMLQuantizationType} == set(BLOCKS)
