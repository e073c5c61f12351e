"""Hugging Face's Trainer, also as TRL and PEFT use it: the clip of its Accelerator, its checkpoints and its logs."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from ..monitor import GradMonitor
from . import accelerate
from .accelerate import Attached
from .clippers import RuleSpec

_trainers: weakref.WeakKeyDictionary[Attached, weakref.ref[Trainer]] = weakref.WeakKeyDictionary()


def attach(
    trainer: Trainer, rule: RuleSpec | None = None, monitor: GradMonitor | None = None, *, in_step: bool = True
) -> Attached:
    """Let a Trainer clip by fastclip, inside of the step of its optimizer.

    :func:`fastclip.integrations.accelerate.attach` to the trainer's Accelerator, and a :class:`ClipCallback` before its
    other callbacks. The limit is that of ``TrainingArguments(max_grad_norm=1.0)`` unless `rule` takes its place; with
    ``max_grad_norm=0`` the Trainer only measures, and no rule applies.

    Args and Raises: as :func:`fastclip.integrations.accelerate.attach`. A callback's ``on_pre_optimizer_step`` sees
    gradients that are not clipped yet, if they are in the step.

    Example:
        >>> trainer = Trainer(model, TrainingArguments("out", optim="adamw_torch_fused"), train_dataset=data)
        >>> fastclip.integrations.transformers.attach(trainer, rule=fastclip.rules.ZClip())
        >>> trainer.train()
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(f"trainer must be a transformers.Trainer, got {type(trainer).__name__} {trainer!r}")
    attached = accelerate.attach(trainer.accelerator, rule, monitor, in_step=in_step)
    _replace_method(trainer, attached)
    for earlier in [each for each in trainer.callback_handler.callbacks if isinstance(each, ClipCallback)]:
        trainer.remove_callback(earlier)
    _trainers[attached] = weakref.ref(trainer)
    trainer.callback_handler.callbacks.insert(0, ClipCallback(attached))  # before those that report
    return attached


def _replace_method(trainer: Trainer, attached: Attached) -> None:
    """Where gradients lie on several meshes the Trainer does not ask its Accelerator, but a method of its own."""
    name = "_mixed_mesh_grad_norm"
    if hasattr(trainer, name):
        setattr(trainer, name, lambda model, max_norm: attached.clip_grad_norm_(model.parameters(), max_norm))
        attached.when_detached = lambda: trainer.__dict__.pop(name, None)


class ClipCallback(TrainerCallback, ExportableState):
    """Carries what a rule remembers into the checkpoints of a Trainer and out of them, and its numbers into the logs.

    A checkpoint's ``trainer_state.json`` has the rule's memory, which a training that is resumed goes on from (whatever
    ``restore_callback_states_from_checkpoint`` says). With each log of the training go ``grad/coef``, ``grad/limit`` if
    the rule has one, and, with a monitor, ``grad/clip_rate`` and ``grad/skips``: read from the monitor, which is a step
    or more late and makes nothing wait, else from the last clip.

    Args:
        attached: what :func:`fastclip.integrations.accelerate.attach` returned; None: found by the optimizer as the
            training begins. :func:`attach` makes one that comes before callbacks that report, as it must.
    """

    def __init__(self, attached: Attached | None = None) -> None:
        self.attached = attached
        self.memory: dict[str, Any] | None = None  # of a checkpoint, until the training begins

    def state(self) -> dict[str, Any]:
        """For ``trainer_state.json``; :class:`transformers.trainer_callback.ExportableState`."""
        memory = self.memory if self.attached is None else _as_json(self.attached.state_dict())
        return {"args": {}, "attributes": {"memory": memory}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.attached is None:  # restored from a checkpoint, in the place of the one that was there
            self.attached = accelerate.attached_to(kwargs.get("optimizer"))
        if self.attached is None:
            raise RuntimeError("ClipCallback: nothing is attached to the Trainer's Accelerator; use attach(trainer)")
        trainer = _trainers.get(self.attached, lambda: None)()
        if trainer is not None:
            if trainer.accelerator is not self.attached.accelerator:  # made anew, for smaller batches
                self.attached.move_to(trainer.accelerator)
                _replace_method(trainer, self.attached)
            callbacks = trainer.callback_handler.callbacks
            callbacks.insert(0, callbacks.pop(callbacks.index(self)))
        saved = state.stateful_callbacks.get(type(self).__name__)
        saved = saved[0] if isinstance(saved, list) else saved
        memory = self.memory if saved is None else saved["attributes"]["memory"]
        if memory is not None:
            self.attached.load_state_dict(_from_json(memory))
        self.memory = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.attached is None or logs is None or "grad_norm" not in logs:
            return
        logs.update(_numbers(self.attached))


def _numbers(attached: Attached) -> dict[str, float]:
    monitor = attached.monitor
    record = {} if attached.stats is None else attached.stats.log() if monitor is None else monitor.last
    numbers = {f"grad/{name}": record[name] for name in ("limit", "coef") if name in record}
    if monitor is not None and record:
        numbers |= {"grad/clip_rate": monitor.clip_rate, "grad/skips": monitor.skips}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _as_json(state: Any) -> Any:
    """`state` with tensors as lists, which JSON keeps to the last bit."""
    if isinstance(state, Tensor):
        return {"dtype": str(state.dtype).removeprefix("torch."), "values": state.tolist()}
    if isinstance(state, dict):
        return {key: _as_json(value) for key, value in state.items()}
    return [_as_json(value) for value in state] if isinstance(state, list) else state


def _from_json(state: Any) -> Any:
    if isinstance(state, dict):
        if state.keys() == {"dtype", "values"}:
            return torch.tensor(state["values"], dtype=getattr(torch, state["dtype"]))
        return {key: _from_json(value) for key, value in state.items()}
    return [_from_json(value) for value in state] if isinstance(state, list) else state
