"""Where scalars go besides the file: TensorBoard, Weights & Biases, the loggers of frameworks, or any function."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

Logger = Callable[[dict[str, float], int], Any]


def loggers(log: list[Any], folders: bool) -> tuple[list[Logger], list[Any]]:
    """Functions of a dict of scalars and a step, and the writers that are ours to close. `folders`: whether this
    process writes in those."""
    functions: list[Logger] = []
    own = []
    for target in log:
        if isinstance(target, (str, os.PathLike)):
            if not folders:
                continue
            target = _tensorboard(target)
            own.append(target)
        if hasattr(target, "add_scalar"):
            functions.append(partial(_add_scalars, target))
        elif callable(getattr(target, "log_metrics", None)):  # Lightning's loggers, MLflow
            functions.append(partial(_log_metrics, target))
        elif callable(getattr(target, "log", None)) and callable(getattr(target, "define_metric", None)):
            functions.append(Wandb(target))
        elif callable(getattr(target, "log", None)):
            functions.append(partial(_log, target))
        elif callable(target):
            functions.append(target)
        else:
            raise TypeError(
                f"log must be a SummaryWriter, a wandb run, something with log_metrics() (Lightning, MLflow) or log() "
                f"(Accelerate), a function of a dict and a step, a folder, or a list of such, got "
                f"{type(target).__name__} {target!r}"
            )
    return functions, own


def _tensorboard(folder: str | os.PathLike[str]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            f"log={os.fspath(folder)!r} is a folder for TensorBoard: pip install tensorboard ({error})"
        ) from error
    return SummaryWriter(os.fspath(folder))


def _add_scalars(writer: Any, scalars: dict[str, float], step: int) -> None:
    for name, value in scalars.items():
        writer.add_scalar(name, value, step)


def _log_metrics(logger: Any, scalars: dict[str, float], step: int) -> None:
    logger.log_metrics(scalars, step=step)


class Wandb:
    """A run of Weights & Biases.

    Its own step only goes up, with every row that anybody logs, and what is logged below it is dropped. Steps come here
    late and are counted otherwise, so each row has its step as a number, which is the x axis of the others.
    """

    STEP = "grad/step"

    def __init__(self, run: Any) -> None:
        self._run, self._defined = run, False

    def __call__(self, scalars: dict[str, float], step: int) -> None:
        if not self._defined:
            self._run.define_metric(self.STEP)
            for name in ("grad/*", "loss"):
                self._run.define_metric(name, step_metric=self.STEP)
            self._defined = True
        self._run.log({**scalars, self.STEP: step})


def _log(run: Any, scalars: dict[str, float], step: int) -> None:
    run.log(scalars, step=step)
