"""What the package's build makes of the kernels, with compilers old and new."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from danlu.errors import DanluError
from danlu.kernels import build, native

SOURCE = Path(build.__file__).parent

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O0"))


def test_a_compiler_that_is_too_old_leaves_sets_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "old-c++"
    old.write_text(f'#!/bin/sh\ncase "$*" in *-mavx512*) exit 1;; esac\nexec {build.compiler()} "$@"\n')
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    target = tmp_path / "made"
    target.mkdir()
    (target / "_native_amx.so").write_text("of an earlier build")
    assert build.build(SOURCE, target) == [target / "_native_avx2.so"]
    assert [file.name for file in target.iterdir()] == ["_native_avx2.so"]


def test_a_compiler_that_knows_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(RuntimeError, match="broken-c\\+\\+ knows none of amx, avx512_bf16, avx512, avx2"):
        build.build(SOURCE, tmp_path / "made")
    assert not list((tmp_path / "made").iterdir())


@pytest.mark.skipif(shutil.which("nm") is None or shutil.which("objdump") is None, reason="there are no binutils")
def test_libraries_keep_their_instructions_to_themselves(tmp_path: Path) -> None:
    """They export nothing that another library could call, and what is called before the CPU is known is plain."""
    best = next(known for known in build.SETS if build._knows(known, tmp_path))
    made = build.build_one(SOURCE, tmp_path, best.library, best.flags, best.define)
    listed = subprocess.run(["nm", "-D", "--defined-only", made], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1] for line in listed.splitlines()}
    assert names == {"danlu_works", "danlu_open", "danlu_run", "danlu_close", "danlu_pack"}
    code = subprocess.run(
        ["objdump", "-d", "--disassemble=danlu_works", made], capture_output=True, text=True, check=True
    ).stdout
    assert "danlu_works" in code
    assert "mm" not in "".join(line.split("\t")[-1].partition(" ")[2] for line in code.splitlines() if "%" in line)


def test_a_library_by_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / "wrong.so"
    wrong.write_text("no library")
    monkeypatch.setenv(native.VARIABLE, str(wrong))
    with pytest.raises(DanluError, match="cannot be loaded"):
        native.choose()
    monkeypatch.setenv(native.VARIABLE, "sse2")
    with pytest.raises(DanluError, match="sse2: is no path that works here"):
        native.choose()
