"""The records of a patch: a GradMonitor for each set of parameters that is clipped."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from pathlib import Path

from ..monitor import GradMonitor
from ..stats import Stats
from .clippers import ParameterSet

MOST_FILES = 16


class Records:
    """Writes ``run.jsonl``, and of further sets of parameters ``run-2.jsonl`` and so on.

    Args:
        target: the file; or a monitor, for the first set; None: nothing is recorded.

    Raises:
        OSError: the file's folder is not there, or it is a folder itself.
    """

    def __init__(self, target: str | os.PathLike[str] | GradMonitor | None) -> None:
        self._given = target if isinstance(target, GradMonitor) else None
        self._path = None if target is None or isinstance(target, GradMonitor) else checked_path(target)
        self._monitors: weakref.WeakKeyDictionary[ParameterSet, GradMonitor] = weakref.WeakKeyDictionary()
        self._own: weakref.WeakSet[GradMonitor] = weakref.WeakSet()
        self._count, self._closed, self._lock = 0, False, threading.RLock()

    def update(self, parameters: ParameterSet, stats: Stats) -> None:
        """Take note of a clip; not after :meth:`close`."""
        with self._lock:
            if self._closed:
                return
            monitor = self._monitors.get(parameters)
            if monitor is None:
                monitor = self._new_monitor()
                if monitor is None:
                    return
                self._monitors[parameters] = monitor
            monitor.update(stats)

    def _new_monitor(self) -> GradMonitor | None:
        if self._given is not None:
            given, self._given = self._given, None
            return given
        if self._path is None or self._count >= MOST_FILES:
            return None
        self._count += 1
        suffix = f"-{self._count}" if self._count > 1 else ""
        path = self._path.with_name(f"{self._path.stem}{suffix}{self._path.suffix}")
        try:
            monitor = GradMonitor(path)
        except (OSError, ValueError) as error:  # training goes on
            self._path = None
            warnings.warn(f"record: nothing is recorded here: {error}", RuntimeWarning, stacklevel=8)
            return None
        self._own.add(monitor)
        return monitor

    def close(self) -> None:
        """Close the files, but no monitor that was given. More calls do nothing."""
        with self._lock:
            self._closed = True
            for monitor in list(self._own):
                monitor.close()


def checked_path(target: str | os.PathLike[str]) -> Path:
    """`target` as the path of a file that can be made; OSError if it cannot."""
    path = Path(target)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"record: there is no folder {str(path.parent)!r} to write {path.name!r} in")
    if path.is_dir():
        raise IsADirectoryError(f"record must be a file, {str(path)!r} is a folder")
    return path
