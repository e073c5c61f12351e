"""Lightning: a callback that clips inside the step of a Trainer's optimizers. (Fabric needs none: ``Clipper.step``.)"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..clipper import Clipper
from ..gradients.pack import same_items
from ..monitor import GradMonitor
from ..pipeline.step import StepHooks, check_optimizer, flat_params, unwrapped
from ..stats import Stats

if importlib.util.find_spec("pytorch_lightning") is not None and importlib.util.find_spec("lightning") is None:
    from pytorch_lightning import Callback, LightningModule, Trainer  # the same under its other name
else:
    from lightning.pytorch import Callback, LightningModule, Trainer


class ClipCallback(Callback):
    """Clips the gradients of every optimizer of a ``Trainer``, in its own step where that can take it.

    With any precision ("32-true", "bf16-mixed", "16-mixed", "bf16-true"), accumulation, several optimizers and manual
    optimization; with "16-mixed" also ``fused=True`` optimizers, which ``Trainer(gradient_clip_val=...)`` refuses.
    What rules remember is saved in the Trainer's checkpoints and loaded from them.

    Args:
        rule: as :class:`fastclip.Clipper`'s. Each optimizer has a copy of its own.
        monitor: is given the statistics of each step and the loss of its batch. Of several optimizers the first one's;
            a list is one for each.
        nonfinite: as :class:`fastclip.Clipper`'s.

    Attributes:
        stats: :class:`fastclip.Stats` of the last step; None before.

    Raises:
        TypeError, ValueError: an argument of another kind; as the training begins, a Trainer that clips by itself
            (``gradient_clip_val``, DeepSpeed, FSDP1) or an optimizer that does, or that wants its closure several times
            (LBFGS).

    Hooks that run between the backward pass and the step (``on_before_optimizer_step``) see gradients before the clip.

    Example:
        >>> clip = fastclip.integrations.lightning.ClipCallback(fastclip.rules.ZClip())
        >>> Trainer(precision="16-mixed", callbacks=[clip]).fit(module, data)
    """

    def __init__(
        self, rule: Any, monitor: GradMonitor | Sequence[GradMonitor] | None = None, *, nonfinite: str = "propagate"
    ) -> None:
        super().__init__()
        Clipper([], rule, nonfinite=nonfinite)  # raises for bad arguments
        monitors = [] if monitor is None else [monitor] if isinstance(monitor, GradMonitor) else list(monitor)
        for each in monitors:
            if not isinstance(each, GradMonitor):
                raise TypeError(f"monitor must be a GradMonitor or a list of such, got {type(each).__name__} {each!r}")
        self.stats: Stats | None = None
        self._rule, self._monitors, self._nonfinite = rule, monitors, nonfinite
        self._steps: list[_Step] = []  # of each optimizer, while there is training
        self._saved: list[dict[str, Any]] = []  # what their rules remember, while there is none

    # ---- Lightning's hooks ----

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.gradient_clip_val:
            got = trainer.gradient_clip_val
            raise ValueError(f"gradient_clip_val must be left out of the Trainer, got {got}: ClipCallback clips")
        strategy = type(trainer.strategy).__name__
        if strategy in ("DeepSpeedStrategy", "FSDPStrategy"):
            raise ValueError(f"strategy must leave clipping to Python; that of {strategy} clips by itself")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()
        saved = self._saved
        if saved and len(saved) != len(trainer.optimizers):
            raise ValueError(f"the checkpoint has {len(saved)} optimizers, and this training {len(trainer.optimizers)}")
        if len(self._monitors) > len(trainer.optimizers):
            raise ValueError(f"there are {len(self._monitors)} monitors, and {len(trainer.optimizers)} optimizers")
        for optimizer in trainer.optimizers:
            check_optimizer(unwrapped(optimizer)[-1])
        for number, optimizer in enumerate(trainer.optimizers):
            clipper = Clipper([], copy.deepcopy(self._rule), nonfinite=self._nonfinite)
            step = _Step(optimizer, clipper, pl_module)
            step.update_parameters()
            if saved:
                clipper.load_state_dict(saved[number])
            self._steps.append(step)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        inner = unwrapped(optimizer)[-1]
        for step in self._steps:
            if step.optimizers[-1] is inner:
                step.clip_in_next_step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor) and pl_module.automatic_optimization:
            loss = loss.detach() * trainer.accumulate_grad_batches  # by which Lightning has divided it
        for number, step in enumerate(self._steps):
            stats, step.stats = step.stats, None
            if stats is None:
                continue
            self.stats = stats
            if number < len(self._monitors):
                self._monitors[number].update(stats, loss if isinstance(loss, Tensor) else None, stats.step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def state_dict(self) -> dict[str, Any]:
        return {"clippers": [step.clipper.state_dict() for step in self._steps] or self._saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict["clippers"]
        for state in saved:
            Clipper([], copy.deepcopy(self._rule)).load_state_dict(state)  # raises if it does not fit
        self._saved = saved

    def _end(self) -> None:
        """Take the hooks away; what rules remember is kept for another ``fit``."""
        if self._steps:
            self._saved = self.state_dict()["clippers"]
        for step in self._steps:
            step.hooks.remove()
        self._steps = []


class _Step:
    """An optimizer of the Trainer, and the Clipper whose decision its next step carries out.

    Where there is a GradScaler, Lightning takes the backward pass before the step; else the optimizer evaluates it as a
    closure, and the step has begun by then.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, clipper: Clipper, module: LightningModule) -> None:
        self.optimizers, self.clipper = unwrapped(optimizer), clipper
        self.stats: Stats | None = None
        self._module, self._asked = module, False
        self.hooks = StepHooks(self.optimizers[-1], self._begin)

    def update_parameters(self) -> None:
        """Go by the optimizer's parameters as they are now: callbacks that unfreeze layers add some."""
        parameters = flat_params(self.optimizers[-1])
        if not same_items(parameters, self.clipper.parameters):
            name_of = {id(p): name for name, p in self._module.named_parameters()}
            names = [name_of.get(id(p)) for p in parameters]
            self.clipper.set_parameters(parameters, None if None in names else tuple(map(str, names)))

    def clip_in_next_step(self) -> None:
        self._asked = True
        self.hooks.begin_now()

    def _begin(self, undo: ExitStack) -> bool:
        if not self._asked:
            return True
        self._asked = False
        self.update_parameters()
        self.stats, steps = self.clipper.begin_step(self.optimizers, None, None, 1, undo)
        return steps
