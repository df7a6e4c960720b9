"""Documents come back from a data folder as they went in, and damage is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.config import load
from danlu.data import folder as folders
from danlu.data.folder import DataFolder, Document, ShardWriter
from danlu.errors import DanluError
from danlu.formats.card import Stage
from danlu.tokenizer.config import TokenizerConfig


@dataclass(frozen=True)
class NoConfig:
    """A verb without options."""


def make(out: Path, documents: list[Document], shard_bytes: int = 1 << 20) -> DataFolder:
    stage = Stage.open(out, kind="data", verb="test", config=NoConfig())
    with ShardWriter(out, "train", shard_bytes) as writer:
        for document in documents:
            writer.write(document)
    stage.finish()
    return DataFolder(out)


texts = st.text(st.characters(exclude_categories=["Cs"]))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(texts, st.dictionaries(texts, texts, max_size=2)), max_size=8))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, dict[str, str]]]) -> None:
    documents = [Document(str(i), text, "s", "p", meta=meta) for i, (text, meta) in enumerate(rows)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)  # slow, and not what is tested
        data = make(tmp_path_factory.mktemp("data") / "out", documents, shard_bytes=10)
    assert data.splits() == (["train"] if documents else [])
    if documents:
        assert list(data.documents("train")) == documents


def test_row_groups_and_shards_keep_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "ROW_GROUP_BYTES", 50)
    documents = [Document(str(i), f"document number {i}") for i in range(40)]
    data = make(tmp_path / "out", documents, shard_bytes=200)
    assert len(data.shards("train")) > 2
    assert list(data.documents("train")) == documents


def test_an_error_while_writing_leaves_no_shard(tmp_path: Path) -> None:
    def fail() -> None:
        with ShardWriter(tmp_path, "train") as writer:
            writer.write(Document("1", "x" * (9 << 20)))  # more than a row group: the shard is open
            assert list(tmp_path.iterdir())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_missing_shard_and_missing_split_are_told(tmp_path: Path) -> None:
    data = make(tmp_path / "out", [Document("1", "text")])
    with pytest.raises(DanluError, match="no split 'heldout'; it holds train"):
        list(data.documents("heldout"))
    data.shards("train")[0].unlink()
    with pytest.raises(DanluError, match=r"train-00000\.parquet: is missing"):
        DataFolder(tmp_path / "out")


def test_damaged_shard_is_told(tmp_path: Path) -> None:
    data = make(tmp_path / "out", [Document("1", "text")])
    shard = data.shards("train")[0]
    shard.write_bytes(b"x" * shard.stat().st_size)
    with pytest.raises(DanluError, match=r"train-00000\.parquet: cannot be read"):
        list(DataFolder(tmp_path / "out").documents("train"))


def test_a_folder_of_another_kind_is_told(tmp_path: Path) -> None:
    Stage.open(tmp_path / "m", kind="model", verb="test", config=NoConfig()).finish()
    with pytest.raises(DanluError, match="is a model folder"):
        DataFolder(tmp_path / "m")


def test_it_stands_for_its_path_in_the_config_of_the_next_verb(tmp_path: Path) -> None:
    make(tmp_path / "data", [Document("a", "text")])
    config = load(TokenizerConfig, values={"data": DataFolder(tmp_path / "data"), "out": tmp_path / "tokenizer"})
    assert config.data == tmp_path / "data"
