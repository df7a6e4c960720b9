"""Files are whole or not there: under a killed writer, a full disk, and places that cannot be written."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu import files
from danlu.errors import DanluError

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(json_values)
def test_json_round_trip(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.mktemp("json") / "x.json"
    files.write_json(path, value)
    assert files.read_json(path) == value


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "weights.safetensors"
    files.write_text(target, "old")

    def fail_half_way() -> None:
        with files.atomic_path(target) as temporary:
            assert temporary.suffix == ".safetensors"
            assert temporary.parent == tmp_path
            temporary.write_text("half of the n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_written_file_has_ordinary_rights(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a", "x")
    (tmp_path / "b").write_text("x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


def test_a_killed_writer_never_leaves_half_a_file(tmp_path: Path) -> None:
    """SIGKILL at many moments of a process that rewrites one file: a reader always finds one whole version of it."""
    target = tmp_path / "state.bin"
    program = (
        "import sys; from danlu import files\n"
        "i = 0\n"
        "while True:\n"
        "    files.write_bytes(sys.argv[1], bytes([i % 256]) * 2_000_000); i += 1\n"
    )
    for attempt in range(6):
        writer = subprocess.Popen([sys.executable, "-c", program, str(target)])
        deadline = time.monotonic() + 20
        while not target.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.013 * attempt)
        writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        content = target.read_bytes()
        assert len(content) == 2_000_000
        assert len(set(content)) == 1


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Files may grow to 100 kB only; writing more fails as on a full disk, with an OSError in the middle of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_disk")
def test_running_out_of_room_is_told_and_keeps_the_last_good_file(tmp_path: Path) -> None:
    target = tmp_path / "model.bin"
    files.write_bytes(target, b"good")
    with pytest.raises(DanluError, match=r"model\.bin"):
        files.write_bytes(target, b"x" * 200_000)
    assert target.read_bytes() == b"good"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        Path("/dev/full").write_bytes(b"x")
    assert "the disk is full" in str(files.as_user_error(caught.value, tmp_path))


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    """Roots are not stopped by permissions, but by a file in the way and by /proc they are."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(DanluError, match="is a file, not a folder; choose another --out"):
        files.require_writable(tmp_path / "file")
    for folder in (tmp_path / "file" / "below", Path("/proc/danlu")):
        with pytest.raises(DanluError, match=str(folder)):
            files.require_writable(folder)
        with pytest.raises(DanluError, match=str(folder)):
            files.write_text(folder / "x.txt", "x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    with pytest.raises(DanluError, match="cannot be written"):
        files.require_writable(locked)


def test_room_is_asked_for_before_the_work(tmp_path: Path) -> None:
    files.require_space(tmp_path / "not" / "yet", 1, "nothing")
    with pytest.raises(DanluError, match=r"needs about .* TB and .* are free; make room"):
        files.require_space(tmp_path / "not" / "yet", 2**60, "a very large model")


@pytest.mark.parametrize(
    ("content", "told"),
    [(b'{"a": 1,\n "b": }', r"x\.json:2: is not valid JSON"), (b"\xff", "is not UTF-8 text"), (b"", r"x\.json:1")],
)
def test_broken_json_is_told_with_its_line(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DanluError, match=told):
        files.read_json(tmp_path / "x.json")


def test_a_missing_json_file(tmp_path: Path) -> None:
    with pytest.raises(DanluError, match="cannot be read"):
        files.read_json(tmp_path / "x.json")


def test_the_hash_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # the test vector of FIPS 180-4
    assert files.sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DANLU_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert files.cache_home() == tmp_path / ".cache" / "danlu"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_home() == tmp_path / "xdg" / "danlu"
    monkeypatch.setenv("DANLU_HOME", "~/mine")
    assert files.cache_home() == tmp_path / "mine"


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KB"), (2**20, "1.0 MB"), (2**50, "1024.0 TB")],
)
def test_sizes_for_people(n_bytes: int, text: str) -> None:
    assert files.human_bytes(n_bytes) == text
