"""Where scalars go besides the file: TensorBoard, Weights & Biases, or any function."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

Logger = Callable[[dict[str, float], int], Any]


def loggers(log: Any) -> tuple[list[Logger], list[Any]]:
    """Functions of a dict of scalars and a step, and the writers that are ours to close."""
    found: list[Logger] = []
    own = []
    for target in log if isinstance(log, (list, tuple)) else [] if log is None else [log]:
        if isinstance(target, (str, os.PathLike)):
            target = _tensorboard(target)
            own.append(target)
        if hasattr(target, "add_scalar"):
            found.append(partial(_add_scalars, target))
        elif callable(getattr(target, "log", None)):
            found.append(partial(_log, target))
        elif callable(target):
            found.append(target)
        else:
            raise TypeError(
                f"log must be a SummaryWriter, a wandb run, a function of a dict and a step, a folder, or a list of "
                f"such, got {type(target).__name__} {target!r}"
            )
    return found, own


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


def _log(run: Any, scalars: dict[str, float], step: int) -> None:
    run.log(scalars, step=step)
