"""The command line: fast to start, made from the configs, every mistake in plain words with its exit code."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from danlu import __version__, cli
from danlu import config as configs
from danlu.config import REQUIRED, option
from danlu.errors import DanluError
from danlu.verbs import VERBS, Verb

HEAVY = {
    "torch",
    "numpy",
    "pyarrow",
    "rich",
    "tokenizers",
    "transformers",
    "huggingface_hub",
    "matplotlib",
    "trafilatura",
}


@dataclass(frozen=True)
class BakeConfig:
    flour: Path = option(REQUIRED, "Folder of flour.", positional=True)
    extras: tuple[str, ...] = option((), "What else goes in.", positional=True)
    minutes: float = option(3.0, "Baking time.", unit="minutes", gt=0, le=60)
    eggs: int = option(2, "Eggs.", ge=0)
    style: Literal["loaf", "roll"] = option("loaf", "Shape.")
    crisp: bool = option(True, "Crisp crust.")
    spices: tuple[str, ...] = option((), "Spices.")
    oven_name: str = option("", "Oven.")
    limit: int | None = option(None, "Stop early.", unit="loaves")


@dataclass(frozen=True)
class RunLikeConfig:
    recipe: Path = option(REQUIRED, "Recipe.", positional=True)
    overrides: tuple[str, ...] = option((), "Vars.", positional=True)
    until: str | None = option(None, "Stop here.")


@pytest.fixture
def bake(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str, list[Any]]]:
    """Run a command line over a table of two verbs; gives exit code, stdout, stderr and the configs they got."""
    calls: list[Any] = []
    module = types.ModuleType("danlu_test_verbs")
    module.__dict__.update(BakeConfig=BakeConfig, RunLikeConfig=RunLikeConfig)

    def bake_it(config: BakeConfig) -> Any:
        calls.append(config)
        if config.oven_name == "cold":
            raise DanluError("oven: is cold; heat it")
        if config.oven_name == "broken":
            raise ZeroDivisionError("sparks")
        if config.oven_name == "boring":
            raise KeyboardInterrupt
        return Path("bread") if config.oven_name == "good" else {"not": "printed"}

    module.__dict__.update(bake_it=bake_it, run_it=calls.append)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    verbs = (
        Verb("data bake", f"{module.__name__}:BakeConfig", f"{module.__name__}:bake_it", "Bake bread."),
        Verb("runlike", f"{module.__name__}:RunLikeConfig", f"{module.__name__}:run_it", "Run it."),
    )
    monkeypatch.setattr(cli, "VERBS", verbs)

    def run(*words: str) -> tuple[int, str, str, list[Any]]:
        calls.clear()
        monkeypatch.setattr(sys, "argv", ["danlu", *words])
        code = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        captured = capfd.readouterr()
        return code, captured.out, captured.err, list(calls)

    return run


def python(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "program",
    [
        "import danlu",
        "import sys; sys.argv = ['danlu', '--help']; from danlu.cli import main; main()",
        "import sys; sys.argv = ['danlu']; from danlu.cli import main; main()",
        "import sys; sys.argv = ['danlu', '--version']; from danlu.cli import main; main()",
    ],
)
def test_starting_imports_nothing_heavy(program: str) -> None:
    watch = "import atexit, sys; atexit.register(lambda: print('MODULES', *sorted(sys.modules)))\n"
    done = python(watch + program)
    loaded = set(done.stdout.rpartition("MODULES")[2].split())
    assert "danlu" in loaded, done.stderr
    assert not HEAVY & loaded
    assert not [name for name in loaded if re.fullmatch(r"danlu\.\w+\.config", name)]


def test_the_configs_of_all_verbs_import_nothing_heavy() -> None:
    """Completion, which runs on each press of Tab, builds the options of all verbs."""
    done = python("import sys; from danlu.cli import build_app; build_app(); print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(done.stdout.split())


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_each_verb_explains_each_option(
    verb: Verb, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["danlu", *verb.name.split(), "--help"])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        cli.main()
    told = "".join(capsys.readouterr().out.split())  # however it is wrapped
    assert not caught.value.code
    assert "".join(verb.help.split()) in told
    assert "--config" in told
    for field in dataclasses.fields(verb.config_type()):
        declared = configs.option_of(field)
        assert declared.help, f"{verb.name}: {field.name} has no help"
        name = field.name.upper() if declared.positional else "--" + field.name.replace("_", "-")
        assert name in told or field.name == "overrides"
        assert "".join(declared.help.split()) in told
    assert callable(verb.function())


def test_without_words_all_verbs_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["danlu"])
    with pytest.raises(SystemExit):
        cli.main()
    captured = capsys.readouterr()
    told = captured.out + captured.err
    assert all(verb.name.split()[0] in told for verb in VERBS)


def test_version(bake: Any) -> None:
    assert bake("--version")[:2] == (0, f"danlu {__version__}\n")


def test_help_shows_default_unit_bounds_and_choices(bake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, told, _, _ = bake("data", "bake", "--help")
    assert code == 0
    for expected in (
        "[default: 3.0 minutes; more than 0; at most 60]",
        "loaf|roll",
        "--crisp / --no-crisp",
        "Folder of flour. [required]",
        "Spices. [may be repeated]",
        "Stop early. [in loaves]",
        "EXTRAS|key=value",
    ):
        assert expected in told


def test_flags_overrides_and_arguments_become_the_config(bake: Any) -> None:
    words = ["rye", "eggs=4", "salt", "--minutes", "1e1", "--no-crisp", "sugar", "--spices", "anise", "--spices=cumin"]
    code, out, err, calls = bake("data", "bake", *words, "style=roll", "limit=none")
    assert (code, out, err) == (0, "", "")
    expected = BakeConfig(Path("rye"), ("salt", "sugar"), 10.0, 4, "roll", False, ("anise", "cumin"))
    assert calls == [expected]


def test_precedence_is_defaults_file_command_line(bake: Any, tmp_path: Path) -> None:
    file = tmp_path / "bake.yaml"
    file.write_text("flour: wheat\neggs: 7\nminutes: 8\nstyle: roll\ncrisp: false\n")
    _, _, _, calls = bake("data", "bake", "--config", str(file), "minutes=9", "--eggs", "5", "--crisp")
    assert calls == [BakeConfig(Path("wheat"), (), 9.0, 5, "roll", True)]


@pytest.mark.parametrize("word", ["./a=b", "/tmp/a=b", "a/b=c", "=x", "1=2", "with space=1"])
def test_words_that_only_look_like_overrides_are_arguments(bake: Any, word: str) -> None:
    assert bake("data", "bake", word)[3] == [BakeConfig(Path(word))]


def test_a_verb_may_keep_the_overrides_to_itself(bake: Any) -> None:
    _, _, _, calls = bake("runlike", "minutes=3", "r.yaml", "corpus=a b", "--until", "x")
    assert calls == [RunLikeConfig(Path("r.yaml"), ("minutes=3", "corpus=a b"), "x")]


def test_all_mistakes_are_told_together(bake: Any, tmp_path: Path) -> None:
    file = tmp_path / "bake.yaml"
    file.write_text("egs: 3\n")
    code, out, err, calls = bake(
        "data", "bake", "--config", str(file), "--minutes", "99", "--style=bun", "eggs=x", "ovn=1"
    )
    assert (code, out, calls) == (2, "", [])
    for expected in (
        "error: the configuration cannot be used (6 problems)",
        "unknown key 'egs'; did you mean 'eggs'?",
        "unknown key 'ovn'",
        "minutes: 99 minutes is too large; at most 60",
        "'bun' is not one of loaf, roll",
        "eggs: 'x' is not a whole number",
        "flour is missing",
    ):
        assert expected in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data", "bake", "rye", "--minuts", "3"], "--minutes"),
        (["data", "bkae"], "'bake'"),
        (["dta"], "'data'"),
        (["runlike", "a.yaml", "b.yaml"], "b.yaml"),
        (["data", "bake", "rye", "--config", "nowhere.yaml"], "error: nowhere.yaml: cannot be read"),
        (["data", "bake", "rye", "--minutes"], "requires an argument"),
        (["data", "bake", "rye", "oven_name=cold"], "error: oven: is cold; heat it\n"),
    ],
)
def test_the_users_mistakes_exit_with_2_and_no_traceback(bake: Any, words: Sequence[str], told: str) -> None:
    code, out, err, _ = bake(*words)
    assert code == 2
    assert told in err
    assert not out
    assert "Traceback" not in err


def test_our_mistakes_show_themselves(bake: Any) -> None:
    code, _, err, _ = bake("data", "bake", "rye", "oven_name=broken")
    assert code == 1
    assert "ZeroDivisionError: sparks" in err
    assert "This is a bug in danlu" in err


def test_ctrl_c_ends_shortly(bake: Any) -> None:
    assert bake("data", "bake", "rye", "oven_name=boring")[:3] == (130, "", "interrupted\n")


def test_a_resulting_path_is_printed_and_nothing_else(bake: Any) -> None:
    assert bake("data", "bake", "rye", "oven_name=good")[:2] == (0, "bread\n")


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "danlu", "show", str(tmp_path), "--json"],
        stdout=writing,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    os.close(writing)
    assert done.stderr == b""
    assert done.returncode == 1


def test_a_real_interrupt(tmp_path: Path) -> None:
    """Ctrl-C while a verb waits (here: for a text on its standard input)."""
    program = (
        "import sys, types, time; from danlu import cli; from danlu.verbs import Verb\n"
        "from danlu.report.config import ShowConfig\n"
        "module = sys.modules['fake'] = types.ModuleType('fake'); module.Config = ShowConfig\n"
        "def wait(config): print('waiting', flush=True); time.sleep(60)\n"
        "module.wait = wait; cli.VERBS = (Verb('wait', 'fake:Config', 'fake:wait', 'Wait.'),)\n"
        "sys.argv = ['danlu', 'wait', 'x']; cli.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore it
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "interrupted\n")


def test_completion_knows_commands_and_options() -> None:
    environment = {**os.environ, "_DANLU_COMPLETE": "complete_bash", "COMP_WORDS": "danlu pull --o", "COMP_CWORD": "2"}
    done = subprocess.run([sys.executable, "-m", "danlu"], env=environment, capture_output=True, text=True, timeout=60)
    assert "--out" in done.stdout.split()


def test_a_verb_answers_to_its_other_spelling() -> None:
    command = [sys.executable, "-m", "danlu", "distill", "teacher", "--data", "x", "--out", "y"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "nothing says what the student is" in result.stderr
