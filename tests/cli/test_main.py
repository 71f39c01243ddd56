"""The command line: lazy groups, JSON alone on standard output, mistakes as one sentence."""

import json
import subprocess
import sys
import types
from dataclasses import dataclass

import pytest

from jaxsys import cli
from jaxsys.cli.options import Common, Outcome
from jaxsys.core.errors import UserError


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
      lr: Learning rate.
    """

    lr: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Count to a number.

    Attributes:
      steps: How far.
    """

    steps: int = 3
    task: Task = Task()


def _count(config: Config):
    print("counting")
    if config.steps < 1:
        raise UserError(f"steps is {config.steps};\nit must be at least 1")
    if config.steps == 66:
        raise KeyboardInterrupt
    result = {"steps": config.steps, "lr": config.task.lr, "seed": config.seed}
    return Outcome(result, 7) if config.steps == 77 else result


@pytest.fixture
def group(monkeypatch):
    module = types.SimpleNamespace(COMMANDS={"count": (Config, _count)})
    monkeypatch.setitem(sys.modules, "jaxsys.cli.demo", module)
    monkeypatch.setitem(cli.GROUPS, "demo", "a group for the tests")


def test_json_is_alone_on_stdout_and_progress_is_not(group, capsys):
    assert cli.main(["demo", "count", "--json", "--steps", "5", "--lr", "2", "--seed", "4"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"steps": 5, "lr": 2.0, "seed": 4}
    assert out.count("\n") == 1
    assert "counting" in err


def test_without_json_the_command_prints_for_people(group, capsys):
    assert cli.main(["demo", "count"]) == 0
    assert capsys.readouterr().out == "counting\n"


def test_json_stays_alone_when_a_library_writes_to_the_descriptor(group, capfd, monkeypatch):
    import os

    def noisy(config):
        os.write(1, b"from C++\n")
        return {"ok": True}

    monkeypatch.setitem(sys.modules["jaxsys.cli.demo"].COMMANDS, "count", (Config, noisy))
    assert cli.main(["demo", "count", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == {"ok": True}
    assert "from C++" in err


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_statuses(group, capsys, flags):
    assert cli.main(["demo", "count", "--steps", "77", *flags]) == 7
    assert cli.main(["demo", "count", "--steps", "66", *flags]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["demo", "count", "--steps", "0"], "error: steps is 0; it must be at least 1"),
        (["demo", "sum"], "'sum' is no verb of demo; expected one of count"),
        (["nosuch"], "'nosuch' is no command group; expected one of localsgd"),
        (["demo", "count", "--out", "/dev/null/x"], "--out /dev/null/x cannot be made"),
    ],
)
def test_a_mistake_is_one_line_and_status_two(group, capsys, argv, words):
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize("argv", [["--steps", "many"], ["--nosuch"], ["--lr"]])
def test_options_that_tyro_refuses_end_with_status_two(group, capsys, argv):
    assert cli.main(["demo", "count", *argv]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert "Traceback" not in err


def test_out_is_made_before_work_starts(group, tmp_path):
    assert cli.main(["demo", "count", "--out", str(tmp_path / "a" / "b")]) == 0
    assert (tmp_path / "a" / "b").is_dir()


def test_help_at_every_level(group, capsys):
    assert cli.main([]) == cli.main(["--help"]) == 0
    assert "a group for the tests" in capsys.readouterr().out
    assert cli.main(["demo", "--help"]) == 0
    assert "count     Count to a number." in capsys.readouterr().out
    assert cli.main(["demo", "count", "--help"]) == 0
    out = capsys.readouterr().out
    assert "jaxsys demo count" in out
    assert "Learning rate" in out
    assert "--json" in out


def test_help_and_version_import_neither_jax_nor_tyro():
    program = (
        "import sys; from jaxsys.cli import main; assert main(['--help']) == 0;"
        "assert main(['--version']) == 0;"
        "heavy = {'jax', 'tyro', 'numpy', 'rich', 'matplotlib'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("name", sorted(cli.GROUPS))
def test_every_group_has_commands_with_help(name, capsys):
    assert cli.main([name, "--help"]) == 0
    assert f"jaxsys {name}" in capsys.readouterr().out


def test_only_the_first_of_several_processes_runs_what_does_not_spread(monkeypatch, capsys):
    monkeypatch.setenv("JAXSYS_PROCESS_ID", "1")
    assert cli.main(["lm", "info", "tiny"]) == 0
    told = capsys.readouterr()
    assert told.out == ""
    assert "process 0" in told.err
    monkeypatch.setenv("JAXSYS_PROCESS_ID", "0")
    assert cli.main(["lm", "info", "tiny"]) == 0
    assert "llama" in capsys.readouterr().out
