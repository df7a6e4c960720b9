"""Files are written whole or not at all, and checked for room and rights before work starts."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from danlu.errors import DanluError


@contextlib.contextmanager
def atomic_path(path: str | Path, mode: int | None = None) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on leaving without an error it is fsynced and renamed over ``path``.

    The temporary name keeps the suffix of ``path``, since some writers choose the format by it.

    Args:
        mode: rights of the file, such as 0o600, which it has from the first byte on; None: what the umask allows.

    Raises:
        DanluError: the disk is full or the folder cannot be written; ``path`` is left as it was.
    """
    target = Path(path)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        suffix = f".tmp{target.suffix}"
        handle, name = tempfile.mkstemp(prefix=f".{target.stem[:60]}.", suffix=suffix, dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o666 & ~_umask() if mode is None else mode)
        fsync_file(temporary)
        os.replace(temporary, target)
        fsync_folder(target.parent)
    except OSError as error:
        raise as_user_error(error, target) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes, mode: int | None = None) -> None:
    """Write a whole file atomically."""
    with atomic_path(path, mode) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, content: str, mode: int | None = None) -> None:
    """Write a whole UTF-8 file atomically."""
    write_bytes(path, content.encode("utf-8"), mode)


def write_json(path: str | Path, content: Any, mode: int | None = None) -> None:
    """Write readable JSON atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n", mode)


def read_json(path: str | Path) -> Any:
    """Read JSON; what is wrong with the file is told with its name and line."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DanluError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DanluError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise DanluError(f"{path}:{error.lineno}: is not valid JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # numbers or nesting beyond what Python's parser takes
        raise DanluError(f"{path}: is not valid JSON ({error})") from error


def read_json_object(path: str | Path) -> dict[str, Any]:
    """The same, of a file that must hold an object."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise DanluError(f"{path}: must hold a JSON object")
    return content


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_file(path: str | Path) -> None:
    """Make the content of a file survive a power cut."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def fsync_folder(folder: str | Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_writable(folder: str | Path) -> Path:
    """Make sure that a folder exists (made if need be) and can be written; return it."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except FileExistsError as error:
        raise DanluError(f"{path}: is a file, not a folder; choose another --out") from error
    except OSError as error:
        raise as_user_error(error, path) from error
    return path


def require_space(folder: str | Path, n_bytes: int, purpose: str) -> None:
    """Refuse early when the disk that holds ``folder`` has less than ``n_bytes`` free."""
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    if free < n_bytes:
        raise DanluError(
            f"{folder}: {purpose} needs about {human_bytes(n_bytes)} and {human_bytes(free)} are free; "
            "make room or choose another --out"
        )


def as_user_error(error: OSError, path: str | Path) -> DanluError:
    """An OSError in words a user can act on."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DanluError(f"{path}: the disk is full; nothing was left half-written. Make room and run it again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return DanluError(f"{path}: cannot be written ({error.strerror}); choose another folder or mend its rights")
    return DanluError(f"{path}: {error.strerror or error}")


def cache_home() -> Path:
    """The folder for what can be fetched or made again: ``$DANLU_HOME``, else ``danlu`` in the user's cache folder."""
    if home := os.environ.get("DANLU_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "danlu"


def human_bytes(n_bytes: float) -> str:
    """1536 -> '1.5 KB' (powers of 1024)."""
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if abs(n_bytes) < 1024 or unit == "TB":
            return f"{n_bytes:.0f} {unit}" if unit == "bytes" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    raise AssertionError("unreachable")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
