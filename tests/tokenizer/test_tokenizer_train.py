"""`danlu tokenizer train`: the folder it makes, that it is the same every time, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from danlu.data.folder import DataFolder, Document, ShardWriter
from danlu.errors import DanluError, Problems
from danlu.formats.card import Card, Stage
from danlu.tokenizer.config import TokenizerConfig
from danlu.tokenizer.special import SPECIAL_TOKENS
from danlu.tokenizer.tokenizer import Tokenizer
from danlu.tokenizer.train import bytes_per_token, train_on, train_tokenizer


def make_data(path: Path, heldout: bool = True) -> Path:
    """The sources of one package as a data folder, with a chat among them."""
    import email

    config = TokenizerConfig(data=path, out=path)  # any config does: it only names the run
    stage = Stage.open(path, kind="data", verb="data build", config=config)
    sources = sorted(Path(email.__file__).parent.glob("*.py"))
    chat = json.dumps(
        {"messages": [{"role": "user", "content": "zyxwvut " * 500}, {"role": "assistant", "content": "ok"}]}
    )
    n_bytes = {"train": 0, "heldout": 0}
    for split, files in (("train", sources[1:]), ("heldout", sources[:1] if heldout else [])):
        with ShardWriter(path, split) as writer:
            for file in files:
                writer.write(Document(file.name, file.read_text(), path=file.name))
            if split == "train":
                writer.write(Document("chat", chat, kind="chat"))
        n_bytes[split] = writer.n_bytes
    stage.finish({"train_bytes": n_bytes["train"], "heldout_bytes": n_bytes["heldout"]})
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def test_the_folder_and_its_card(data: Path, tmp_path: Path) -> None:
    out = train_tokenizer(TokenizerConfig(data=data, out=tmp_path / "tok", vocab_size=1000))
    tokenizer = Tokenizer.load(out)
    card = Card.load(out)
    assert card.kind == "tokenizer"
    assert card.inputs[0].fingerprint == DataFolder(data).fingerprint
    assert card.metrics["vocab_size"] == tokenizer.vocab_size == 1000
    texts = [d.text for d in DataFolder(data).documents("heldout")]
    assert card.metrics["bytes_per_token_heldout"] == pytest.approx(
        sum(len(t.encode()) for t in texts) / sum(len(tokenizer.encode(t)) for t in texts)
    )
    assert 2 < card.metrics["bytes_per_token_heldout"] < card.metrics["bytes_per_token"] * 1.2
    assert card.details["special_tokens"] == list(SPECIAL_TOKENS)
    longest = card.details["longest_tokens"]
    texts = (tokenizer.decode([i]) for i in range(len(SPECIAL_TOKENS), tokenizer.vocab_size))
    assert len(longest[0].encode()) == max(len(t.encode()) for t in texts if any(c.isalnum() for c in t))
    assert [tokenizer.id_of(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert len(tokenizer.encode("zyxwvut zyxwvut")) <= 3, "the text of chats is learnt from"
    assert tokenizer.encode('{"messages') != tokenizer.encode("{'messages"), "and not the JSON around it"

    before = (out / "tokenizer.json").stat().st_mtime_ns
    train_tokenizer(TokenizerConfig(data=data, out=out, vocab_size=1000))
    assert (out / "tokenizer.json").stat().st_mtime_ns == before, "a finished stage is not made again"
    with pytest.raises(DanluError, match="holds another run"):
        train_tokenizer(TokenizerConfig(data=data, out=out, vocab_size=900))
    train_tokenizer(TokenizerConfig(data=data, out=out, vocab_size=900, overwrite=True))
    assert Tokenizer.load(out).vocab_size == 900


def test_the_same_data_gives_the_same_files_in_any_process(data: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from danlu.tokenizer.config import TokenizerConfig;"
        "from danlu.tokenizer.train import train_tokenizer;"
        "train_tokenizer(TokenizerConfig(data=Path(sys.argv[1]), out=Path(sys.argv[2]), vocab_size=2000))"
    )
    made = []
    for seed, threads in (("1", "1"), ("2", "2"), ("3", "7")):
        out = tmp_path / seed
        env = {**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        subprocess.run([sys.executable, "-c", program, str(data), str(out)], check=True, env=env, capture_output=True)
        made.append((out / "tokenizer.json").read_bytes())
    assert made[0] == made[1] == made[2]


def test_a_vocabulary_larger_than_the_data_supports(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "tok"
    with pytest.raises(
        DanluError, match=r"60000 tokens are more than the data supports \(\d+ .*choose at most \d+"
    ) as told:
        train_tokenizer(TokenizerConfig(data=data, out=out, vocab_size=60000))
    assert not out.exists(), "nothing half-written"
    most = int(str(told.value).split("at most ")[1].split(",")[0])
    train_tokenizer(TokenizerConfig(data=data, out=out, vocab_size=most))  # the mend it names, into the same folder
    assert Tokenizer.load(out).vocab_size == most


def test_no_held_out_split(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", heldout=False)
    out = train_tokenizer(TokenizerConfig(data=data, out=tmp_path / "tok", vocab_size=600))
    assert Card.load(out).metrics["bytes_per_token_heldout"] is None


def test_a_sample_is_smaller_and_repeatable(data: Path, tmp_path: Path) -> None:
    options = {"data": data, "vocab_size": 400, "sample_bytes": 100_000}
    first = train_tokenizer(TokenizerConfig(out=tmp_path / "a", **options))
    second = train_tokenizer(TokenizerConfig(out=tmp_path / "b", **options))
    whole = train_tokenizer(TokenizerConfig(out=tmp_path / "c", data=data, vocab_size=400))
    a, b, c = ((f / "tokenizer.json").read_bytes() for f in (first, second, whole))
    assert a == b != c


def test_all_problems_of_a_config_at_once(tmp_path: Path) -> None:
    with pytest.raises(Problems) as told:
        train_tokenizer(TokenizerConfig(data=tmp_path, out=tmp_path, vocab_size=100, min_frequency=0))
    assert len(told.value.problems) == 2


def test_not_a_data_folder(tmp_path: Path) -> None:
    with pytest.raises(DanluError, match=r"has no danlu\.json"):
        train_tokenizer(TokenizerConfig(data=tmp_path, out=tmp_path / "out"))


def test_indentation_pays(data: Path) -> None:
    """Our own pattern takes a newline and the indentation together; source code gets longer tokens for it."""
    texts = [d.text for d in DataFolder(data).documents("train") if d.kind == "text"]
    own = bytes_per_token(train_on(texts, 2000, pre_tokens="danlu"), texts)
    assert own > 3.6
    assert own > 1.05 * bytes_per_token(train_on(texts, 2000), texts)
