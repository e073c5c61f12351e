"""What ``python -m fastclip run`` says at its end. Needs nothing but the standard library, since a process that never
imports torch reports too."""

from __future__ import annotations

import atexit
import json
import multiprocessing.util
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPORT, MAIN = "FASTCLIP_RUN_REPORT", "FASTCLIP_RUN_MAIN"  # in the environment: a folder, and the id of a process
RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


class Report:
    """What this process tells at its end: the one that ``run`` became tells the user, others tell that one.

    Attributes:
        counts: -> what the patch of this process has counted.
        close: closes its records.
    """

    def __init__(self) -> None:
        self.counts: Callable[[], dict[str, Any]] = dict
        self.close: Callable[[], None] = lambda: None

    def register(self) -> None:
        """Report when this process ends, and when one does that it forks."""
        atexit.register(self.at_exit)
        # multiprocessing ends its forks without atexit.
        multiprocessing.util.register_after_fork(self, Report._register_fork)

    def _register_fork(self) -> None:
        multiprocessing.util.Finalize(None, self.at_exit, exitpriority=0)

    def at_exit(self) -> None:
        folder, counts = os.environ.get(REPORT), self.counts()
        self.close()
        if folder is None:
            return
        if os.environ.get(MAIN) == str(os.getpid()):
            print_report(folder, counts)
        elif any(counts.values()):
            os.makedirs(folder, exist_ok=True)
            Path(folder, f"{os.getpid()}-{os.urandom(4).hex()}.json").write_text(json.dumps(counts))


def print_report(folder: str, counts: dict[str, Any]) -> None:
    """One line on stderr for this process and those that have left their counts in `folder`; of several ranks, the
    first one's, and others only if calls went on to torch."""
    reports = [counts] if any(counts.values()) else []
    reports += [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    shutil.rmtree(folder, ignore_errors=True)
    ours: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for report in reports:
        ours.update(report["fastclip"])
        refused.update(report["torch"])
    rank = next((os.environ[name] for name in RANKS if name in os.environ), "0")
    if rank != "0" and not refused:
        return
    sys.stdout.flush()
    compiled = any(report["compiled"] for report in reports)
    print(f"fastclip: {_sentence(ours, refused, compiled, len(reports))}", file=sys.stderr)


def _sentence(ours: Counter[str], refused: Counter[str], compiled: bool, processes: int) -> str:
    parts = [f"{_times(ours.total(), 'clip')} by {_listed(ours)}"] if ours else []
    parts += [f"{_times(count, 'call')} left to torch ({reason})" for reason, count in refused.most_common()]
    parts += ["calls in compiled code, which are not counted"] if compiled else []
    if not parts:
        return "nothing was clipped: none of torch.nn.utils' clipping functions was called"
    return "; ".join(parts) + (f"; in {processes} processes" if processes > 1 else "")


def _times(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _listed(counts: Counter[str]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return " and ".join(f"{name} ({count:,})" for name, count in counts.most_common())
