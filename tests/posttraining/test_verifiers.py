"""Verifiers by their specs: scores, weights, what cannot be judged, and functions of the user's that misbehave."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from danlu.data.mining import functions_with_docstrings, prompt_for
from danlu.engine.generate import Completion
from danlu.errors import DanluError
from danlu.evaluation.code import Task, judge
from danlu.models.heads import RewardModel
from danlu.models.load import load_model, save_model
from danlu.posttraining.verifiers import Judgement, Sample, Verifiers
from danlu.tokenizer.tokenizer import Tokenizer


def judge_one(spec: str, answer: str, row: dict[str, Any] | None = None, prompt: Any = "", **limits: Any) -> Judgement:
    with Verifiers.open([spec], processes=1, **limits) as verifiers:
        (judgement,) = verifiers.judge([Sample(prompt, answer, row or {})])
    return judgement


SOURCE = '''
def area(width, height):
    """The area of a rectangle with sides."""
    return width * height


class Box:
    async def open(self, key: str) -> bool:
        """Open the box with its key."""
        return await self.lock.turn(key)
'''


@pytest.mark.parametrize("function", functions_with_docstrings(SOURCE), ids=lambda function: function.name)
@pytest.mark.parametrize(
    "answer",
    [
        "def area(width, height):\n    return width * height\n",
        "async def open(self, key: str) -> bool:\n    return True\n",
        "Sure:\n```python\ndef area(width, height):\n    return 1\n```\nThat is it.",
        "    return 1\n",
        "return 1\n",
        "return (1\n",
        "",
        "def other():\n    return 1\n",
        "def area(width, height):\n    '''Only a docstring.'''\n",
        "def area(width, height):\n    return 1\n\nprint(area(1, 2))\n",
    ],
)
def test_python_parses_as_evaluate_judges(function: Any, answer: str) -> None:
    """The oracle is `danlu evaluate`, asked for the same function in the same words."""
    task = Task("box.py", function)
    completion = Completion(answer, [], "stop", 0)
    expected = judge(task, completion, "chat").parses
    row = {"stub": task.stub, "entry_point": function.name}
    judgement = judge_one("python-parses", answer, row, prompt_for(function))
    assert judgement.score == float(expected)


def test_python_parses_without_a_stub() -> None:
    assert judge_one("python-parses", "x = 1").score == 1
    assert judge_one("python-parses", "x = ").score == 0
    assert judge_one("python-parses", "# nothing").score == 0
    assert judge_one("python-parses", "").score == 0
    assert judge_one("python-parses", "Use this:\n```\nx = 1\n```\n").score == 1
    assert judge_one("python-parses", "<think>x = </think>x = 1").score == 1
    assert judge_one("python-parses", "def f(): return 1", {"entry_point": "f"}).score == 1
    assert judge_one("python-parses", "def g(): return 1", {"entry_point": "f"}).score == 0
    assert judge_one("python-parses", "(" * 10_000).score == 0
    assert judge_one("python-parses", "x = 1\n" * 10_000).score == 0
    assert judge_one("python-parses", "x = 1", {"stub": 5.5, "entry_point": ["f"]}).score is None


def test_python_tests() -> None:
    row = {"tests": ["assert f(1) == 2", "assert f(2) == 3"], "entry_point": "f"}
    stub = "import math\n\n\ndef helper(x):\n    return 0\n\n\ndef f(x):\n    '''Add one.'''\n"
    cases: list[tuple[str, str, dict[str, Any], float | None]] = [
        ("", "def f(x): return x + 1", row, 1),
        ("", "Here:\n```python\nimport os\n\ndef f(x):\n    return x + 1\n```\n", row, 1),
        ("", "```\nprint('usage')\n```\nand\n```\ndef f(x): return x + 1\n```\nthen\n```\nf(3)\n```", row, 1),
        ("", "<think>def f(x): return 0</think>def f(x): return x + 1", row, 1),
        ("", "def f(x): return 2", row, 0.5),
        ("", "I do not know.", row, 0),
        ("", "", row, 0),
        (stub, "    return x + 1\n\n\ndef g(x):\n    return", row, 1),
        (stub, "return x + 1", row, 1),
        (stub + "    ", "return x + 1", row, 1),
        (stub, "```python\ndef f(x):\n    return x + math.trunc(1.5)\n```", row, 1),
        (stub, "def h(x):\n    return x\n\ndef f(x):\n    return h(x) + 1", row, 1),
        ("", "def f(x): return x + 1", {}, None),
        ("", "def f(x): return x + 1", {"tests": "x = 1"}, None),
        ("", "def f(x): return x + 1", {"tests": [1]}, None),
    ]
    try:
        verifiers = Verifiers.open(["python-tests", "python-tests=fraction"], processes=2)
    except DanluError as error:
        if "weak" not in str(error):
            raise
        pytest.skip(str(error))
    with verifiers:
        judgements = verifiers.judge([Sample(prompt, answer, row) for prompt, answer, row, _ in cases])
    assert [j.parts["python-tests=fraction"] for j in judgements] == [score for *_, score in cases]
    whole = [None if score is None else float(score == 1) for *_, score in cases]
    assert [j.parts["python-tests"] for j in judgements] == whole
    assert judgements[4].reasons["python-tests"] == "assert f(2) == 3: AssertionError"
    assert judgements[-2].problem is not None
    assert "the tests assert nothing" in judgements[-2].problem


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("<think>17 + 1</think>18", 1),
        ("\n<think>\nwell\n</think>\n\n18", 1),
        ("18", 0),
        ("", 0),
        ("<think>18", 0.25),
        ("</think>18", 0.5),
        ("so <think>a</think>18", 0.75),
        ("<think></think>18", 0.75),
        ("<think>a</think>", 0.75),
        ("<think>a</think>b</think>c", 0.25),
        ("<think>a</think><think>b</think>18", 0),
    ],
)
def test_think_format(answer: str, score: float) -> None:
    assert judge_one("think-format", answer).score == score


def test_think_format_that_the_prompt_opened() -> None:
    assert judge_one("think-format=opened", "17 + 1</think>18").score == 1
    assert judge_one("think-format=opened", "<think>17 + 1</think>18").score == 0.75


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a"]}


def test_json_schema() -> None:
    cases: list[tuple[str, Any, float | None]] = [
        ('{"a": 1}', SCHEMA, 1),
        ('{"b": "x", "a": 1}', json.dumps(SCHEMA), 1),
        ('Here:\n```json\n{"a": 1}\n```', SCHEMA, 1),
        ('{"a": "1"}', SCHEMA, 0),
        ("{}", SCHEMA, 0),
        ("{", SCHEMA, 0),
        ('{"a": NaN}', SCHEMA, 0),
        ("[" * 100_000, SCHEMA, 0),
        ('{"a": 1}', None, None),
        ('{"a": 1}', {"type": "nonsense"}, None),
        ('{"a": 1}', "{", None),
        ('{"a": 1}', {"$ref": "http://127.0.0.1:9/schema.json"}, None),
        ('{"a": 1}', {"$ref": "#"}, None),
        (json.dumps("a" * 40 + "!"), {"pattern": "^(a+)+$"}, None),  # takes for ever
    ]
    with Verifiers.open(["json-schema"], processes=1, seconds=3) as verifiers:
        judgements = verifiers.judge([Sample("", answer, {"schema": schema}) for answer, schema, _ in cases])
    assert [judgement.score for judgement in judgements] == [score for *_, score in cases]


def test_regex() -> None:
    assert judge_one(r"regex=^\d+$", "123").score == 1
    assert judge_one(r"regex=^\d+$", "a 123").score == 0
    assert judge_one("regex=a=b,c*d", "xa=b,cdx").score == 1
    hung = judge_one("regex=^(a+)+$", "a" * 40 + "!", seconds=1)
    assert hung.score is None
    assert "took too long" in str(hung.problem)


def test_weights_add_up_and_what_is_missing_is_told() -> None:
    with Verifiers.open(["0.5*math-equal", "2*think-format", "-.25*regex=sorry"], processes=1) as verifiers:
        right, sorry, unknown = verifiers.judge(
            [
                Sample("", "<think>a</think>18", {"answer": "18"}),
                Sample("", "sorry, 18", {"answer": "18"}),
                Sample("", "<think>a</think>18"),
            ]
        )
        assert verifiers.judge([]) == []
    assert right == Judgement(
        2.5,
        {"math-equal": 1.0, "think-format": 1.0, "regex=sorry": 0.0},
        None,
        {"regex=sorry": "does not match"},
    )
    assert sorry.score == 0.5 - 0.25
    assert unknown.score is None
    assert unknown.parts["think-format"] == 1
    assert unknown.problem == "math-equal: the row's field 'answer' is missing"


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([], "none is named"),
        (["python-test"], "did you mean python-tests?"),
        (["nonsense"], "choose json-schema, math-equal"),
        (["python-parses=1"], "takes no '=1'"),
        (["python-tests=half"], "python-tests=fraction"),
        (["think-format=open"], "think-format=opened"),
        (["regex="], "write regex=PATTERN"),
        (["regex=("], "is no regular expression"),
        (["model="], "write model=FOLDER"),
        (["model=/nowhere"], "is no model folder"),
        (["0*math-equal"], "counts nothing"),
        (["math-equal", "0.5*math-equal"], "named twice"),
        (["danlu_no_such_module:f"], "No module named"),
        (["math:no_such_function"], "no attribute"),
        (["math:pi"], "is no function"),
    ],
)
def test_specs_that_are_refused(specs: list[str], message: str) -> None:
    with pytest.raises(DanluError) as error:
        Verifiers.open(specs, processes=1)
    assert message in str(error.value)


def test_all_bad_specs_are_told_at_once() -> None:
    with pytest.raises(DanluError, match=r"(?s)nonsense.*model=/nowhere"):
        Verifiers.open(["nonsense", "math-equal", "model=/nowhere"])


FUNCTIONS = """
import os, sys, time

