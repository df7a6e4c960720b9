"""hf: sources against a hub on this machine: what is fetched, kept, taken up again, and refused."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub

from danlu.formats.card import Card

Result = tuple[int, str, str]
Pull = Callable[..., Result]

NOWHERE = "http://127.0.0.1:9"  # the discard port: nobody listens

MODEL = {
    "config.json": b'{"model_type": "qwen3"}',
    "model.safetensors": os.urandom(300_000),
    "pytorch_model.bin": b"a pickle",
    "tokenizer.json": b"{}",
    "onnx/model.onnx": b"onnx",
    "modeling_x.py": b"code",
    ".gitattributes": b"x",
    "README.md": b"# model",
}
FETCHED = {"config.json", "model.safetensors", "tokenizer.json", "onnx/model.onnx", "README.md"}


def pulled(result: Result) -> Path:
    code, out, err = result
    assert code == 0, err
    return Path(out)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_weights_and_words_are_fetched_and_pickles_and_code_are_not(hub: FakeHub, pull_command: Pull) -> None:
    hub.add("org/model", MODEL)
    folder = pulled(pull_command("hf:org/model"))
    assert names(folder) == FETCHED
    assert all((folder / name).read_bytes() == MODEL[name] for name in FETCHED)
    assert not hub.downloads("pytorch_model.bin")


def test_a_data_set(hub: FakeHub, pull_command: Pull, tmp_path: Path) -> None:
    hub.add("org/data", {"data/train-00000.parquet": b"PAR1", "run.py": b"code", "README.md": b"x"}, kind="datasets")
    folder = pulled(pull_command("hf:datasets/org/data", "--out", str(tmp_path / "data")))
    assert names(folder) == {"data/train-00000.parquet", "README.md", "danlu.json"}
    assert Card.load(folder).kind == "data"


def test_a_moved_branch_fetches_only_what_changed(hub: FakeHub, pull_command: Pull) -> None:
    hub.add("org/model", MODEL)
    first = pulled(pull_command("hf:org/model"))
    hub.add("org/model", {**MODEL, "config.json": b'{"model_type": "llama"}'})
    hub.requests.clear()
    second = pulled(pull_command("hf:org/model"))
    assert second != first
    assert (first / "config.json").read_bytes() != (second / "config.json").read_bytes()
    assert not hub.downloads("model.safetensors")


def test_a_pinned_commit_needs_no_hub_the_second_time(hub: FakeHub, pull_command: Pull) -> None:
    commit = hub.add("org/model", MODEL)
    hub.add("org/model", {**MODEL, "config.json": b"{}"})
    first = pulled(pull_command(f"hf:org/model@{commit}"))
    assert (first / "config.json").read_bytes() == MODEL["config.json"]
    hub.requests.clear()
    assert pulled(pull_command("hf:org/model", "--revision", commit, endpoint=NOWHERE)) == first
    assert not hub.requests


def test_a_branch_falls_back_to_the_cache_when_the_hub_is_away(hub: FakeHub, pull_command: Pull) -> None:
    hub.add("org/model", MODEL)
    first = pulled(pull_command("hf:org/model"))
    for how in ({"endpoint": NOWHERE}, {"offline": True}):
        code, out, err = pull_command("hf:org/model", **how)
        assert (code, Path(out)) == (0, first)
        assert "warning: hf:org/model: " in err
        assert "fetched earlier" in err


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"endpoint": NOWHERE}, "the hub cannot be reached"),
        ({"offline": True}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_an_unreachable_hub_is_told(pull_command: Pull, home: Path, how: dict[str, Any], told: str) -> None:
    code, out, err = pull_command("hf:org/model", **how)
    assert (code, out) == (2, "")
    assert f"error: hf:org/model: {told}" in err
    assert "Traceback" not in err
    assert not list((home / "refs").iterdir())


@pytest.mark.parametrize(
    ("refusal", "told"),
    [
        ((404, "RepoNotFound"), "no such repository"),
        ((401, "RepoNotFound"), "no such repository"),
        ((403, "GatedRepo"), "is gated; accept its terms"),
        ((404, "RevisionNotFound"), "has no revision"),
        ((418, ""), "the hub refused"),
    ],
)
def test_a_refusal_is_told(hub: FakeHub, pull_command: Pull, refusal: tuple[int, str], told: str) -> None:
    hub.refused["models/org/model"] = refusal
    code, _, err = pull_command("hf:org/model", "--revision", "v9")
    assert code == 2
    assert told in err
    assert "Traceback" not in err


def test_a_repository_of_pickles_is_refused(hub: FakeHub, pull_command: Pull, home: Path) -> None:
    hub.add("org/old", {"pytorch_model.bin": b"pickle", "README.md": b"x", "LICENSE": b"x"})
    code, _, err = pull_command("hf:org/old")
    assert code == 2
    assert "holds nothing danlu reads (it holds pytorch_model.bin" in err
    assert not hub.downloads("pytorch_model.bin")


@pytest.mark.parametrize("name", ["../evil.json", "/tmp/evil.json", "a\\..\\evil.json"])
def test_a_name_that_points_out_of_the_folder_is_refused(
    hub: FakeHub, pull_command: Pull, tmp_path: Path, name: str
) -> None:
    hub.add("org/model", {**MODEL, name: b"{}"})
    code, _, err = pull_command("hf:org/model")
    assert code == 2
    assert "is not a safe file name" in err
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_content_that_is_not_what_the_hub_lists_is_refused(
    hub: FakeHub, pull_command: Pull, home: Path, name: str
) -> None:
    """Large files are listed with SHA-256, small ones with git's hash; the hub's library compares sizes only."""
    hub.add("org/model", MODEL)
    hub.damage.add(name)
    code, _, err = pull_command("hf:org/model")
    assert code == 2
    assert "damaged on the way" in err
    assert not list((home / "refs").iterdir())
    hub.damage.clear()
    folder = pulled(pull_command("hf:org/model"))
    assert (folder / name).read_bytes() == MODEL[name]


@pytest.mark.parametrize("harm", ["change", "truncate", "remove"])
def test_harm_to_the_cache_is_noticed_and_mended(hub: FakeHub, pull_command: Pull, home: Path, harm: str) -> None:
    commit = hub.add("org/model", MODEL)
    folder = pulled(pull_command(f"hf:org/model@{commit}"))
    blob = home / "blobs" / hashlib.sha256(MODEL["model.safetensors"]).hexdigest()
    if harm == "remove":
        blob.unlink()
    else:
        content = bytearray(blob.read_bytes())
        content[1000] ^= 1
        blob.chmod(0o644)
        blob.write_bytes(content if harm == "change" else content[:1000])
    hub.requests.clear()
    assert pulled(pull_command(f"hf:org/model@{commit}")) == folder
    assert (folder / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
    assert hub.downloads("model.safetensors")
    assert not hub.downloads("tokenizer.json")


def test_a_killed_pull_keeps_the_files_it_had(
    hub: FakeHub, pull_process: Callable[..., subprocess.Popen[str]], pull_command: Pull, home: Path
) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": os.urandom(200_000) for i in (1, 2)}
    hub.add("org/model", {**MODEL, **shards})
    hub.stall_after["model-00002-of-00002.safetensors"] = 100_000
    process = pull_process("hf:org/model")
    assert hub.stalled.wait(60)
    while not list((home / "partial").glob("*/model-00001-of-00002.safetensors")):
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list((home / "refs").iterdir())
    hub.released.set()
    hub.requests.clear()
    folder = pulled(pull_command("hf:org/model"))
    assert all((folder / name).read_bytes() == content for name, content in shards.items())
    assert hub.downloads("model-00002-of-00002.safetensors")
    assert not hub.downloads("model-00001-of-00002.safetensors")
    assert not list((home / "partial").iterdir())


def test_pulls_at_the_same_time_share_one_download(
    hub: FakeHub, pull_process: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    commit = hub.add("org/model", MODEL)
    processes = [pull_process(f"hf:org/model@{commit}", "--out", str(tmp_path / f"out{i}")) for i in range(3)]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert (Path(out.strip()) / "model.safetensors").read_bytes() == MODEL["model.safetensors"]
    assert len(hub.downloads("model.safetensors")) == 1


def test_an_output_folder_has_its_own_files_and_a_card(hub: FakeHub, pull_command: Pull, tmp_path: Path) -> None:
    commit = hub.add("org/model", MODEL)
    out = tmp_path / "model"
    assert pulled(pull_command("hf:org/model", "--out", str(out))) == out
    card = Card.load(out)
    assert (card.kind, card.verb, card.details["source"], card.details["revision"]) == (
        "model",
        "pull",
        "hf:org/model",
        commit,
    )
    assert card.details["sha256"] == {name: hashlib.sha256(MODEL[name]).hexdigest() for name in FETCHED}
    assert card.inputs[0].path == "hf:org/model"
    # Editing the folder never touches the cache.
    (out / "config.json").write_bytes(b"edited")
    cache = pulled(pull_command("hf:org/model"))
    assert (cache / "config.json").read_bytes() == MODEL["config.json"]
    # A file the user has edited is not taken for the original, and not thrown away unasked.
    code, _, err = pull_command("hf:org/model", "--out", str(out))
    assert code == 2
    assert "config.json: is missing or was changed" in err
    (out / "config.json").write_bytes(MODEL["config.json"])
    # The same again is done already; the moved branch is another result.
    assert "already holds this" in pull_command("hf:org/model", "--out", str(out))[2]
    hub.add("org/model", {**MODEL, "config.json": b"{}"})
    code, _, err = pull_command("hf:org/model", "--out", str(out))
    assert code == 2
    assert "holds another run" in err
    pulled(pull_command("hf:org/model", "--out", str(out), "--overwrite"))
    assert json.loads((out / "config.json").read_bytes()) == {}


def test_the_fake_hub_is_not_needed_for_the_import(tmp_path: Path) -> None:
    """The hub's library is imported when hf: is used, not for the other sources."""
    program = "import sys; from danlu.hub import pull; assert 'huggingface_hub' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
