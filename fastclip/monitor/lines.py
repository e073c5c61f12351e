"""The record of a run as JSON lines: written one line a step, read back from a run that ended, crashed or still runs.

Four kinds of lines, told apart by a key only they have:

    {"fastclip": "0.1.0", "started": "...", "norm_type": 2.0, "rows": [...]}   the header: what the heat map shows
    {"step": 7, "loss": 2.1, "total_norm": 1.9, "coef": 0.53, ...}             a step: Stats.log(), and more
    {"step": 7, "warning": "spike", "message": "..."}                          a warning
    {"rows": [...]}                                                            the rows anew: gradients came later

A number that is not finite is the string "nan", "inf" or "-inf", as JSON has no word for it and float() reads those.
Every tenth step has ``row_norms`` and ``row_absmax`` too: of each row that the last header or rows line names the
largest norm and element since the last step that had them, null without gradients. A run that goes on in the same file
begins with a new header, and its steps replace those from there on; what is left of the run before keeps its own rows.
"""

from __future__ import annotations

import datetime as dt
import errno
import json
import math
import os
import reprlib
import weakref
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from ..version import __version__
from .history import History, Notice, heat

try:
    import fcntl
except ImportError:  # on Windows: there, only writers of one process notice each other
    fcntl = None  # type: ignore[assignment]

MOST_STEPS = 2**63  # which the largest step is below
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def _plain(value: Any) -> Any:
    """`value` with numbers that are not finite as strings."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def brief(values: Tensor, missing: Tensor) -> list[float | None]:
    """HostStats for a picture: four digits, and None for what is missing."""
    return [None if gone else float(f"{value:.4g}") for value, gone in zip(values.tolist(), missing.tolist())]


class Lines:
    """Appends lines to a file, each whole before the next begins, so that a crash cuts off one at most.

    A file has one writer at a time: a second one in this process, or in another where there is fcntl, is refused while
    the first has it open. A copy (by pickle or copy.deepcopy) opens the file at its first line, and goes on there after
    a header of its own. One that has written nothing yet lets go of the file when it is copied: of it and its copies,
    the first to write has the file.

    Args:
        path: of the file.
        later: open it at the first line, instead of now.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it has a writer; also at a line, where the file was to be opened later.
    """

    _writers: ClassVar[weakref.WeakValueDictionary[tuple[int, int], Lines]] = weakref.WeakValueDictionary()

    def __init__(self, path: str | os.PathLike[str], later: bool = False) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._rows = self._process = 0
        if not later:
            self._opened()

    def _opened(self) -> BinaryIO:
        if self.writer(self._path) is not None:
            raise ValueError(
                f"path {os.fspath(self._path)!r} is open in another monitor of this process: close() it first"
            )
        file = open(self._path, "ab")  # noqa: SIM115 - closed by close()
        try:
            if file.tell():  # the run before may have been cut off in the middle of a line
                with open(self._path, "rb") as before:
                    before.seek(-1, os.SEEK_END)
                    if before.read() != b"\n":
                        file.write(b"\n")
            if not _locked(file):  # last, since closing any other handle of the file would give the lock back
                raise ValueError(
                    f"path {os.fspath(self._path)!r} is open in a monitor of another process. (Where the ranks of "
                    f"torch.distributed make a monitor each, initialize the process group before: then only rank 0 "
                    f"writes.)"
                )
        except BaseException:
            file.close()
            raise
        self._writers[_key(os.fstat(file.fileno()))] = self
        self._file, self._process = file, os.getpid()
        return file

    @classmethod
    def writer(cls, path: str | os.PathLike[str]) -> Lines | None:
        """The one of this process that has the file open."""
        try:
            found = cls._writers.get(_key(os.stat(path)))
        except OSError:
            return None
        return found if found is not None and found._file is not None and found._process == os.getpid() else None

    def write(self, line: dict[str, Any]) -> None:
        file = self._opened() if self._file is None else self._file
        if self._process != os.getpid():
            raise OSError(f"{os.fspath(self._path)} is written by process {self._process}, of which this is a fork")
        try:
            text = _encode(line)
        except ValueError:  # rare, so that most lines are not searched for what is not finite
            text = _encode(_plain(line))
        file.write(text.encode() + b"\n")
        file.flush()

    def rows(self, rows: list[str], norm_type: float) -> None:
        """What the heat map's rows are called, if that has not been written yet: first of all as the header."""

        if not self._rows:
            started = dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds")
            self.write({"fastclip": __version__, "started": started, "norm_type": norm_type, "rows": rows})
        elif self._rows != 1 + len(rows):
            self.write({"rows": rows})
        self._rows = 1 + len(rows)

    def relock(self) -> None:
        """Lock the file again: the lock is lost when any handle of the file in this process is closed."""
        if self._file is not None:
            _locked(self._file)

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            if self._process == os.getpid():
                self._writers.pop(_key(os.fstat(file.fileno())), None)
            file.close()

    def __getstate__(self) -> dict[str, Any]:
        if not self._rows:
            self.close()
        return {"_path": self._path, "_file": None, "_rows": 0, "_process": 0}


