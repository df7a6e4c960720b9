"""Safetensors: read without a copy, written as the library writes, in shards that never mix old and new."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from danlu.errors import DanluError
from danlu.formats.safetensors_files import SafetensorsWeights, save_safetensors
from danlu.formats.safetensors_header import TORCH_DTYPES, read_header
from danlu.formats.weights import INDEX_FILE, SINGLE_FILE, TensorInfo, open_weights

DTYPES = [getattr(torch, name) for name in TORCH_DTYPES.values()]


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layer.{i}.weight": torch.randn(16, 25, generator=generator) for i in range(7)}


def same(found: Tensor, expected: Tensor) -> bool:
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (found, expected)]
    return (found.dtype, found.shape) == (expected.dtype, expected.shape) and torch.equal(*as_bytes)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_round_trip_and_the_very_file_that_the_library_writes(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("round")
    names = data.draw(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=6, unique=True))
    tensors = {}
    for name in names:
        if name == "__metadata__":
            continue
        shape = data.draw(st.lists(st.integers(0, 5), max_size=4))
        dtype = data.draw(st.sampled_from(DTYPES))
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), dtype=torch.uint8)
        tensors[name] = raw.view(dtype).reshape(shape)
    save_safetensors(folder, tensors)
    save_file(tensors, folder / "library.safetensors", metadata={"format": "pt"})
    for path in (folder / SINGLE_FILE, folder / "library.safetensors"):
        ours, theirs = open_weights(path), load_file(path)
        assert set(ours.infos) == set(tensors) == set(theirs)
        assert all(same(ours.tensor(name), tensor) and same(theirs[name], tensor) for name, tensor in tensors.items())
    if not any(c >= "\x7f" or c < " " for name in names for c in name):  # the library spells these in another way
        assert (folder / SINGLE_FILE).read_bytes() == (folder / "library.safetensors").read_bytes()


def test_what_is_known_before_a_tensor_is_read(tmp_path: Path) -> None:
    tensors = {"b": torch.zeros(2, 3, dtype=torch.bfloat16), "a": torch.zeros(4), "i": torch.tensor(7)}
    save_safetensors(tmp_path, tensors)
    with safe_open(tmp_path / SINGLE_FILE, "pt") as library:
        assert library.metadata() == {"format": "pt"}
        assert list(open_weights(tmp_path).infos) == library.offset_keys()
    assert open_weights(tmp_path).infos["b"] == TensorInfo("b", "BF16", (2, 3), 12)
    with pytest.raises(DanluError, match="has no tensor 'c'"):
        open_weights(tmp_path).tensor("c")


def test_a_tensor_is_a_view_that_leaves_the_file_alone(tmp_path: Path) -> None:
    save_safetensors(tmp_path, {"a": torch.arange(1000.0), "b": torch.ones(3)})
    before = (tmp_path / SINGLE_FILE).read_bytes()
    weights = open_weights(tmp_path)
    first, again = weights.tensor("a"), weights.tensor("a")
    assert first.data_ptr() == again.data_ptr()
    del weights
    first[0] = 5  # this process's copy of the page
    assert again[0] == 5
    assert (tmp_path / SINGLE_FILE).read_bytes() == before
    assert open_weights(tmp_path).tensor("a")[0] == 0


def test_reading_takes_no_memory_before_it_is_used(tmp_path: Path) -> None:
    """A file of 200 GB (with nothing in it) opens, though no machine that tests this has as much."""
    n = 50 * 10**9
    header = json.dumps({"a": {"dtype": "F32", "shape": [n // 1000, 1000], "data_offsets": [0, 4 * n]}}).encode()
    header += b" " * (-len(header) % 8)
    with open(tmp_path / SINGLE_FILE, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * n)
    tensor = open_weights(tmp_path).tensor("a")
    assert tensor.shape == (n // 1000, 1000)
    assert tensor[-1, -1] == 0


def test_tensors_that_are_not_aligned_are_read_all_the_same(tmp_path: Path) -> None:
    """Files of writers that pad nothing."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (-len(header) % 8 + 3)
    content = torch.tensor([1.5, -2.0])
    raw = len(header).to_bytes(8, "little") + header + content.view(torch.uint8).numpy().tobytes()
    (tmp_path / SINGLE_FILE).write_bytes(raw)
    assert torch.equal(open_weights(tmp_path).tensor("a"), content)