def score(prompt, answer, row):
    print("to stderr")
    if answer == "raise":
        raise KeyError("no such thing")
    if answer == "exit":
        sys.exit(3)
    if answer == "die":
        os._exit(0)
    if answer == "hang":
        time.sleep(100)
    if answer == "10 GB":
        bytearray(10 * 2**30)
    if answer == "fork" and os.fork() == 0:
        return 7
    if answer == "children":
        for _ in range(3):
            if os.fork() == 0:
                time.sleep(30)
                os._exit(0)
        time.sleep(100)
    return {
        "nan": float("nan"), "inf": float("inf"), "huge": -1e308, "none": None, "text": "1", "list": [1], "true": True,
        "pair": (0.5, "half"), "bad pair": (0.5, 3), "prompt": prompt[0]["content"] == "hi", "row": row["weight"],
        "liar": type("F", (float,), {"__float__": lambda self: 1 / 0})(1),
    }.get(answer, 0.25)
"""


def test_functions_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(FUNCTIONS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    expected: dict[str, tuple[float | None, str]] = {
        "plain": (0.25, ""),
        "raise": (None, "raised KeyError: 'no such thing'"),
        "exit": (None, "raised SystemExit: 3"),
        "die": (None, "ended"),
        "hang": (None, "took too long"),
        "10 GB": (None, "raised MemoryError"),
        "fork": (0.25, ""),
        "children": (None, "took too long"),
        "nan": (None, "gave nan"),
        "inf": (None, "gave inf"),
        "huge": (None, "gave -1e+308; scores are numbers of at most 1,000,000"),
        "none": (None, "could not judge"),
        "text": (None, "gave str, not a number"),
        "list": (None, "gave list, not a number"),
        "true": (1.0, ""),
        "pair": (0.5, "half"),
        "bad pair": (None, "gave tuple, not a number"),
        "prompt": (1.0, ""),
        "row": (3.0, ""),
        "liar": (None, ""),
        "again": (0.25, ""),
    }
    prompt = [{"role": "user", "content": "hi"}]
    start = time.monotonic()
    with Verifiers.open(["my_rewards:score"], seconds=1.5, memory_mib=256, processes=2) as verifiers:
        judgements = verifiers.judge([Sample(prompt, answer, {"weight": 3}) for answer in expected])
    assert [judgement.score for judgement in judgements] == [score for score, _ in expected.values()]
    for judgement, (score, told) in zip(judgements, expected.values(), strict=True):
        assert (judgement.problem is None) == (score is not None)
        assert told in (judgement.problem or judgement.reasons.get("my_rewards:score", ""))
    assert time.monotonic() - start < 60


@pytest.fixture(scope="module")
def reward_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = load_model(model_folder, RewardModel, new_head=True)
    torch.nn.init.normal_(model.head.weight)
    folder = tmp_path_factory.mktemp("reward") / "model"
    save_model(model, folder, Tokenizer.load(model_folder))
    return folder


def test_reward_models(reward_folder: Path) -> None:
    """The oracle is the model itself, one text at a time and without padding, read up to the end of the answer."""
    model, tokenizer = load_model(reward_folder, RewardModel), Tokenizer.load(reward_folder)
    prompts: list[Any] = [[{"role": "user", "content": "hi " * n}] for n in range(5)] + ["def f(", "x = "]
    samples = [Sample(prompt, f"answer {i}") for i, prompt in enumerate(prompts)]
    with Verifiers.open([f"0.5*model={reward_folder}"]) as verifiers:
        judgements = verifiers.judge([*samples, Sample("", "long " * 5000), Sample("", "")])
    for sample, judgement in zip(samples, judgements, strict=False):
        if isinstance(sample.prompt, str):
            texts = [*tokenizer.encode(sample.prompt), *tokenizer.encode(sample.answer)]
            ids = [tokenizer.bos_id, *texts, tokenizer.eos_id]
        else:
            ids = tokenizer.encode_chat([*sample.prompt, {"role": "assistant", "content": sample.answer}])
            ids = ids[: len(ids) - ids[::-1].index(tokenizer.id_of("<|im_end|>"))]
        with torch.inference_mode():
            expected = model.score(torch.tensor([ids])).item()
        assert judgement.parts[f"model={reward_folder}"] == pytest.approx(expected, abs=1e-5)
        assert judgement.score == pytest.approx(0.5 * expected, abs=1e-5)
    assert len({judgement.score for judgement in judgements[:7]}) == 7
    assert judgements[-2].score is None
    assert "it reads 4096" in str(judgements[-2].problem)
    assert judgements[-1].score is not None  # an empty answer has an end


def test_a_reward_model_that_gives_nan_is_told(reward_folder: Path, tmp_path: Path) -> None:
    model = load_model(reward_folder, RewardModel)
    torch.nn.init.constant_(model.head.weight, math.nan)
    save_model(model, tmp_path / "nan", Tokenizer.load(reward_folder))
    judgement = judge_one(f"model={tmp_path / 'nan'}", "answer")
    assert judgement.score is None
    assert "nan" in str(judgement.problem)


def test_torch_is_not_needed_for_rules() -> None:
    import subprocess

    code = (
        "import sys; from danlu.posttraining.verifiers import Sample, Verifiers\n"
        "with Verifiers.open(['math-equal', 'regex=1', 'think-format'], processes=1) as v:\n"
        "  v.judge([Sample('', '1', {'answer': 1})])\nprint('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_rouge_l_is_the_share_in_common_with_the_field() -> None:
    assert judge_one("rouge-l", "<think>hm</think>the cat sat", {"answer": "the cat sat down"}).score == pytest.approx(
        6 / 7
    )
    assert judge_one("rouge-l=reply", "a b", {"reply": "c d"}).score == 0
    assert judge_one("rouge-l", "a b", {}).score is None
