"""The whole verb with real teachers: a model folder, `danlu serve`, and an endpoint that a test scripts."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from scripted_endpoint import Endpoint, Reply, answer, endpoint, error, user
from server_process import serving
from stopping_teacher import stopping_teacher

from danlu.config import load
from danlu.data.chat_rows import read_chat_rows
from danlu.data.folder import DataFolder, Document
from danlu.data.puzzles import PuzzlesConfig, make_puzzles
from danlu.errors import DanluError, Problems
from danlu.formats.card import CARD
from danlu.posttraining.synth.config import SynthConfig
from danlu.posttraining.synth.synth import synth


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stopping_teacher(tmp_path_factory.mktemp("synth") / "teacher")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synth-data") / "prompts.jsonl"
    return write(path, [{"prompt": f"What is {i} + {i * i}?", "answer": str(i + i * i)} for i in range(24)])


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def run(out: Path, **values: Any) -> DataFolder:
    return synth(load(SynthConfig, values={"out": out, **values}))


def ask(server: Endpoint, out: Path, **values: Any) -> DataFolder:
    return run(out, **{"teacher": server.url, "model": "m", "retry_wait": 0.01, "retries": 1, **values})


def rows(folder: DataFolder) -> list[Document]:
    return [document for split in folder.splits() for document in folder.documents(split)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != CARD}


def solved(body: dict[str, Any], before: int = 0) -> Reply:
    a, b = (int(word.strip("?")) for word in user(body).split()[2::2])
    return answer(f"First {a}, then {b} more: the answer is {a + b}.")


def command(out: Path, *words: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "danlu", "synth", "--out", str(out), *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_answers(out: Path, n: int, process: subprocess.Popen[str]) -> bytes:
    """What the spool holds once it has n lines."""
    spool, end = out / "spool" / "answers.jsonl", time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if spool.exists() and (content := spool.read_bytes()).count(b"\n") >= n:
            return content
        time.sleep(0.01)
    raise AssertionError(f"no {n} answers: {process.communicate()[0] if process.poll() is not None else 'too slow'}")


def test_rows_tell_where_they_come_from_and_the_card_counts_all(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    again = write(
        tmp_path / "p.jsonl", [*map(json.loads, prompts.read_text().splitlines()), {"prompt": "What is 0 + 0?"}]
    )
    folder = run(tmp_path / "out", teacher=str(teacher), data=again, max_new_tokens=150, temperature=1)
    found, metrics = rows(folder), folder.card.metrics
    removed = sum(f["documents_removed"] for f in folder.card.details["filters"])
    assert metrics["prompts"] == metrics["answers_asked"] == metrics["documents_read"] == 24
    assert metrics["prompts_left_out_as_duplicates"] == 1
    assert 0 < len(found) == metrics["documents_kept"] == 24 - removed
    assert metrics["heldout_documents"] >= 1
    assert metrics["answer_tokens"] > 24
    rejected = [json.loads(line) for line in (folder.path / "rejected.jsonl").read_text().splitlines()]
    assert Counter(row["filter"] for row in rejected) == {
        f["name"]: f["documents_removed"] for f in folder.card.details["filters"] if f["documents_removed"]
    }
    contents_of = {system["id"]: system["content"] for system in folder.card.details["systems"]}
    for document in found:
        *before, asked, answered = document.messages()
        number = int(document.meta["prompt_source"].rpartition(":")[2])
        assert asked["content"] == f"What is {number - 1} + {(number - 1) ** 2}?"
        assert [m["content"] for m in before] == [c for c in [contents_of[document.meta["system_id"]]] if c]
        assert answered["content"].strip()
        assert document.meta["answer"] == str((number - 1) ** 2 + number - 1)  # for who trains with verifiers
        assert document.meta["finish_reason"] == "stop"
        assert len(document.meta["teacher_fingerprint"]) == 64
        assert int(document.meta["seed"]) >= 0
    assert len({d.meta["system_id"] for d in found}) > 2
    assert len(list(read_chat_rows(folder.path))) == metrics["train_documents"]
    assert (
        run(tmp_path / "out", teacher=str(teacher), data=again, max_new_tokens=150, temperature=1).card == folder.card
    )


@pytest.mark.slow
def test_a_killed_run_goes_on_and_comes_to_the_same_bytes(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    values = {"teacher": teacher, "data": prompts, "max_new_tokens": 400, "temperature": 1, "n": 2, "keep": "all"}
    whole = run(tmp_path / "whole", **{**values, "teacher": str(teacher)})
    words = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    killed = command(tmp_path / "killed", *words, "--max-running=1")
    wait_for_answers(tmp_path / "killed", 5, killed)
    killed.kill()
    killed.wait()
    spool = tmp_path / "killed" / "spool" / "answers.jsonl"
    n = spool.read_bytes().count(b"\n")
    assert n < 48
    with open(spool, "ab") as file:
        file.write(b'{"key": "torn')
    resumed = run(tmp_path / "killed", **{**values, "teacher": str(teacher)})
    assert resumed.card.metrics["answers_of_an_earlier_run"] == n
    assert contents(resumed.path) == contents(whole.path)
    assert not spool.exists()


def test_ctrl_c_saves_and_no_answer_is_paid_for_twice(prompts: Path, tmp_path: Path) -> None:
    stopped = threading.Event()

    def answered_until_it_is_stopped(body: dict[str, Any], before: int) -> Reply:
        if len(server.asked) > 6:
            stopped.wait(30)
        return solved(body)

    out = tmp_path / "out"
    with endpoint(answered_until_it_is_stopped) as server:
        words = ["--teacher", server.url, "--model=m", "--concurrency=2", "--data", prompts]
        process = command(out, *words)
        wait_for_answers(out, 6, process)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
        stopped.set()
        assert process.returncode == 130, said
        assert "answers are kept" in said
        kept = (out / "spool" / "answers.jsonl").read_bytes().count(b"\n")
        before = list(server.asked)
        folder = ask(server, out, data=prompts)
        after = server.asked[len(before) :]
    assert folder.card.metrics["answers_of_an_earlier_run"] == kept == 6
    assert len(after) == 24 - kept
    assert sum(n - 1 for n in Counter([*before, *after]).values()) <= 2  # those under way when it was stopped
    assert folder.card.metrics["documents_kept"] == 24


def test_an_answer_is_asked_for_until_one_passes_the_check(prompts: Path, tmp_path: Path) -> None:
    seen: Counter[str] = Counter()

    def wrong_at_first(body: dict[str, Any], before: int) -> Reply:
        seen[user(body)] += 1
        number = int(user(body).split()[2])
        return solved(body) if seen[user(body)] > number % 4 else answer("The answer is -1.")

    with endpoint(wrong_at_first) as server:
        folder = ask(server, tmp_path / "out", data=prompts, n=3, check=["math-equal"], systems=["none"])
    assert all(n == min(int(question.split()[2]) % 4 + 1, 3) for question, n in seen.items())
    assert folder.card.metrics["documents_kept"] == 18
    removed = {f["name"]: f["documents_removed"] for f in folder.card.details["filters"]}
    assert removed["wrong"] == sum(min(i % 4, 3) for i in range(24))
    assert {(d.meta["sample"], d.meta["score"]) for d in rows(folder)} == {("0", "1"), ("1", "1"), ("2", "1")}


def test_curriculum_by_pass_rate_orders_rows_and_writes_stages_that_finetune_reads(
    prompts: Path, tmp_path: Path
) -> None:
    seen: Counter[str] = Counter()

    def script(body: dict[str, Any], before: int) -> Reply:
        seen[user(body)] += 1
        number = int(user(body).split()[2])
        return solved(body) if seen[user(body)] > number % 3 else answer("The answer is -1.")

    with endpoint(script) as server:
        folder = ask(
            server, tmp_path / "out", data=prompts, n=3, keep="best", check=["math-equal"], curriculum="pass-rate",
            heldout=0.2, concurrency=1,
        )  # fmt: skip
    trained = list(folder.documents("train"))
    difficulties = [float(d.meta["difficulty"]) for d in trained]
    assert difficulties == sorted(difficulties)
    assert set(difficulties) <= {0.0, 0.333333, 0.666667}
    for document in trained:
        number = int(document.meta["prompt_source"].rpartition(":")[2]) - 1
        assert float(document.meta["difficulty"]) == pytest.approx(number % 3 / 3, abs=1e-5)
    staged = [row.messages for i in (1, 2, 3) for row in read_chat_rows(folder.path / f"stage-{i}.jsonl")]
    assert staged == [document.messages() for document in trained]
    assert folder.card.changed_file(folder.path) is None


def test_prompts_of_a_data_folder_stay_in_their_split(tmp_path: Path) -> None:
    puzzles = make_puzzles(PuzzlesConfig(out=tmp_path / "puzzles", n=20, heldout=10, digits=4))
    with endpoint(lambda body, _: answer(str(sum(map(int, user(body).split("+")))))) as server:
        folder = ask(server, tmp_path / "out", data=puzzles.path, check=["math-equal"], limit=10)
    for split, n in (("train", 10), ("heldout", 5)):
        asked = [d.messages()[-2]["content"] for d in folder.documents(split)]
        there = [d.messages()[-2]["content"] for d in puzzles.documents(split)]
        assert asked == there[:n]


def test_self_instruct_invents_tasks_answers_them_and_goes_on_after_a_stop(tmp_path: Path) -> None:
    seeds = write(
        tmp_path / "seeds.jsonl", [{"instruction": f"Describe the work of a {w}."} for w in ("baker", "smith")]
    )
    topics = (" ".join(f"w{i}{letter}" for letter in "abcde") for i in itertools.count())
    stop = False

    def script(body: dict[str, Any], before: int) -> Reply:
        if "numbered" not in user(body):
            return error(500) if stop else answer(f"About that: {user(body)}")
        again = "Describe the work of a baker! They rise early and bake all the bread that a whole town eats in a day."
        same = f"10. {again}\n11. Look at the attached picture."
        return answer(f"Here:\n9. Compare {next(topics)}.\n{same}")

    values = {"method": "self-instruct", "seeds": seeds, "tasks": 10, "systems": ["none"], "concurrency": 1}
    with endpoint(script) as server:
        stop = True
        with pytest.raises(DanluError, match=r"failed.*500.*run the same command again"):
            ask(server, tmp_path / "out", **values)
        n_requests = sum("numbered" in asked for asked in server.asked)
        stop = False
        folder = ask(server, tmp_path / "out", **values)
        assert sum("numbered" in asked for asked in server.asked) == n_requests == 16
        examples = server.asked[8]
    made = folder.card.details["self_instruct"]
    assert made["tasks_kept"] == 10
    assert made["tasks_dropped"]["similar"] == 16
    assert made["tasks_dropped"]["surplus"] == 6
    assert made["tasks_dropped"]["needs_more_than_text"] == 16
    assert "work of a smith" in examples
    assert "Compare w" in examples
    assert [d.meta["prompt_source"].startswith("self-instruct: request") for d in rows(folder)] == [True] * 10


@pytest.mark.slow
def test_danlu_serve_is_a_teacher(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    values = {"data": prompts, "limit": 6, "max_new_tokens": 300, "temperature": 1, "heldout": 0}
    with serving(f"--model=tiny={teacher}", data=tmp_path / "server") as server:
        served = run(tmp_path / "served", teacher=server.url, model="tiny", **values)
        with pytest.raises(DanluError, match=r"404.*'absent'"):
            run(tmp_path / "absent", teacher=server.url, model="absent", **values)
    here = run(tmp_path / "here", teacher=str(teacher), **values)
    assert rows(served)
    assert [d.messages() for d in rows(served)] == [d.messages() for d in rows(here)]  # the same engine and seeds


def test_rows_that_fail_are_counted_and_too_many_end_the_run(prompts: Path, tmp_path: Path) -> None:
    def broken(body: dict[str, Any], before: int) -> Reply:
        return (200, {}, b"<html>") if int(user(body).split()[2]) < 2 else solved(body)

    with endpoint(broken) as server:
        folder = ask(server, tmp_path / "out", data=prompts)
        assert folder.card.metrics["answers_failed"] == 2
        assert folder.card.metrics["documents_kept"] == 22
        assert folder.card.details["failures"] == [{"reason": "the response is HTML: '<html>' (2 tries)", "answers": 2}]
        with pytest.raises(DanluError, match=r"2 of 24 answers failed, more than max_failed \(0.05\)"):
            ask(server, tmp_path / "strict", data=prompts, max_failed=0.05, concurrency=1)
        n = len(server.requests)
        patient = ask(server, tmp_path / "strict", data=prompts, max_failed=0.5)
        assert len(server.requests) - n <= 22 + 4 + 1  # one of before may have been under way still
        assert patient.card.metrics["documents_kept"] == 22


def test_the_key_is_in_no_file(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", "sk-very-secret")
    with endpoint(
        lambda body, _: error(400, "bad key sk-very-secret?") if "1 + 1?" in user(body) else solved(body)
    ) as server:
        folder = ask(server, tmp_path / "out", data=prompts, api_key_env="THE_KEY", limit=12)
    assert server.requests[0][1]["Authorization"] == "Bearer sk-very-secret"
    assert folder.card.metrics["answers_failed"] == 1
    assert not [path for path in folder.path.rglob("*") if path.is_file() and b"very-secret" in path.read_bytes()]


def test_a_mistake_that_lets_nothing_be_answered_lets_go_of_the_folder(prompts: Path, tmp_path: Path) -> None:
    with endpoint(lambda body, _: error(404) if body["model"] == "x" else solved(body)) as server:
        with pytest.raises(DanluError, match="404"):
            ask(server, tmp_path / "out", data=prompts, model="x")
        assert not (tmp_path / "out").exists()
        assert rows(ask(server, tmp_path / "out", data=prompts))


def test_nothing_kept_is_an_error_that_says_why(prompts: Path, tmp_path: Path) -> None:
    with endpoint(lambda body, _: answer("I'm sorry, but I can't help with that.")) as server:
        with pytest.raises(DanluError, match="no answer is kept of 24: 0 failed, left out: refusal 24"):
            ask(server, tmp_path / "out", data=prompts)
        assert (tmp_path / "out" / "spool" / "answers.jsonl").exists()


def test_prompts_and_systems_that_cannot_be_used_are_told_before_anything_is_asked(
    teacher: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    text = write(tmp_path / "text.jsonl", [{"text": "def f("}])
    with pytest.raises(DanluError, match=r"text.jsonl:1: holds nothing that a user asks"):
        run(out, teacher=str(teacher), data=text)
    with pytest.raises(DanluError, match="systems: 'steps' is no file and none of built-in, none, "):
        run(out, teacher=str(teacher), data=prompts, systems=["steps"])
    with pytest.raises(DanluError, match="verifier 'math-equals': is not known; did you mean math-equal"):
        run(out, teacher=str(teacher), data=prompts, check=["math-equals"])
    with pytest.raises(DanluError, match="does not exist"):
        run(out, teacher=str(tmp_path / "nobody"), data=prompts)
    assert not out.exists()


def test_a_template_without_system_messages_is_told(teacher: Path, prompts: Path, tmp_path: Path) -> None:
    for template, why in (
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", "leaves system"),
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}",
            "takes no system message",
        ),
    ):
        folder = tmp_path / why.split()[0]
        folder.mkdir()
        for path in teacher.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "chat_template.jinja").write_text(template)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
        with pytest.raises(DanluError, match=f"{why}.*use --systems none"):
            run(tmp_path / "out", teacher=str(folder), data=prompts)


def test_impossible_options_are_told_together() -> None:
    values = {
        "teacher": "http://me:secret@host/v1", "out": "out", "method": "self-instruct", "data": "d", "n": 2,
        "temperature": 0, "keep": "best", "without": ["refusals"], "device": "cpu", "check_score": 1, "stages": 4,
        "body": {"stream": True},
    }  # fmt: skip
    with pytest.raises(Problems) as told:
        load(SynthConfig, values=values)
    text = str(told.value)
    for what in (
        "data is not for", "seeds is missing", "device is for", "teacher: the URL holds more", "model is missing",
        "body: stream", "at temperature 0", "keep=best", "'refusals'", "check_score", "stages are given",
    ):  # fmt: skip
        assert what in text
    assert "secret" not in text.replace("teacher: the URL", "")
