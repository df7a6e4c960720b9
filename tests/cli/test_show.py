"""danlu show: folders of all kinds, headers read without torch, and broken files told."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from danlu.errors import DanluError
from danlu.formats.card import CARD, RUN, Card, Stage
from danlu.hub.config import PullConfig
from danlu.report.config import ShowConfig
from danlu.report.show import count_weights, describe, show


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder with a lineage of two."""
    monkeypatch.chdir(tmp_path)
    data = Stage.open("data", kind="data", verb="data build", config=PullConfig("corpus"))
    data.finish({"documents_kept": 1234})
    stage = Stage.open("model", kind="model", verb="pretrain", config=PullConfig("x"), inputs={"data": data.out})
    tensors = {"a": np.zeros((10, 20), np.float32), "b": np.zeros(5, np.float16), "c": np.zeros((), np.int8)}
    save_file(tensors, stage.out / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "qwen3", "hidden_size": 384, "architectures": ["Qwen3ForCausalLM"], "rope_theta": 1e4}
    (stage.out / "config.json").write_text(json.dumps(config))
    (stage.out / "checkpoints").mkdir()
    (stage.out / "checkpoints" / "step").write_bytes(bytes(1000))
    stage.finish({"heldout_bits_per_byte": 1.23456, "parameters": 206, "nested": {"xz": 1.5}})
    return stage.out


def test_what_is_told_of_a_model(model: Path) -> None:
    found = describe(model)
    assert (found["kind"], found["unfinished"], found["changed"]) == ("model", None, [])
    assert found["weights"] == {
        "parameters": 206,
        "tensors": 3,
        "by_dtype": {
            "F32": {"parameters": 200, "bytes": 800},
            "F16": {"parameters": 5, "bytes": 10},
            "I8": {"parameters": 1, "bytes": 1},
        },
    }
    assert found["model"] == {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 384}
    assert found["files"]["checkpoints"] == 1000
    assert found["bytes"] == sum(p.stat().st_size for p in model.rglob("*") if p.is_file())


def test_the_printed_page(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(ShowConfig(model))
    told = capsys.readouterr().out
    for expected in ("made by danlu pretrain", "206", "F16", "1.235", "documents_kept 1,234", "xz: 1.5", "qwen3"):
        assert expected in told
    lines = told.splitlines()
    at = lines.index("lineage")
    assert "danlu pretrain" in lines[at + 1]
    assert "data: " in lines[at + 2]
    assert lines[at + 2].index("data: ") > lines[at + 1].index("model")  # indented below what it was made into


def test_json_is_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = show(ShowConfig(model, json=True))
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found))


def test_a_model_from_elsewhere_in_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in (1, 2):
        save_file({f"w{index}": np.zeros(100, np.float32)}, tmp_path / f"model-0000{index}-of-00002.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "vlm", "text_config": {"hidden_size": 7}}')
    found = show(ShowConfig(tmp_path))
    assert (found["kind"], found["card"], found["weights"]["parameters"]) == ("model", None, 200)
    assert found["model"] == {"model_type": "vlm", "hidden_size": 7}
    assert "not made by danlu" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tokenizer.json", "model.gguf"])
def test_other_folders_from_elsewhere(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    assert describe(tmp_path)["kind"] == ("tokenizer" if name == "tokenizer.json" else "model")


def test_an_unfinished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Stage.open(tmp_path / "model", kind="model", verb="pretrain", config=PullConfig("x"))
    assert show(ShowConfig(tmp_path / "model"))["unfinished"] == "pretrain"
    assert "an unfinished run of danlu pretrain" in capsys.readouterr().out
    (tmp_path / "model" / RUN).write_text("[]")
    with pytest.raises(DanluError):
        show(ShowConfig(tmp_path / "model"))


def test_files_that_changed_since_are_told(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").unlink()
    assert set(show(ShowConfig(model))["changed"]) == {"config.json", "model.safetensors"}
    told = capsys.readouterr().out
    assert "(changed)" in told
    assert "gone" in told


def test_places_that_are_no_folder_of_anything(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path, told in (
        (tmp_path, "holds no danlu.json and no model"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "no", "not exist"),
    ):
        with pytest.raises(DanluError, match=told):
            describe(path)


def header(content: Any, data: bytes = b"") -> bytes:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(raw)) + raw + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 1000) + b"{}",
        header(b"{"),
        header(b"\xff\xff"),
        header(b"[" * 100_000),
        header([1, 2]),
        header({"a": 3}),
        header({"a": {"dtype": "F32", "shape": [1]}}),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, bytes(4)),
        header({"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}, bytes(4)),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}, bytes(4)),
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(4)),
        b"PK\x03\x04" + bytes(100),
    ],
)
def test_broken_weights_are_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(DanluError, match=r"model\.safetensors: .*again"):
        describe(tmp_path)


def test_every_truncation_of_real_weights_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.zeros((3, 4), np.float32), "b": np.zeros(2, np.int64)}, path)
    whole = path.read_bytes()
    count_weights([path])
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DanluError):
            count_weights([path])


def test_a_card_cannot_steer_the_terminal(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = Card.load(model)
    card.verb = "\x1b[2J[bold]evil[/bold]"
    card.metrics["\x1b]0;title\x07"] = "\x1b[31m"
    card.save(model)
    show(ShowConfig(model))
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert "\x07" not in told
    assert "[bold]evil[/bold]" in told


@pytest.mark.parametrize("field", ["metrics", "config", "files", "inputs"])
def test_a_card_of_the_wrong_shape_is_told(model: Path, field: str) -> None:
    content = json.loads((model / CARD).read_text())
    content[field] = 3
    (model / CARD).write_text(json.dumps(content))
    with pytest.raises(DanluError, match=CARD):
        show(ShowConfig(model))


def test_showing_needs_no_torch(model: Path) -> None:
    program = (
        "import sys; from danlu.report.show import show; from danlu.report.config import ShowConfig\n"
        "show(ShowConfig(sys.argv[1])); assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(model)], check=True, timeout=60, stdout=subprocess.DEVNULL)
