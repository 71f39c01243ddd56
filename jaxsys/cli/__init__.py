"""The command line, `jaxsys GROUP VERB`; no logic lives here.

A group is a module of this package, imported when it is asked for. It holds a table ``COMMANDS``
from verb to (frozen dataclass, function): tyro makes the options from the dataclass, the function
takes the parsed one and returns a JSON-ready dict, an `Outcome`, or None. A group that is one
command has the empty verb.
"""

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jaxsys
from jaxsys.core.errors import UserError

GROUPS = {
    "localsgd": "partial local SGD over slow links: compare, train, plan",
    "lm": "language models as checkpoints: info, convert, eval, generate",
    "nas": "zero-cost architecture search: score, fit, search",
    "merge": "merge models: run, route, conflicts, extract, upcycle, tune",
    "prune": "pruning after training: run, compare, search",
    "edit": "change facts in a model: apply, evaluate, curve, trace, stats",
    "moe": "mixtures of experts, planned and pipelined: plan, profile, train",
    "pipeline": "training over unequal devices and slow links: plan, train",
    "ground": "which of several 3D objects a description means: prepare, train, evaluate",
    "offload": "inference with CPU and accelerator: plan, generate",
    "bench": "where the time goes: train, finetune, serve, modules, ops, comm, static, report",
    "launch": "run any command in N local processes, or join a multi-host job",
    "doctor": "say what this machine can do, and how to get the rest",
}

_USAGE = """usage: jaxsys GROUP VERB [OPTIONS]

{version}: published systems for efficient large models as pure JAX functions.

groups:
{groups}

  jaxsys GROUP --help         lists the verbs of a group
  jaxsys GROUP VERB --help    lists the options of a verb
  jaxsys --version            prints the version

Every command takes --json: one JSON object on standard output, progress on standard error.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
      argv: the arguments after the program's name; those of this process if left out.

    Returns:
      The exit status: 0, 2 for a mistake of the user (one sentence on standard error), 130 after
      Ctrl-C, or what the command itself gives.

    >>> main(["--version"])
    jaxsys 0.1.0
    0
    """
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"jaxsys: error: {' '.join(str(error).split())}", file=sys.stderr)
        if "jaxsys.cluster.join" in sys.modules:  # a member of a job must not wait for the others
            sys.modules["jaxsys.cluster.join"].abandon(2)
        return 2
    except KeyboardInterrupt:
        print("jaxsys: interrupted", file=sys.stderr)
        return 130


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:<10}{text}" for name, text in GROUPS.items()]
        print(_USAGE.format(version=_version(), groups="\n".join(lines)), end="")
        return 0
    if argv[0] == "--version":
        print(_version())
        return 0
    group, *rest = argv
    if group not in GROUPS:
        raise UserError(f"{group!r} is no command group; expected one of {', '.join(GROUPS)}")
    module = importlib.import_module(f"jaxsys.cli.{group}")
    commands: dict[str, tuple[Any, Any]] = module.COMMANDS
    if "" in commands:
        return _run(f"jaxsys {group}", *commands[""], rest)
    if not rest or rest[0] in ("-h", "--help"):
        print(f"usage: jaxsys {group} VERB [OPTIONS]\n\n{GROUPS[group]}\n\nverbs:")
        for verb, (config, _) in commands.items():
            print(f"  {verb:<10}{(config.__doc__ or '').strip().splitlines()[0]}")
        return 0
    verb, *rest = rest
    if verb not in commands:
        raise UserError(f"{verb!r} is no verb of {group}; expected one of {', '.join(commands)}")
    return _run(f"jaxsys {group} {verb}", *commands[verb], rest)


def _run(program: str, config_type: Any, run: Any, arguments: list[str]) -> int:
    import tyro

    from jaxsys.cli.options import Outcome, is_idle, make_out
    from jaxsys.core.report import to_json

    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            config = tyro.cli(
                config_type, prog=program, args=arguments, config=(tyro.conf.OmitArgPrefixes,)
            )
    except SystemExit as stop:  # --help, or a mistake
        _raise_own(stop)
        sys.stderr.write(told.getvalue())
        return int(stop.code or 0)
    if is_idle(config):
        print(f"{program} runs on process 0; this one has nothing to do", file=sys.stderr)
        return 0
    make_out(config)
    if not config.json:
        found = run(config)
        return found.exit_code if isinstance(found, Outcome) else 0
    with _stdout_on_stderr():
        found = run(config)
    outcome = found if isinstance(found, Outcome) else Outcome(found)
    if outcome.result is not None:
        print(to_json(outcome.result), flush=True)
    return outcome.exit_code


def _raise_own(error: BaseException) -> None:
    """Raise the mistake that a part of the options refused: one sentence, not tyro's box."""
    cause = error.__context__
    while cause is not None:
        if isinstance(cause, UserError):
            raise cause from None
        cause = cause.__context__


@contextlib.contextmanager
def _stdout_on_stderr() -> Iterator[None]:
    """Send everything printed, by C++ libraries too, to standard error."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def _version() -> str:
    return f"jaxsys {jaxsys.__version__}"
