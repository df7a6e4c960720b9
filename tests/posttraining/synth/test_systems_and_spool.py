"""System messages are drawn as often as they weigh; the spool keeps what was written and nothing else."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from danlu.errors import DanluError
from danlu.posttraining.synth.jobs import Answer, Job
from danlu.posttraining.synth.spool import Spool
from danlu.posttraining.synth.systems import BUILT_IN, Systems

JOB = Job([{"role": "user", "content": "Why?"}], 3, "p:1")


def test_drawn_as_often_as_they_weigh_and_by_the_prompt_alone(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"system": "Rhyme.", "id": "rhyme", "weight": 3}\n{"system": "Be brief."}\n')
    systems = Systems.read([f"{path}::2", "step-by-step", "none::1"], seed=0)
    assert [s.weight for s in systems.systems] == [6, 2, 1, 1]
    drawn = Counter(systems.draw(f"prompt {i}").id for i in range(4000))
    assert set(drawn) == {"rhyme", "mine.jsonl:2", "step-by-step", "none"}
    for system in systems.systems:
        share = system.weight / 10
        assert abs(drawn[system.id] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5
    assert all(
        systems.draw(str(i)) == Systems.read([f"{path}::2", "step-by-step", "none"], 0).draw(str(i)) for i in (1, 2)
    )
    assert [systems.draw(str(i)) for i in range(50)] != [Systems(systems.systems, 1).draw(str(i)) for i in range(50)]


def test_built_in_ones_differ() -> None:
    assert len({system.id for system in BUILT_IN}) == len({system.content for system in BUILT_IN}) == len(BUILT_IN)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ('{"text": "no"}', "mine.jsonl:1: field 'system' is missing"),
        ('{"system": "a", "weight": 0}', "mine.jsonl:1: the weight 0 is no number above 0"),
        ('{"system": "a", "weight": "x"}', "the weight 'x'"),
        ('{"system": "a", "id": "b"}\n{"system": "c", "id": "b"}', "'b' comes twice"),
    ],
)
def test_broken_rows_are_told(rows: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(rows + "\n")
    with pytest.raises(DanluError, match=why):
        Systems.read([str(path)], 0)
    with pytest.raises(DanluError, match="weight"):
        Systems.read(["none::0"], 0)


def test_answers_are_there_again_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    answer = Answer('Because\u2028\n\t"of" 丹炉\x00', "stop", 3, 4, "hm")
    with Spool(tmp_path) as spool:
        spool.append(JOB, answer)
        path = spool.path
    whole = path.read_bytes()
    for torn in (b"", b"{", whole[:-1], b"\xff"):
        path.write_bytes(whole + torn)
        with Spool(tmp_path) as spool:
            assert spool.answers == {JOB.key: answer}
            other = Job(JOB.messages, 4, "")
            spool.append(other, Answer("x", "stop"))
        with Spool(tmp_path) as spool:
            assert set(spool.answers) == {JOB.key, other.key}


@pytest.mark.parametrize(
    "line", ["no", "[]", "{}", '{"key": "a", "text": 3, "finish_reason": "stop"}', '{"key": "a", "x": 1}']
)
def test_what_is_none_of_ours_is_told(line: str, tmp_path: Path) -> None:
    (tmp_path / "spool").mkdir()
    good = json.dumps({"key": "a", "text": "b", "finish_reason": "stop"})
    (tmp_path / "spool" / "answers.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(DanluError, match=r"answers.jsonl:2: is not what was written"):
        Spool(tmp_path)


def test_only_one_run_writes_it(tmp_path: Path) -> None:
    with Spool(tmp_path), pytest.raises(DanluError, match="another run is writing it"):
        Spool(tmp_path)
    with Spool(tmp_path):
        pass
