"""The quickstart as a newcomer runs it, on a smaller corpus: without a network, killed on the way, and run again."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import pytest

from danlu.formats.card import CARD, RUN, Card

NO_NETWORK = """
import socket
def refuse(*args, **kwargs):
    with open({log!r}, "a") as log:
        log.write(repr(args) + "\\n")
    raise OSError("this test has no network")
_connect = socket.socket.connect
socket.socket.connect = lambda self, to: _connect(self, to) if self.family == socket.AF_UNIX else refuse(to)
socket.getaddrinfo = refuse
"""

STAGES = {
    "data": "data", "tokenizer": "tokenizer", "untrained": "model", "evaluate-untrained": "evaluation", "base": "model",
    "evaluate-base": "evaluation", "instructions": "data", "model": "model", "evaluate-model": "evaluation",
    "ranked": "data", "reward": "model", "ppo": "model", "evaluate-ppo": "evaluation", "grpo": "model",
    "evaluate-grpo": "evaluation", "student": "model", "evaluate-student": "evaluation",
}  # fmt: skip


@dataclass
class Run:
    """What is left of the first, finished quickstart."""

    folder: Path
    command: list[str]
    environment: dict[str, str]
    stdout: str
    stderr: str
    connections: Path

    def again(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, cwd=self.folder.parent, env=self.environment, capture_output=True, text=True, timeout=120, check=True
        )

    def cards(self) -> dict[str, Card]:
        return {name: Card.load(self.folder / name) for name in STAGES}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that was killed in the middle of a stage, and then the same command again, to the end."""
    home = tmp_path_factory.mktemp("newcomer")
    (home / "site").mkdir()
    connections = home / "connections.txt"
    (home / "site" / "sitecustomize.py").write_text(NO_NETWORK.format(log=str(connections)))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(home / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "DANLU_HOME": str(home / "cache"),
        "COLUMNS": "200",
    }
    library = Path(sysconfig.get_paths()["stdlib"])
    corpus = [str(library / name) for name in ("asyncio", "email", "json", "importlib")]
    command = [
        sys.executable, "-m", "danlu", "quickstart", "--out", "quick", *corpus, "--vocab-size", "512", "--size", "1",
        "--pretrain-minutes", "0.2", "--finetune-minutes", "0.1", "--functions", "4", "--compile", "never",
        "--ranked-prompts", "96", "--policy-steps", "2", "--student-minutes", "0.1",
    ]  # fmt: skip
    with (home / "first.txt").open("w") as output:
        first = subprocess.Popen(command, cwd=home, env=environment, stdout=output, stderr=output)
        deadline = time.monotonic() + 300
        while not (home / "quick" / "base" / RUN).exists():
            assert first.poll() is None, (home / "first.txt").read_text()
            assert time.monotonic() < deadline, "the stage was not reached"
            time.sleep(0.1)
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert not (home / "quick" / "base" / CARD).exists()
    second = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=400)
    assert second.returncode == 0, second.stderr
    return Run(home / "quick", command, environment, second.stdout, second.stderr, connections)


pytestmark = pytest.mark.slow


def test_every_stage_has_left_its_folder(run: Run) -> None:
    cards = run.cards()
    assert {name: card.kind for name, card in cards.items()} == STAGES
    assert cards["base"].metrics["steps"] > 0
    assert cards["base"].metrics["heldout_bits_per_byte"] < 8
    assert cards["evaluate-base"].metrics["bits_per_byte"] < cards["evaluate-untrained"].metrics["bits_per_byte"]
    assert cards["untrained"].metrics["steps"] == 0
    assert cards["model"].inputs[0].fingerprint == cards["base"].fingerprint
    assert cards["student"].metrics["smaller_by"] > 0.5


def test_what_was_finished_before_the_kill_was_not_done_again(run: Run) -> None:
    for name in ("data", "tokenizer", "untrained", "evaluate-untrained"):
        assert f"{name}: was finished already" in run.stderr
    assert "base: done" in run.stderr


def test_nothing_reached_for_the_network(run: Run) -> None:
    assert not run.connections.exists(), run.connections.read_text()


def test_closing_words_name_what_was_made_and_work_as_typed(run: Run) -> None:
    assert "quick/grpo\n" in run.stdout
    assert "quick/report.html" in run.stdout
    assert re.search(r"time: .* s; peak memory: [\d.]+ [MG]B", run.stdout)
    typed = [shlex.split(line) for line in run.stdout.splitlines() if line.startswith("  danlu ")]
    assert [words[1] for words in typed] == ["chat", "generate", "show"]
    for words in typed[1:]:
        more = ["--max-new-tokens", "4"] if words[1] == "generate" else []
        assert run.again([sys.executable, "-m", *words, *more]).stdout.strip()


def test_figures_in_the_report_are_those_of_the_cards(run: Run) -> None:
    page = (run.folder / "report.html").read_text()
    text = " ".join(unescape(re.sub(r"<[^>]+>", " ", page)).split())
    cards = run.cards()
    for name in (
        "evaluate-untrained",
        "evaluate-base",
        "evaluate-model",
        "evaluate-ppo",
        "evaluate-grpo",
        "evaluate-student",
    ):
        metrics = cards[name].metrics
        assert f"{metrics['bits_per_byte']:.4f}" in text
        assert f"{100 * metrics['parse_rate']:.1f} %" in text
        assert f"{metrics['bits_per_byte']:.3f}" in run.stdout
    for value in cards["evaluate-base"].metrics["compressors"].values():
        assert f"{value:.3f}" in text
    assert f"{cards['data'].metrics['documents_read']:,} documents" in text
    assert f"{cards['tokenizer'].metrics['bytes_per_token']:.3f}" in text
    assert f"{cards['base'].metrics['tokens_per_second']:,.0f} tokens/s" in text
    assert cards["evaluate-model"].details["samples"][0]["name"] in text


def test_report_loads_nothing_from_elsewhere(run: Run) -> None:
    page = (run.folder / "report.html").read_text()
    assert not re.search(r"<(script|link|iframe|img|object|embed|base)\b", page)
    attributes = re.sub(r">[^<]*<", "><", page)
    assert all(target.startswith("#") for target in re.findall(r'\b(?:src|href)="([^"]*)"', attributes))


def test_a_second_run_does_nothing_again(run: Run) -> None:
    before = {name: (run.folder / name / CARD).stat().st_mtime_ns for name in STAGES}
    result = run.again(run.command)
    assert {name: (run.folder / name / CARD).stat().st_mtime_ns for name in STAGES} == before
    assert result.stderr.count("was finished already") == len(STAGES)