def _key(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _locked(file: BinaryIO) -> bool:
    """Lock the file for this process, unless another process has; true where files cannot be locked.

    Unlike flock's, such a lock is not inherited by the processes that a DataLoader forks: those may outlive a run that
    was killed, and its successor must not be refused because of them.
    """
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def writes() -> bool:
    """Whether this process is the one of its process group that writes files: rank 0, or there is no group."""
    group = torch.distributed
    return not (group.is_available() and group.is_initialized() and group.get_rank() > 0)


def load(path: str | os.PathLike[str], size: int = 4096) -> History:
    """The record in a file of :class:`fastclip.monitor.GradMonitor`'s, thinned to `size` spans.

    A last line that was cut off is left out, also where another run goes on after it. Rows of the heat map are matched
    by name where a run went on with other gradients, and are NaN where they had no gradient.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else, or no step; the message names file and line.
    """
    history, begun, cut = History(size), False, ""
    which: list[int] = []  # of the history's rows, those that the last header names
    writer = Lines.writer(path)
    with open(path, "rb") as file:
        for number, text in enumerate(file, 1):
            try:
                line = _parsed(text)
            except ValueError as error:
                if cut:
                    break
                cut = f"{os.fspath(path)}, line {number}: not a whole line of JSON ({error})"
                continue
            if cut and "fastclip" not in line:
                break
            begun, cut = begun or "fastclip" in line, ""
            try:
                if not begun:
                    raise ValueError("a record begins with a header, which has the key 'fastclip'")
                if "rows" in line or "fastclip" in line:
                    which = _rows(history, line)
                elif "warning" in line:
                    kind, message = (_typed(line, key, str) for key in ("warning", "message"))
                    history.warnings.append(Notice(_step(line), kind, message))
                else:
                    history.add(_record(line), _norms(history, line, which) if "row_norms" in line else None)
            except (KeyError, ValueError) as error:
                what = f"{error} is missing" if isinstance(error, KeyError) else error
                raise ValueError(f"{os.fspath(path)}, line {number}: no line of a fastclip record: {what}") from None
        else:
            cut = ""
    if writer is not None:
        writer.relock()
    if cut:
        raise ValueError(cut)
    if not history.spans:
        raise ValueError(f"{os.fspath(path)}: there is no step in it")
    history.forget_rows(which)
    return history


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(line, dict):
        raise ValueError(f"{type(line).__name__} where an object should be")
    return line


def _rows(history: History, line: dict[str, Any]) -> list[int]:
    """Which of the history's rows those of this line are; new ones are added, since columns keep the rows they had."""
    rows = _typed(line, "rows", list)
    if not all(isinstance(row, str) for row in rows) or len(set(rows)) < len(rows):
        raise ValueError(f"rows must be different names, got {reprlib.repr(rows)}")
    if "norm_type" in line:
        norm_type = _number(line, "norm_type")
        if not norm_type >= 0:
            raise ValueError(f"norm_type must be >= 0, got {norm_type}")
        history.norm_type = norm_type
    positions = {row: i for i, row in enumerate(history.rows)}
    history.rows = history.rows + [row for row in rows if row not in positions]
    return [positions.setdefault(row, len(positions)) for row in rows]


def _record(line: dict[str, Any]) -> dict[str, Any]:
    """A step's line, as far as a history needs it."""
    record: dict[str, Any] = {"step": _step(line)}
    for key in ("nonfinite", "total_norm", "coef", *(key for key in ("loss", "limit") if key in line)):
        record[key] = _number(line, key)
    return record | {key: _typed(line, key, bool) for key in ("clipped", "skipped")}


def _norms(history: History, line: dict[str, Any], which: list[int]) -> Tensor:
    """The norms of a line as a column of the history's heat map."""
    values = _typed(line, "row_norms", list)
    if len(values) > len(which):
        raise ValueError(f"row_norms has {len(values)} numbers, and there are {len(which)} rows")
    norms = torch.tensor(
        [0.0 if value is None else _number(line, "row_norms", value) for value in values],
        dtype=torch.float64,
        device="cpu",
    )
    missing = torch.tensor([value is None for value in values], dtype=torch.bool, device="cpu")
    column = torch.full((len(history.rows),), math.nan, device="cpu", dtype=torch.float32)
    column[which[: len(values)]] = heat(norms, missing)
    return column


def _step(line: dict[str, Any]) -> int:
    step = line["step"]
    if type(step) is not int or not 0 <= step < MOST_STEPS:
        raise ValueError(f"step must be an int from 0 to {MOST_STEPS - 1}, got {reprlib.repr(step)}")
    return step


def _number(line: dict[str, Any], key: str, *item: Any) -> float:
    """The number at `key`, or an item of the list there."""
    value = item[0] if item else line[key]
    if type(value) not in (int, float) and value not in ("nan", "inf", "-inf"):
        raise ValueError(f"{key} must be a number, got {reprlib.repr(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{key} must be a number that a float can hold") from None


def _typed(line: dict[str, Any], key: str, kind: type) -> Any:
    if type(line[key]) is not kind:
        raise ValueError(f"{key} must be a {kind.__name__}, got {reprlib.repr(line[key])}")
    return line[key]
