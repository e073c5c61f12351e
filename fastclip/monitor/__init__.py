"""Watch loss and gradient norm together while training, without making it wait.

    monitor = fastclip.monitor.GradMonitor("run.jsonl")
    ...
    monitor.update(clipper.step(optimizer), loss)

:func:`load` reads such a file back, and ``python -m fastclip plot run.jsonl`` draws it.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import math
import numbers
import os
import warnings
import weakref
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..backends import capturing
from ..stats import Stats
from .alarms import Alarms, GradientWarning, Seen
from .history import History, Notice, Span, heat
from .lines import MOST_STEPS, Lines, brief, load, writes
from .loggers import Logger, loggers
from .pending import PendingRead
from .rows import Maxima, Register, top_norms

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GradMonitor", "GradientWarning", "History", "Notice", "Span", "load"]

SCALARS = {  # what loggers call the numbers of a record
    "loss": "loss", "total_norm": "grad/norm", "limit": "grad/limit", "coef": "grad/coef",
    "nonfinite": "grad/nonfinite",
}  # fmt: skip


class GradMonitor:
    """Keeps, writes and judges what the statistics of each step say, a step or more late so that nothing waits.

    On a GPU every step's statistics are copied to the host behind what was launched before, and taken up in the first
    :meth:`update` that finds them there. On a CPU they are taken up four at a time, since the first of them finds cold
    caches, and whenever an attribute is looked at. Steps are taken up in order.

    A run that ends without :meth:`close`, and a monitor that is collected without it, take up the steps on their way
    too. Once a torch.distributed process group is initialized, every rank keeps and judges what it is given, but only
    rank 0 writes `path` and calls what `log` names, unless `every_rank` says otherwise.

    A copy (by pickle, which a checkpoint may hold, or by copy.deepcopy) has all settings, the history and what the
    warnings go by; the steps on their way are waited for and taken up before. It opens `path` again at the next step it
    takes up, and goes on there as a resumed run does. But a file has one writer: if another monitor has it open then,
    the copy warns, and writes nothing from then on. Of a monitor that has written nothing yet and its copies, the first
    that writes has the file. What `log` names is shared by a deep copy; of a pickled monitor only folders travel, and
    :meth:`log_to` takes others.

    Args:
        path: a file to append JSON lines to, one a step; :mod:`fastclip.monitor.lines` says what is in them. If it
            cannot be written any more (a full disk), training goes on without, after a warning.
        log: where scalars go: a ``SummaryWriter``, a wandb run, something with ``log_metrics`` (Lightning's loggers,
            mlflow) or ``log`` (an ``Accelerator``), a function of a dict and a step, a folder for TensorBoard to read,
            or a list of such. In wandb, they are drawn over ``grad/step``; do not pass ``step=``
            to the run's own ``log()`` beside it, which drops what is below the number of rows logged so far.
        log_every: steps between two calls of these.
        history: how many spans of steps are kept to draw from (an even number). Longer runs get coarser: when so many
            are kept, neighbours become one, with the mean and the extremes of both.
        rows_every: how many steps a column of the heat map is made of: the largest norm in them of each gradient.
        rows: how many rows it has at most; more gradients than that share them, by the beginning of their names.
        window: how many steps back warnings and :attr:`clip_rate` look.
        adam_eps: Adam's, to warn where it swallows the clipped gradients; None for other optimizers.
        elements: how many elements the gradients have together, to judge that by their root mean square; without it,
            by their largest element.
        every_rank: write and log on every rank of torch.distributed. Give each a `path` and a folder of its own.

    Attributes:
        missed: how many steps were left out because 256 others were still on their way from a GPU.

    Raises:
        TypeError, ValueError: an argument of another kind, named with its value; another monitor has `path` open.
        OSError: `path` cannot be opened.
        ImportError: `log` is a folder and there is no TensorBoard.

    Example:
        >>> with fastclip.monitor.GradMonitor("run.jsonl") as monitor:
        ...     for batch in batches:
        ...         loss = ...
        ...         monitor.update(clipper.step(optimizer), loss)
    """

    MOST_PENDING = 256
    TOGETHER = 4  # on a CPU
    _closed = True  # until it is made
    _every_rank = False
    _targets: list[Any]  # what `log` names
    _loggers: list[Logger] | None  # made of them; None: to be made, in a copy
    _own: list[Any]  # those that are ours to close

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        log: Any = None,
        log_every: int = 10,
        history: int = 4096,
        rows_every: int = 10,
        rows: int = 256,
        window: int = 100,
        adam_eps: float | None = 1e-8,
        elements: int | None = None,
        every_rank: bool = False,
    ) -> None:
        self._every_rank = bool(every_rank)
        self.log_every, self.rows_every = _count(log_every, "log_every"), _count(rows_every, "rows_every")
        self.window = _count(window, "window")
        if adam_eps is not None and not (_is_number(adam_eps) and adam_eps >= 0):
            raise ValueError(f"adam_eps must be a number >= 0 or None, got {adam_eps!r}")
        elements = None if elements is None else _count(elements, "elements")
        self._history = History(_count(history, "history", 2))
        self._last: dict[str, Any] = {}
        self._skips = self.missed = 0
        self._register = Register(_count(rows, "rows"))
        self._maxima = Maxima(self._register)
        self._alarms = Alarms(self.window, adam_eps, elements)
        self._clipped: deque[bool] = deque(maxlen=self.window)
        self._pending: deque[PendingRead] = deque()
        self._next = self._seen = 0
        self._own = []
        self.log_to(log)
        self._lines = None if path is None else Lines(path, later=not self._writes())
        self._begun()

    def _begun(self, closed: bool = False) -> None:
        self._closed, self._process = closed, os.getpid()
        self._at_exit = functools.partial(_at_exit, weakref.ref(self))
        if not closed:
            atexit.register(self._at_exit)

    def log_to(self, log: Any) -> None:
        """Send scalars to `log` from now on, instead of where they went before: as the argument of the constructor."""
        targets = list(log) if isinstance(log, (list, tuple)) else [] if log is None else [log]
        found, own = loggers(targets, folders=self._writes())
        for writer in self._own:
            writer.close()
        self._targets, self._loggers, self._own = targets, found, own

    def update(self, stats: Stats | None, loss: Tensor | float | None = None, step: int | None = None) -> None:
        """Take note of a step, once its numbers have come to the host. Never waits for the device.

        Args:
            stats: what ``clip_()`` or ``step()`` returned (``optimizer.stats`` with :mod:`fastclip.optim`). Copied now:
                a replay of a CUDA graph may overwrite it afterwards. With None nothing has happened: a wrapped
                optimizer accumulates.
            loss: one number, on any device.
            step: its number, below 2**63; one more than the last unless told, from 0. One that is not above the last
                takes up a run from there: what was recorded from that step on is forgotten, and superseded in the file.

        Raises:
            TypeError, ValueError: an argument of another kind, named with its value.
            RuntimeError: after :meth:`close`, or while a CUDA graph is captured.

        Warns:
            GradientWarning: of steps just taken up.
        """
        if stats is None:
            return
        if not isinstance(stats, Stats):
            raise TypeError(f"stats must be a fastclip.Stats, got {type(stats).__name__} {stats!r}")
        if self._closed:
            raise RuntimeError("update() after close()")
        if capturing(stats.device):
            raise RuntimeError("update() cannot be captured in a CUDA graph: call it after each replay")
        on_device, on_host = _loss(loss)
        step = self._next if step is None else _count(step, "step", 0)
        if step >= MOST_STEPS:
            raise ValueError(f"step must be < 2**63, got {step}")
        self._next = step + 1
        notices = self._drain() if len(self._pending) >= self.MOST_PENDING else []
        if len(self._pending) < self.MOST_PENDING:
            self._pending.append(PendingRead.start(step, stats, on_host, on_device))
        else:
            self.missed += 1
        if self._pending[0].stats is None or len(self._pending) >= self.TOGETHER:
            notices += self._drain()
        _warn(notices, 3)

    @property
    def history(self) -> History:
        """The run so far."""
        return self._looked_at()._history

    @property
    def last(self) -> dict[str, Any]:
        """The numbers of the last step taken up, as in the JSON lines; {} before."""
        return self._looked_at()._last

    @property
    def skips(self) -> int:
        """How many updates were skipped."""
        return self._looked_at()._skips

    @property
    def clip_rate(self) -> float:
        """The share of the window's steps in which gradients were changed; NaN before the first."""
        clipped = self._looked_at()._clipped
        return sum(clipped) / len(clipped) if clipped else math.nan

    @property
    def top_norms(self) -> dict[str, float]:
        """The gradients with the largest norms in the last step taken up, by name (or index), the largest first."""
        return self.last.get("top_norms", {})

    @property
    def warnings(self) -> list[Notice]:
        """The last hundred warnings: step, kind and message of each."""
        return list(self.history.warnings)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw loss, norm, coefficient and a heat map of norms over the steps taken up so far.

        Args:
            path: where to save it: .png, .pdf or .svg.

        Returns:
            A matplotlib figure.

        Raises:
            ImportError: there is no matplotlib.
            ValueError: no step has been taken up yet.
        """
        from .plot import draw

        return draw(self.history, path)

    def _looked_at(self) -> GradMonitor:
        """Take up what is on the host before somebody looks."""
        _warn(self._drain(), 4)
        return self

    def close(self) -> None:
        """Wait for the steps on their way, take them up, and close the file. More calls do nothing."""
        _warn(self._finished(), 3)

    def __enter__(self) -> GradMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            _warn(self._finished(), 3)
        except Exception:
            if kind is None:  # otherwise the loop's own error is the one to hear of: a broken GPU fails here too
                raise

    def _finished(self) -> list[Notice]:
        try:
            return [] if self._closed else self._drain(wait=True)
        finally:
            self._closed = True
            atexit.unregister(self._at_exit)
            self._pending.clear()
            if self._lines:
                self._lines.close()
            for writer in self._own:
                writer.close()

    def _ended(self) -> None:
        """What :meth:`close` does, where nobody calls it: it raises and says nothing, and leaves forks alone."""
        if not self._closed and self._process == os.getpid():
            with contextlib.suppress(Exception):  # a broken GPU or disk has been heard of, or never will be
                self._finished()

    __del__ = _ended

    def __getstate__(self) -> dict[str, Any]:
        _warn(self._drain(wait=True), 3)
        folders = [os.fspath(target) for target in self._targets if isinstance(target, (str, os.PathLike))]
        left = [type(target).__name__ for target in self._targets if not isinstance(target, (str, os.PathLike))]
        state = {**self.__dict__, "_targets": folders, "_loggers": None, "_own": [], "left": left}
        del state["_at_exit"], state["_process"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state, left = {**state}, state["left"]
        del state["left"]
        self.__dict__.update(state)
        self._begun(state["_closed"])
        if left:
            warnings.warn(
                f"a pickled monitor's log takes only folders along, so these are gone: {', '.join(left)}. Give them to "
                f"log_to()",
                GradientWarning,
                stacklevel=2,
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> GradMonitor:
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__({**copy.deepcopy(self.__getstate__(), memo), "left": []})
        copied._targets = list(self._targets)
        return copied

    def __copy__(self) -> GradMonitor:
        return copy.deepcopy(self)

    def _drain(self, wait: bool = False) -> list[Notice]:
        """Take up the steps whose numbers have come."""
        notices = []
        while self._pending:
            event = self._pending[0].event
            if event is not None and not event.query():
                if not wait:
                    break
                event.synchronize()
            notices += self._take(self._pending.popleft())
        return notices

    def _take(self, pending: PendingRead) -> list[Notice]:
        read = pending.read()
        loss = read.loss if pending.loss is None else pending.loss
        index = self._register.index(read.keys)
        record: dict[str, Any] = {"step": pending.step} | ({} if loss is None else {"loss": loss}) | read.log()
        record["top_norms"] = top_norms(read)
        kinds_and_messages = self._alarms.update(Seen(record, read, index, self._register.names))
        notices = [Notice(pending.step, kind, message) for kind, message in kinds_and_messages]

        self._last = record
        self._maxima.add(index, read)
        self._skips += record["skipped"]
        self._clipped.append(record["clipped"])
        cells = None
        if self._seen % self.rows_every == 0 or notices:  # what led to a warning must not be lost in a crash
            norms, absmax, missing = self._maxima.take(read.layout.norm_type)
            cells = heat(norms, missing)
            record = {**record, "row_norms": brief(norms, missing), "row_absmax": brief(absmax, missing)}
        self._history.rows, self._history.norm_type = self._register.rows, read.layout.norm_type
        self._history.add(record, cells)
        self._history.warnings.extend(notices)
        if self._lines and self._writes():
            notices += self._write(self._lines, record, notices)
        self._seen += 1
        if (self._seen - 1) % self.log_every == 0 and self._writes():
            scalars = {name: record[key] for key, name in SCALARS.items() if key in record}
            scalars |= {"grad/clip_rate": sum(self._clipped) / len(self._clipped), "grad/skips": self._skips}
            if self._loggers is None:
                self.log_to(self._targets)
            for logger in self._loggers or ():
                logger(scalars, pending.step)
        return notices

    def _writes(self) -> bool:
        return self._every_rank or writes()

    def _write(self, lines: Lines, record: dict[str, Any], notices: list[Notice]) -> list[Notice]:
        try:
            lines.rows(self._history.rows, self._history.norm_type)
            lines.write(record)
            for step, kind, message in notices:
                lines.write({"step": step, "warning": kind, "message": message})
        except (OSError, ValueError) as error:
            self._lines = None
            with contextlib.suppress(OSError):
                lines.close()
            failed = Notice(record["step"], "file", f"the record ends here, training goes on without it: {error}")
            self._history.warnings.append(failed)
            return [failed]
        return []


def _at_exit(monitor: weakref.ref[GradMonitor]) -> None:
    if (left := monitor()) is not None:
        left._ended()


def _warn(notices: list[Notice], stacklevel: int) -> None:
    for step, _, message in notices:
        warnings.warn(f"step {step}: {message}", GradientWarning, stacklevel)


def _loss(loss: Any) -> tuple[Tensor | None, float | None]:
    """`loss` as a tensor, if reading it may mean to wait, or else as a number."""
    if isinstance(loss, Tensor):
        if loss.numel() != 1 or loss.is_complex():
            raise ValueError(f"loss must be one real number, got a {loss.dtype} tensor of shape {tuple(loss.shape)}")
        return (None, loss.item()) if loss.device.type == "cpu" else (loss, None)
    if getattr(loss, "shape", None) == () and hasattr(loss, "item"):  # of numpy
        loss = loss.item()
    if loss is not None and not _is_number(loss):
        raise TypeError(f"loss must be a number or a tensor of one, got {type(loss).__name__} {loss!r}")
    try:
        return None, None if loss is None else float(loss)
    except OverflowError:
        raise ValueError("loss must be a number that a float can hold") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _count(value: Any, argument: str, least: int = 1) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{argument} must be an int, got {type(value).__name__} {value!r}")
    if value < least:
        raise ValueError(f"{argument} must be >= {least}, got {value!r}")
    return int(value)
