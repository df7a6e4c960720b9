"""Models that somebody else made: files that lie, templates that never end or reach for Python. Whoever asks for one is
told; all others go on."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from bystander import Bystander, wait_until_idle
from server_process import ServerProcess, serving

from danlu.server.models import resident_bytes

MEMORY = 1 << 30
"""Bytes that no process of the server may take: torch alone is a quarter of it."""

client = httpx.Client(trust_env=False, timeout=120)

TEMPLATES = {
    "endless-loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "endless-macro": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "endless-text": "{% for i in range(99999) %}{{ 'x' * 100000 }}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "memory": "{{ 'x' * 10 ** 12 }}",
    "doubling": "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "import": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "format": "{{ '{0.__class__}'.format(messages) }}",
    "attr": "{{ messages | attr('__class__') }}",
}
"""Each is refused when it is rendered, or writes nothing of what it reaches for."""


def text(content: str) -> bytes:
    return struct.pack("<Q", len(content)) + content.encode()


def tensor(*dims: int, offset: int = 0) -> bytes:
    return text("token_embd.weight") + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, 0, offset)


def gguf(n_tensors: int, n_metadata: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_metadata) + rest


FILES = {
    "dimension-2^42": gguf(1, 0, tensor(2**42, 2**21) + bytes(64)),
    "no-model": gguf(0, 0),
}
"""As GGUF files; each costs a process here, and tests/formats has those that the reader refuses."""


class Opened:
    """Pickled, it would run a command when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return subprocess.call, (["touch", str(self.mark)],)


class MemoryWatch:
    """The most that the server's processes held."""

    def __init__(self, pid: int) -> None:
        self.pid, self.most = pid, 0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> int:
        self._ending.set()
        self._thread.join()
        return self.most

    def _watch(self) -> None:
        while not self._ending.wait(0.05):
            self.most = max(self.most, *map(resident_bytes, [self.pid, *self._children()]))

    def _children(self) -> Iterator[int]:
        for status in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended
                if int(status.read_text().rpartition(")")[2].split()[1]) == self.pid:
                    yield int(status.parent.name)


@pytest.fixture(scope="module")
def folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them; one model has all templates, of which the first message chooses one."""
    root = tmp_path_factory.mktemp("hostile-models")
    template = "".join(
        f"{{% if messages[0].content == '{name}' %}}{text}{{% endif %}}" for name, text in TEMPLATES.items()
    )
    made = root / "templates"
    shutil.copytree(model_folder, made)
    config = json.loads((made / "tokenizer_config.json").read_text())
    (made / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template + "hello"}))
    (made / "chat_template.jinja").unlink(missing_ok=True)
    for name, content in FILES.items():
        (root / f"{name}.gguf").write_bytes(content)
    pickled = root / "pickled"
    shutil.copytree(model_folder, pickled)
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Opened(root / "opened")))
    return root


@pytest.fixture(scope="module")
def server(model_folder: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    paths = [path for path in sorted(folder.iterdir()) if path.name != "opened"]
    models = [f"--model={path.name.removesuffix('.gguf')}={path}" for path in paths]
    data = tmp_path_factory.mktemp("hostile-models-data")
    with serving(f"--model=tiny={model_folder}", *models, "--kv-memory=16", data=data) as found:
        yield found


def test_each_is_refused_while_others_go_on(server: ServerProcess, folder: Path) -> None:
    bystander, watch = Bystander(server.url), MemoryWatch(server.process.pid)
    told: dict[str, tuple[int, str]] = {}
    for name in (*TEMPLATES, *FILES, "pickled"):
        body = {
            "model": "templates" if name in TEMPLATES else name,
            "messages": [{"role": "user", "content": name}],
            "max_tokens": 4,
        }
        begun = time.monotonic()
        response = client.post(f"{server.url}/v1/chat/completions", json=body)
        assert time.monotonic() - begun < 60, name
        if response.status_code == 200:
            del body["max_tokens"]
            ids = client.post(f"{server.url}/tokenize", json=body).json()["tokens"]
            asked = {"model": "templates", "tokens": ids}
            told[name] = 200, client.post(f"{server.url}/detokenize", json=asked).json()["prompt"]
        else:
            told[name] = response.status_code, response.json()["error"]["message"]
    bystander.end()
    assert {told[name][0] for name in (*FILES, "pickled")} == {503}, told
    templates = {name: told[name] for name in TEMPLATES}
    assert {status for status, _ in templates.values()} <= {200, 400}
    assert {text for status, text in templates.values() if status == 200} <= {"hello"}, templates
    assert not any(word in text for _, text in told.values() for word in ("Traceback", "root:", "uid="))
    assert not (folder / "opened").exists()
    assert not bystander.harmed
    assert bystander.whole > 0
    assert watch.end() < MEMORY
    wait_until_idle(server.url)


def test_a_first_model_that_cannot_be_loaded_ends_the_server_with_a_word(folder: Path, tmp_path: Path) -> None:
    server = ServerProcess(f"--model=bad={folder / 'dimension-2^42.gguf'}", data=tmp_path)
    assert server.process.wait(60) == 2
    time.sleep(0.2)
    assert "dimension-2^42.gguf" in server.log
    assert "Traceback" not in server.log
