"""``python -m fastclip run``: a script, or any command and its children, with torch patched in every process.

The command runs as it would without, in an environment that has the folder ``startup`` on PYTHONPATH: its
``sitecustomize.py``, which Python runs at its start, waits for torch and calls :func:`begin`. So processes that a
command spawns are reached too, whatever spawns them, unless they are told to ignore PYTHONPATH (``python -I``).
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .. import rules
from .clippers import Clippers, RuleSpec
from .records import checked_path
from .startup.report import MAIN, REPORT, Report, print_report
from .torch_patch import patch_torch

STARTUP = Path(__file__).parent / "startup"
RULE, RECORD = "FASTCLIP_RUN_RULE", "FASTCLIP_RUN_RECORD"  # in the environment of its processes
_RULES = {
    name: rule
    for name, rule in sorted(vars(rules).items())
    if isinstance(rule, type) and issubclass(rule, rules.Rule) and rule not in (rules.Rule, rules.InPlaceRule)
}

USAGE = """\
python -m fastclip run [--rule RULE] [--record FILE] SCRIPT [ARGS]
       python -m fastclip run [--rule RULE] [--record FILE] -m MODULE [ARGS]
       python -m fastclip run [--rule RULE] [--record FILE] -- COMMAND [ARGS]"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = USAGE
    parser.add_argument(
        "--rule",
        help="takes the place of the limit that the program passes: a number, a rule such as ZClip or "
        "'ZClip(z_max=3)', or a list, '[Mask(1e-8), GlobalNorm(max_norm)]', in which max_norm is that limit",
    )
    parser.add_argument("--record", metavar="FILE", help="keep a record of all clips, for python -m fastclip plot")
    parser.add_argument("-m", dest="module", action="store_true", help="what follows is a module, as python -m has it")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the script, or after -- any command")


def run(arguments: argparse.Namespace) -> int:
    """Run a script, a module or any command, unchanged, with fastclip in the place of torch's clipping functions."""
    any_command = arguments.command[:1] == ["--"]
    command = arguments.command[any_command:]
    try:
        if not command or (any_command and arguments.module):
            raise ValueError(f"nothing to run\nusage: {USAGE}")
        if sys.flags.ignore_environment or sys.flags.no_site:
            raise ValueError(
                "python -I, -E and -S leave PYTHONPATH or sitecustomize out, by which children are reached"
            )
        environment = {**os.environ, "PYTHONPATH": _joined(str(STARTUP), os.environ.get("PYTHONPATH"))}
        for name in (RULE, RECORD, MAIN):
            environment.pop(name, None)
        environment[REPORT] = str(Path(tempfile.gettempdir()) / f"fastclip-run-{os.getpid()}-{os.urandom(4).hex()}")
        if arguments.rule is not None:
            rule_of(arguments.rule)
            environment[RULE] = arguments.rule
        if arguments.record is not None:
            environment[RECORD] = os.path.abspath(checked_path(arguments.record))
        if not any_command:
            if not arguments.module and not os.path.exists(command[0]):
                raise FileNotFoundError(f"there is no script {command[0]!r}")
            flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
            flags += ["-u"] if getattr(sys.stdout, "write_through", False) else []  # which torchrun adds
            command = [sys.executable, *flags, *(["-m"] if arguments.module else []), *command]
            environment[MAIN] = str(os.getpid())
    except (OSError, TypeError, ValueError) as error:
        print(f"fastclip run: {error}", file=sys.stderr)
        return 2
    sys.stdout.flush()
    sys.stderr.flush()
    if not any_command and os.name == "posix":
        os.execve(command[0], command, environment)  # the process stays the one that a launcher watches
    return _supervised(command, environment)


def _joined(folder: str, others: str | None) -> str:
    return os.pathsep.join([folder, others]) if others else folder


def _supervised(command: list[str], environment: dict[str, str]) -> int:
    """Run a command, and report for all of its processes. Returns its exit status as a shell has it."""
    environment.pop(MAIN, None)
    try:
        process = subprocess.Popen(command, env=environment)
    except OSError as error:
        print(f"fastclip run: {command[0]!r} cannot be run: {error.strerror}", file=sys.stderr)
        return 127
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the command too
    signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    status = process.wait()
    print_report(environment[REPORT], {})
    return status if status >= 0 else 128 - status


def rule_of(text: str) -> RuleSpec:
    """What ``--rule`` says: a rule, a number or a list; or a function from ``max_norm`` to one, if it has that word.

    Raises:
        ValueError: it says something else.
    """
    try:
        code = compile(text.strip(), "--rule", "eval")

        def made(max_norm: Any) -> Any:
            value = eval(code, {"__builtins__": {}}, {**_RULES, "inf": math.inf, "max_norm": max_norm})
            items = value if isinstance(value, (list, tuple)) else [value]
            items = [item() if isinstance(item, type) else item for item in items]  # ZClip is ZClip()
            return items if isinstance(value, (list, tuple)) else items[0]

        rule = made(1.0)
        Clippers(rule)  # raises for what is no rule, or goes by names of parameters
    except Exception as error:
        raise ValueError(
            f"--rule {text!r} is neither a number nor made of fastclip's rules ({', '.join(_RULES)}): {error}"
        ) from error
    return made if "max_norm" in code.co_names else rule


def begin(report: Report) -> None:
    """Patch torch as the environment of ``run`` has it. Called once torch is imported, by ``startup/sitecustomize.py``,
    with what is to report at the end of the process."""
    rule = os.environ.get(RULE)
    patch = patch_torch(None if rule is None else rule_of(rule), record=os.environ.get(RECORD))
    report.counts, report.close = patch.counts, patch.close
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=patch.after_fork)
