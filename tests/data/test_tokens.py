"""Tokens of a data folder: complete, cached, resumed after a kill, mended after damage."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from danlu.data import tokens
from danlu.data.folder import DataFolder, Document, ShardWriter
from danlu.data.tokens import TokenFile, tokenize
from danlu.errors import DanluError
from danlu.formats.card import Stage
from danlu.tokenizer.config import TokenizerConfig
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.tokenizer.train import train_on

CHAT = {"messages": [{"role": "user", "content": "<|im_end|>?"}, {"role": "assistant", "content": "no"}]}
TEXTS = [f"document {i}: 中文 <|endoftext|> " + "word " * (i % 50) for i in range(400)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_on([Path(tokens.__file__).read_text()], 400)


def make_data(path: Path, texts: list[str], chats: int = 0, shard_bytes: int = 10_000) -> DataFolder:
    stage = Stage.open(path, kind="data", verb="data build", config=TokenizerConfig(path, path))
    with ShardWriter(path, "train", shard_bytes) as writer:
        for i, text in enumerate(texts):
            writer.write(Document(str(i), text))
        for i in range(chats):
            writer.write(Document(f"chat {i}", json.dumps(CHAT), kind="chat", path="chats.jsonl"))
    stage.finish()
    return DataFolder(path)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DANLU_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def data(tmp_path: Path) -> DataFolder:
    folder = make_data(tmp_path / "data", TEXTS, chats=3)
    assert len(folder.shards("train")) > 3
    return folder


def check(found: TokenFile, tokenizer: Tokenizer) -> None:
    """The token file holds exactly the documents, in order."""
    assert len(found) == len(TEXTS) + 3
    assert found.n_tokens == len(found.ids) == found.offsets[-1]
    for i, text in enumerate(TEXTS):
        assert found.document(i).tolist() == [tokenizer.bos_id, *tokenizer.encode(text)]
        assert found.n_bytes[i] == len(text.encode())
    for i in range(len(TEXTS), len(found)):
        assert found.document(i).tolist() == [tokenizer.bos_id, *tokenizer.encode_chat(CHAT["messages"])]
        assert found.n_bytes[i] == len(tokenizer.render_chat(CHAT["messages"]).encode())
    assert (np.asarray(found.ids) == tokenizer.bos_id).sum() == len(found), "<|endoftext|> in a text is text"


def test_every_document_in_order(data: DataFolder, tokenizer: Tokenizer, home: Path) -> None:
    found = tokenize(data, "train", tokenizer)
    check(found, tokenizer)
    assert isinstance(found.ids, np.memmap)
    assert (found.ids.dtype, found.offsets.dtype, found.n_bytes.dtype) == (np.uint16, np.int64, np.int64)
    assert found.path.parent == home / "tokens"
    assert {p.name for p in found.path.iterdir()} == {"ids.npy", "offsets.npy", "n_bytes.npy", "index.json"}


def test_a_large_vocabulary_takes_four_bytes(tokenizer: Tokenizer, data: DataFolder) -> None:
    definition = json.loads(json.dumps(tokenizer._definition))
    definition["model"]["vocab"] |= {f"\u0100filler{i}": i for i in range(400, 66_000)}
    large = Tokenizer(definition, tokenizer._config)
    found = tokenize(data, "train", large)
    assert found.ids.dtype == np.uint32
    check(found, large)


def test_the_second_time_nothing_is_tokenised(
    data: DataFolder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize(data, "train", tokenizer)
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda *_: pytest.fail("tokenised again"))
    check(tokenize(data, "train", Tokenizer(tokenizer._definition, tokenizer._config)), tokenizer)


def test_the_cache_follows_contents_and_tokenizer(data: DataFolder, tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = tokenize(data, "train", tokenizer).path
    same_contents = make_data(tmp_path / "copy", TEXTS, chats=3)
    assert tokenize(same_contents, "train", tokenizer).path == first
    assert tokenize(make_data(tmp_path / "other", TEXTS[1:]), "train", tokenizer).path != first
    other = Tokenizer(tokenizer._definition, {**tokenizer._config, "chat_template": "{{ messages[0].content }}"})
    assert tokenize(data, "train", other).path != first


@pytest.mark.parametrize("name", ["ids.npy", "offsets.npy", "n_bytes.npy", "index.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "empty"])
def test_a_damaged_cache_is_made_again(data: DataFolder, tokenizer: Tokenizer, name: str, damage: str) -> None:
    path = tokenize(data, "train", tokenizer).path / name
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) * 2 // 3])
    elif damage == "flip":
        content[len(content) * 2 // 3] ^= 1
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    check(tokenize(data, "train", tokenizer), tokenizer)


SLOW = """
import sys, time
from danlu.data.folder import DataFolder
from danlu.data.tokens import tokenize
from danlu.tokenizer.tokenizer import Tokenizer
encode_batch = Tokenizer.encode_batch
def slow(self, texts):
    print("batch", flush=True)
    time.sleep(0.2)
    return encode_batch(self, texts)
Tokenizer.encode_batch = slow
tokenize(DataFolder(sys.argv[1]), "train", Tokenizer.load(sys.argv[2]))
"""


def test_a_kill_loses_one_shard_at_most(data: DataFolder, tokenizer: Tokenizer, home: Path, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tok")
    n_shards = len(data.shards("train"))
    command = [sys.executable, "-c", SLOW, str(data.path), str(tmp_path / "tok")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "DANLU_HOME": str(home)})
    assert process.stdout is not None
    for _ in range(3):  # the third batch has begun, so two shards are done
        assert process.stdout.readline()
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = sorted(home.rglob("part-*.npz"))
    assert len(kept) == 2
    kept[1].write_bytes(kept[1].read_bytes()[:-100])  # and the machine lost the end of one

    encoded: list[int] = []
    counting = Tokenizer.load(tmp_path / "tok")
    encode_batch = counting.encode_batch
    counting.encode_batch = lambda texts: encoded.append(len(texts)) or encode_batch(texts)  # type: ignore[func-returns-value, method-assign]
    check(tokenize(data, "train", counting), tokenizer)
    assert len(encoded) == n_shards - 1
    assert not list(home.rglob("part-*"))


def test_what_is_told(data: DataFolder, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DanluError, match="has no split 'heldout'"):
        tokenize(data, "heldout", tokenizer)
    with pytest.raises(DanluError, match="has no split 'train'"):
        tokenize(make_data(tmp_path / "empty", []), "train", tokenizer)
    without = Tokenizer(tokenizer._definition, {**tokenizer._config, "chat_template": "{{ raise_exception('no') }}"})
    with pytest.raises(DanluError, match=r"chats\.jsonl \(chat 0\): chat template: cannot render"):
        tokenize(data, "train", without)


def test_a_cache_that_cannot_be_written(
    data: DataFolder, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DANLU_HOME", str(tmp_path / "file"))
    with pytest.raises(DanluError):
        tokenize(data, "train", tokenizer)


def test_memory_is_bounded_by_a_shard(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Peak Python memory while tokenising many shards is that of one, not of all."""
    import tracemalloc

    texts = ["word " * 2000] * 50  # 500 KB
    peaks = []
    for name, shard_bytes in (("one", 1 << 30), ("many", 50_000)):
        folder = make_data(tmp_path / name, texts, shard_bytes=shard_bytes)
        tracemalloc.start()
        tokenize(folder, "train", tokenizer)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] / 4