def test_dtypes_that_torch_lacks_are_refused_by_name(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (tmp_path / SINGLE_FILE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    weights = open_weights(tmp_path)
    assert weights.infos["a"].n_bytes == 3
    with pytest.raises(DanluError, match="a is of type F6_E2M3"):
        weights.tensor("a")
    with pytest.raises(DanluError, match=r"sparse_coo; safetensors cannot hold it"):
        save_safetensors(tmp_path, {"a": torch.eye(3).to_sparse()})


def test_shards_are_cut_as_the_hub_cuts_them(tmp_path: Path) -> None:
    tensors = some_tensors()
    written = save_safetensors(tmp_path, tensors, max_shard_bytes=5000)
    expected = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=5000
    )
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["weight_map"] == expected.tensor_to_filename
    assert index["metadata"]["total_size"] == expected.metadata["total_size"] == 7 * 1600
    assert [path.name for path in written] == [*expected.filename_to_tensors, INDEX_FILE]
    weights = open_weights(tmp_path)
    assert list(weights.infos) == list(tensors)
    assert all(same(weights.tensor(name), tensor) for name, tensor in tensors.items())


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path: Path) -> None:
    save_safetensors(tmp_path, {"a": torch.zeros(4), "b": torch.zeros(400), "c": torch.zeros(4)}, max_shard_bytes=100)
    assert len(set(json.loads((tmp_path / INDEX_FILE).read_text())["weight_map"].values())) == 3


def test_files_of_another_layout_go(tmp_path: Path) -> None:
    tensors = some_tensors()
    (tmp_path / "adapter.safetensors").write_bytes(b"not ours")
    for n_shards, max_bytes in ((1, 10**6), (3, 5000), (7, 1), (7, 1), (3, 5000), (1, 10**6)):
        written = save_safetensors(tmp_path, tensors, max_shard_bytes=max_bytes)
        assert len(written) == (n_shards + 1 if n_shards > 1 else 1)
        assert sorted(tmp_path.iterdir()) == sorted([*written, tmp_path / "adapter.safetensors"])
        assert list(open_weights(tmp_path).infos) == list(tensors)


class Failing(Mapping[str, Tensor]):
    """Tensors of which the last cannot be had when it is to be written."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.asked = tensors, 0

    def __getitem__(self, name: str) -> Tensor:
        if name == list(self.tensors)[-1]:
            self.asked += 1
            if self.asked > 6:
                raise KeyboardInterrupt
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@pytest.mark.parametrize("before", [10**6, 5000, 1])
@pytest.mark.parametrize("after", [10**6, 5000, 1])
def test_an_interrupted_save_leaves_the_old_weights_or_none(tmp_path: Path, before: int, after: int) -> None:
    old = some_tensors()
    new = {name: tensor + 1 for name, tensor in old.items()}
    save_safetensors(tmp_path, old, max_shard_bytes=before)
    with pytest.raises(KeyboardInterrupt):
        save_safetensors(tmp_path, Failing(new), max_shard_bytes=after)
    if before == after < 10**6:
        with pytest.raises(DanluError, match=r"has no model\.safetensors"):
            open_weights(tmp_path)
    else:
        weights = open_weights(tmp_path)
        assert all(same(weights.tensor(name), tensor) for name, tensor in old.items())
    save_safetensors(tmp_path, new, max_shard_bytes=after)
    weights = open_weights(tmp_path)
    assert all(same(weights.tensor(name), tensor) for name, tensor in new.items())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_weights_can_be_saved_over_themselves(tmp_path: Path) -> None:
    save_safetensors(tmp_path, some_tensors())
    weights = open_weights(tmp_path)
    save_safetensors(tmp_path, {name: weights.tensor(name) for name in weights.infos}, max_shard_bytes=5000)
    assert all(same(open_weights(tmp_path).tensor(name), tensor) for name, tensor in some_tensors().items())


def test_saving_needs_room_for_one_tensor_only(tmp_path: Path) -> None:
    """Six transposed tensors of 32 MB each: their copies follow each other."""
    program = """
