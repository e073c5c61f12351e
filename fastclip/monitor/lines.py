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
import json
import math
import os
import reprlib
from typing import Any

import torch
from torch import Tensor

from .history import History, Notice, heat

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
    """Numbers for a picture: four digits, and None for what is missing."""
    return [None if gone else float(f"{value:.4g}") for value, gone in zip(values.tolist(), missing.tolist())]


class Lines:
    """Appends lines to a file, each whole before the next begins, so that a crash cuts off one at most.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = open(path, "ab")  # noqa: SIM115 - closed by close()
        self._rows = 0
        if self._file.tell():  # the run before may have been cut off in the middle of a line
            with open(path, "rb") as before:
                before.seek(-1, os.SEEK_END)
                if before.read() != b"\n":
                    self._file.write(b"\n")

    def write(self, line: dict[str, Any]) -> None:
        try:
            text = _encode(line)
        except ValueError:  # rare, so that most lines are not searched for what is not finite
            text = _encode(_plain(line))
        self._file.write(text.encode() + b"\n")
        self._file.flush()

    def rows(self, rows: list[str], norm_type: float) -> None:
        """What the heat map's rows are called, if that has not been written yet: first of all as the header."""
        from .. import __version__

        if not self._rows:
            started = dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds")
            self.write({"fastclip": __version__, "started": started, "norm_type": norm_type, "rows": rows})
        elif self._rows != 1 + len(rows):
            self.write({"rows": rows})
        self._rows = 1 + len(rows)

    def close(self) -> None:
        self._file.close()


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
    known = {row: i for i, row in enumerate(history.rows)}
    history.rows = history.rows + [row for row in rows if row not in known]
    return [known.setdefault(row, len(known)) for row in rows]


def _record(line: dict[str, Any]) -> dict[str, Any]:
    """A step's line, as far as a history needs it."""
    found: dict[str, Any] = {"step": _step(line)}
    for key in ("nonfinite", "total_norm", "coef", *(key for key in ("loss", "limit") if key in line)):
        found[key] = _number(line, key)
    return found | {key: _typed(line, key, bool) for key in ("clipped", "skipped")}


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
