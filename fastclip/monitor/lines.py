"""The record of a run as JSON lines: written one line a step, read back from a run that ended, crashed or still runs.

Four kinds of lines, told apart by a key only they have:

    {"fastclip": "0.1.0", "started": "...", "norm_type": 2.0, "rows": [...]}   the header: what the heat map shows
    {"step": 7, "loss": 2.1, "total_norm": 1.9, "coef": 0.53, ...}             a step: Stats.log(), and more
    {"step": 7, "warning": "spike", "message": "..."}                          a warning
    {"rows": [...]}                                                            the rows anew: gradients came later

A number that is not finite is the string "nan", "inf" or "-inf", as JSON has no word for it and float() reads those.
Every tenth step has ``row_norms`` and ``row_absmax`` too: of each row the largest norm and element since the last that
had them, null without gradients. A run that goes on in the same file begins with a new header, and its steps replace
those from there on.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import os
from typing import Any

import torch
from torch import Tensor

from .history import History, Notice, heat

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

    A last line that was cut off is left out, also where another run goes on after it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else, or no step; the message names file and line.
    """
    history, begun, cut = History(size), False, ""
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
                _take(history, line)
            except (KeyError, TypeError, ValueError) as error:
                what = f"{error} is missing" if isinstance(error, KeyError) else error
                raise ValueError(f"{os.fspath(path)}, line {number}: no line of a fastclip record: {what}") from None
        else:
            cut = ""
    if cut:
        raise ValueError(cut)
    if not history.spans:
        raise ValueError(f"{os.fspath(path)}: there is no step in it")
    return history


def _parsed(text: bytes) -> dict[str, Any]:
    line = json.loads(text)
    if not isinstance(line, dict):
        raise ValueError(f"{type(line).__name__} where an object should be")
    return line


def _take(history: History, line: dict[str, Any]) -> None:
    if "rows" in line:
        history.rows = [str(row) for row in line["rows"]]
        history.norm_type = float(line.get("norm_type", history.norm_type))
    elif "warning" in line:
        history.warnings.append(Notice(int(line["step"]), line["warning"], line["message"]))
    else:
        for key in ("loss", "total_norm", "limit", "coef"):
            if key in line:
                line[key] = float(line[key])
        history.add(line, _norms(line["row_norms"]) if "row_norms" in line else None)


def _norms(values: list[Any]) -> Tensor:
    missing = torch.tensor([value is None for value in values], dtype=torch.bool)
    return heat(torch.tensor([0.0 if value is None else float(value) for value in values]), missing)