import resource, sys, torch
from danlu.formats.safetensors_files import save_safetensors
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
save_safetensors(sys.argv[1], {"a": torch.ones(100, 100).t()})
tensors = {str(i): torch.ones(2048, 4096).t() for i in range(6)}
before = peak()
save_safetensors(sys.argv[1], tensors, max_shard_bytes=10**8)
print(peak() - before)
"""
    told = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert int(told.stdout) < 50 * 2**20


def sharded(folder: Path) -> dict[str, str]:
    save_safetensors(folder, some_tensors(), max_shard_bytes=5000)
    return json.loads((folder / INDEX_FILE).read_text())["weight_map"]


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/model.safetensors",
        "..",
        ".",
        "",
        "a\\b.safetensors",
        "a\0.safetensors",
        "pytorch_model-00001-of-00002.bin",
        INDEX_FILE,
    ],
)
def test_shards_have_plain_names(tmp_path: Path, shard: str) -> None:
    placed = sharded(tmp_path / "model")
    save_safetensors(tmp_path, {"layer.0.weight": torch.zeros(1)})
    (tmp_path / SINGLE_FILE).rename(tmp_path / "secret.safetensors")
    placed["layer.0.weight"] = shard
    (tmp_path / "model" / INDEX_FILE).write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(DanluError, match="in the same folder"):
        open_weights(tmp_path / "model")


def test_links_out_of_the_folder_are_refused_except_into_its_cache(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots" / "source" / "digest"
    sharded(folder)
    shard = folder / "model-00002-of-00003.safetensors"
    for place in (tmp_path / "elsewhere", tmp_path / "blobs"):
        place.mkdir()
        shard.resolve().rename(place / "hash")
        shard.unlink(missing_ok=True)
        shard.symlink_to(place / "hash")
        if place.name == "blobs":
            assert len(open_weights(folder).infos) == 7
        else:
            with pytest.raises(DanluError, match="link out of the model folder"):
                open_weights(folder)
    shard.unlink()
    shard.symlink_to(shard)
    with pytest.raises(DanluError, match="is missing"):
        open_weights(folder)
    shard.unlink()
    shard.mkdir()
    with pytest.raises(DanluError, match="is not a file"):
        open_weights(folder)


def test_an_index_that_disagrees_with_its_shards(tmp_path: Path) -> None:
    placed = sharded(tmp_path)
    first, second = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"

    def open_with(weight_map: object) -> None:
        (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
        open_weights(tmp_path)

    open_with(placed)
    for wrong, told in (
        ({**placed, "more": first}, "places more in .*, which lacks it"),
        ({**placed, "layer.0.weight": second}, "does not place there"),
        ({name: shard for name, shard in placed.items() if name != "layer.1.weight"}, "does not place there"),
        ({**placed, "more": "model-00009-of-00003.safetensors"}, "is missing"),
        ({}, "weight_map"),
        ([], "weight_map"),
        ({"a": 3}, "weight_map"),
    ):
        with pytest.raises(DanluError, match=told):
            open_with(wrong)
    save_file({"layer.0.weight": torch.zeros(3), "layer.6.weight": torch.zeros(3)}, tmp_path / second)
    with pytest.raises(DanluError, match=r"model-00002.*also in model-00001|does not place there"):
        open_with({name: shard for name, shard in placed.items() if shard != second} | {"layer.6.weight": second})


@pytest.mark.parametrize("content", ["", "[]", "{", "null", '{"weight_map": null}', "[" * 10**5, '{"a":' * 10**5])
def test_an_index_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX_FILE).write_text(content)
    with pytest.raises(DanluError, match=INDEX_FILE):
        open_weights(tmp_path)


def test_an_index_of_absurd_size(tmp_path: Path) -> None:
    with open(tmp_path / INDEX_FILE, "wb") as file:
        file.truncate(10**12)
    with pytest.raises(DanluError, match="never larger"):
        open_weights(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(DanluError, match=r"pickle file, and unpickling runs .* convert it on a machine"):
            open_weights(path)


def test_places_without_weights(tmp_path: Path) -> None:
    with pytest.raises(DanluError, match="does not exist"):
        open_weights(tmp_path / "no")
    with pytest.raises(DanluError, match="holds no weights"):
        open_weights(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DanluError, match="is no weights file"):
        open_weights(tmp_path / "config.json")
    (tmp_path / SINGLE_FILE).touch()
    with pytest.raises(DanluError, match="no safetensors file or is cut short"):
        open_weights(tmp_path)
    (tmp_path / SINGLE_FILE).unlink()
    (tmp_path / SINGLE_FILE).mkdir()
    with pytest.raises(DanluError, match="is not a file"):
        open_weights(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "lora.safetensors").touch()
    with pytest.raises(DanluError, match=r"lora\.safetensors"):
        open_weights(tmp_path / "other")


def test_headers_that_contradict_themselves(tmp_path: Path) -> None:
    good = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    path = tmp_path / "x.safetensors"
    for header, told in (
        ({"a": {**good, "dtype": "F31"}}, "unknown dtype"),
        ({"a": {**good, "shape": [2]}}, "does not fill"),
        ({"a": {**good, "shape": [-1]}}, "impossible shape"),
        ({"a": {**good, "shape": [True]}}, "impossible shape"),
        ({"a": {**good, "data_offsets": [4, 8]}}, "leaves a gap"),
        ({"a": good, "b": good}, "overlaps"),
        ({"a": {**good, "more": 1}}, "must have dtype"),
        ({"a": {**good, "shape": [2**62, 2**62]}}, "does not fill"),
        ({"__metadata__": {"format": 1}}, "must map names to texts"),
        ({"a": {**good, "dtype": "F4", "data_offsets": [0, 0]}}, "does not fill"),
        (json.dumps({"a": good})[:-1] + "," + json.dumps({"a": good})[1:], "occurs twice"),
    ):
        raw = (header if isinstance(header, str) else json.dumps(header)).encode()
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
        with pytest.raises(DanluError, match=told):
            read_header(path)


def test_the_weights_protocol_is_met(tmp_path: Path) -> None:
    save_safetensors(tmp_path, some_tensors())
    weights = SafetensorsWeights(tmp_path / SINGLE_FILE)
    assert weights.path == tmp_path / SINGLE_FILE
    assert weights.infos == open_weights(tmp_path).infos
