"""What AdamW and SGD share: the arguments, the decision, and checkpoints."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import backends
from ..clipper import Clipper
from ..distributed.reduce import Wanted, reduce
from ..distributed.unwrap import any_dtensor
from ..gradients.measure import measure
from ..gradients.pack import pack, refuse_set
from ..gradients.param_index import check_names
from ..pipeline.amp import given_by_scaler
from ..pipeline.decide import ClipDecision
from ..pipeline.step import flat_params
from ..stats import Stats
from .checks import check_defaults, named_pairs, read_numbers, refuse_one_rank
from .ddp import ddp_of
from .in_backward import InBackward
from .step_inputs import zero_
from .step_pass import StepPass, needs_host_decision

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.nn.parallel import DistributedDataParallel

OWN = ("stochastic_rounding", "rounding_step", "clipper")  # entries of a parameter group that torch's do not have


class _Last:
    """What the last step clipped. Wrappers that copy an optimizer's attributes share it with the optimizer."""

    stats: Stats | None = None


class ClippingOptimizer(StepPass):
    """What AdamW and SGD share: the decision, and the pass over all parameters."""

    clipper: Clipper | None  # of the `max_norm`, over the parameters of all groups
    _step_supports_amp_scaling = True  # torch.amp.GradScaler then sets grad_scale and found_inf, see step()

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        max_norm: Any,
        nonfinite: str,
        stochastic_rounding: int | None,
        process_group: ProcessGroup | DeviceMesh | None,
        step_in_backward: bool | DistributedDataParallel,
        bucket_bytes: int,
        measure_in_backward: bool,
    ) -> None:
        stochastic_rounding = check_defaults(params, defaults, stochastic_rounding)
        ddp = ddp_of(step_in_backward)
        step_in_backward = ddp is not None or bool(step_in_backward)
        if max_norm is None and nonfinite != "propagate":
            raise ValueError(f"nonfinite={nonfinite!r} needs a max_norm; float('inf') only measures")
        if max_norm is None and process_group is not None:
            raise ValueError("process_group needs a max_norm, of a norm over its ranks")
        if max_norm is not None or step_in_backward:
            refuse_one_rank("step_in_backward" if max_norm is None else "max_norm")
        if measure_in_backward and max_norm is None:
            raise ValueError("measure_in_backward=True needs a max_norm; float('inf') only measures")
        if measure_in_backward and step_in_backward:
            raise ValueError("measure_in_backward=True must be left out with step_in_backward, which keeps no gradient")
        options: dict[str, Any] = {"process_group": process_group, "measure_in_backward": measure_in_backward}
        self.clipper = None if max_norm is None else Clipper([], max_norm, nonfinite=nonfinite, **options)
        self._last = _Last()
        self._in_backward: InBackward | None = None
        defaults = {**defaults, "stochastic_rounding": stochastic_rounding, "rounding_step": 0}
        read_numbers(defaults)
        super().__init__(params, defaults)
        self._update_clipper()
        if step_in_backward:
            self._in_backward = InBackward(self, self.clipper, process_group, bucket_bytes, ddp)
            self._in_backward.attach(self.param_groups)

    @property
    def _process_group(self) -> ProcessGroup | DeviceMesh | None:
        return None if self.clipper is None else self.clipper.process_group

    @property
    def stats(self) -> Stats | None:
        """Of the gradients of the last step, if they were clipped."""
        return self._last.stats

    def _update_clipper(self) -> None:
        """Let the clipper go by the groups as they are now: parameters may have been added, replaced or removed."""
        if self.clipper is None:
            return
        names: tuple[str, ...] | None = None
        if all(len(group.get("param_names", ())) == len(group["params"]) for group in self.param_groups):
            names = tuple(name for group in self.param_groups for name in group.get("param_names", ())) or None
        self.clipper.set_parameters(flat_params(self), names)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        given = param_group["params"]
        refuse_set(given, "params")
        param_group = {**param_group, "params": [given] if isinstance(given, Tensor) else list(given)}
        for item in param_group["params"]:
            p = item[1] if isinstance(item, tuple) else item
            if isinstance(p, Tensor) and not p.is_floating_point():
                raise TypeError(f"params must be floating-point tensors, got one of {p.dtype}")
        read_numbers(param_group)
        if self.clipper is not None:
            check_names(pair for group in (*self.param_groups, param_group) for pair in named_pairs(group))
            if not self.param_groups:  # state_dict() fills it in; torch.distributed.checkpoint looks for the key here
                param_group["clipper"] = {}
        if self._in_backward is not None:
            self._in_backward.check_group(param_group)
        super().add_param_group(param_group)
        if self._in_backward is not None and not self._in_backward.began:
            self._in_backward.watch(self.param_groups)

    def init_state(self) -> None:
        """Make the states of all parameters that require a gradient, and of the rules, as a first step would, without a
        step: for checkpoints that are loaded into memory that is there (``torch.distributed.checkpoint``)."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    self._state_of(p, group)
                elif self._process_group is not None and group.get("momentum") != 0:
                    self.state[p]  # empty: whether there are states must not differ between stages
        self._update_clipper()
        if self.clipper is not None:
            self.clipper.init_state()

    def state_dict(self) -> dict[str, Any]:
        """torch.optim's, and what the rule of `max_norm` remembers as "clipper" of the first parameter group, where
        torch.optim and torch.distributed.checkpoint keep entries that they do not know.

        Raises:
            ValueError: the rule names a parameter that is in no group any more.
        """
        self._update_clipper()  # what rules remember is saved in the order of the parameters as they are now
        saved = super().state_dict()
        if self.clipper is not None:
            saved["param_groups"][0]["clipper"] = self.clipper.state_dict()
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint, torch.optim's too.

        Raises:
            ValueError: it is of other parameter groups, or of another rule; nothing is changed then.
        """
        self._update_clipper()
        saved = [dict(group) for group in state_dict["param_groups"]]
        remembered = saved[0].pop("clipper", None) if saved else None
        clipper = self.clipper
        before = None
        if clipper is not None and remembered:
            before = clipper.state_dict()
            clipper.load_state_dict(remembered)
        if len(saved) == len(self.param_groups):  # torch's know nothing of these
            own = [{name: group[name] for name in OWN if name in group} for group in self.param_groups]
            saved = [{**group_own, **group_saved} for group_own, group_saved in zip(own, saved)]
        try:
            super().load_state_dict({**state_dict, "param_groups": saved})
        except Exception:
            if clipper is not None and before is not None:
                clipper.load_state_dict(before)
            raise
        if self._in_backward is not None:  # a step that was under way is one of another run
            self._in_backward.reset()

    def __setstate__(self, state: dict[str, Any]) -> None:
        bucket_bytes = state.get("_in_backward")
        super().__setstate__(state)
        if isinstance(bucket_bytes, int):  # a copy, which has no hooks before its first step
            self._in_backward = InBackward(self, self.clipper, None, bucket_bytes)
            self._in_backward.is_copy = state.get("_had_ddp", False)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            read_numbers(group)

    def __getstate__(self) -> dict[str, Any]:
        bucket_bytes = None if self._in_backward is None else self._in_backward.bucket_bytes
        had_ddp = self._in_backward is not None and self._in_backward.has_ddp
        own = {"clipper": self.clipper, "_last": _Last(), "_in_backward": bucket_bytes, "_had_ddp": had_ddp}
        return {**super().__getstate__(), **own}

    @property
    def steps_in_backward(self) -> bool:
        return self._in_backward is not None

    def accumulate(self, more: bool = True) -> contextlib.AbstractContextManager[None]:
        """A context for all backward passes of a step but the last, whose gradients are to be added up.

        With ``step_in_backward`` gradients that come within are left where they are; without, nothing is different.

        Args:
            more: False: nothing is different either, for the last pass: ``with optimizer.accumulate(i + 1 < n):``.

        Raises:
            RuntimeError: gradients of this step have been used already.
        """
        return self._in_backward.accumulate() if more and self._in_backward is not None else contextlib.nullcontext()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """torch.optim's. With ``step_in_backward``, as long as no gradient of this step has been used, all of them may
        come anew."""
        super().zero_grad(set_to_none)
        if self._in_backward is not None:
            self._in_backward.drop()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, zero_grad: bool = False) -> Any:
        """One step; clipped first, if the optimizer was given a `max_norm`.

        Args:
            closure: evaluated first, with gradients enabled; its result is returned.
            zero_grad: set the gradients to zero in the same pass.

        `stats` is then the :class:`~fastclip.Stats` of the gradients, if they were clipped.
        """
        if torch.compiler.is_dynamo_compiling():
            from .. import graph_breaks

            return graph_breaks.call(ClippingOptimizer.step, self, closure, zero_grad=zero_grad)
        loss = None
        if self._in_backward is not None:
            self._finish(self._in_backward, closure)
            return None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.state:
            if self.decision is None and self._is_initial():
                self.init_state()
                return loss
            if self._process_group is not None or any_dtensor(flat_params(self)):
                self.init_state()  # checkpoints, and the question above, need the same states on all ranks
        decision = self.decision or self._decided()
        if decision is not None and needs_host_decision(self.param_groups) and decision.is_skipped():
            if zero_grad:
                zero_(p.grad for group in self.param_groups for p in group["params"])
        else:
            self._step_groups(decision, zero_grad)
            self._count_rounding()
        return loss

    def _finish(self, in_backward: InBackward, closure: Any) -> None:
        """The step of an optimizer that has taken most of it in backward."""
        if closure is not None:
            raise ValueError("closure must be left out with step_in_backward: its backward pass would step by itself")
        if any(given is not None for given in given_by_scaler(self)):
            raise RuntimeError(
                "step_in_backward takes no GradScaler: the gradients were used as they came, with the scale in them, "
                "and the parameters are wrong now. Train in bfloat16, which needs none"
            )
        if not self.state and not in_backward.began and self._is_initial():
            self.init_state()
            return
        if not in_backward.began:
            in_backward.watch(self.param_groups)
        self._last.stats = in_backward.finish()
        self._count_rounding()
        in_backward.watch(self.param_groups)

    def prepare_some(self, params: list[Tensor]) -> tuple[Stats | None, Callable[[], None]]:
        """Of some parameters in backward: their statistics, if they are clipped, and what steps them."""
        assert self._in_backward is not None
        self._update_clipper()
        if not self.state and any_dtensor(params):
            self.init_state()
        groups = self._in_backward.by_group(params, self.param_groups)
        plan = self._plan(set(), groups)  # complains before anything is remembered
        stats, decision = (None, None) if self.clipper is None else self._in_backward.decide(params)
        return stats, functools.partial(self._step_groups, decision, False, groups, plan)

    def _count_rounding(self) -> None:
        for group in self.param_groups:
            if group["stochastic_rounding"] is not None:
                group["rounding_step"] += 1

    def _is_initial(self) -> bool:
        """Whether this step is meant to make the states and nothing else: torch.distributed.checkpoint takes one with
        gradients of zeros and a learning rate of 0."""
        rates = [group["lr"] for group in self.param_groups]
        if any(isinstance(lr, Tensor) and lr.device.type != "cpu" for lr in rates) or any(rates):
            return False
        table = pack(flat_params(self), gradients=False, write=False, process_group=self._process_group, reduces=True)
        stats, _ = measure(table, math.inf)
        if table.shards is not None:
            stats = reduce(stats, table.shards, Wanted(False, False, "initial")).stats
        return (len(table) > 0 or table.shards is not None) and not stats.norm

    def _decided(self) -> ClipDecision | None:
        """The decision of the optimizer's own rule, and of a GradScaler whose ``step`` called this one's."""
        scale, found_inf = given_by_scaler(self)
        inv_scale = None if scale is None else backends.widened(scale).reciprocal()
        skip = None if found_inf is None else found_inf.to(backends.wide_device(found_inf.device)) > 0
        clipper = self.clipper
        if clipper is not None:
            self._update_clipper()
            table = clipper.read()
            if not len(table) and table.shards is None:
                nothing, _ = measure(table, clipper.norm_type, repair=clipper.nonfinite == "zero")
                nothing.record(torch.ones((), dtype=torch.float64, device=table.device))
                nothing.names = None if clipper.names is None else ()
                self._last.stats = nothing
                return None
            inv_scale = None if inv_scale is None else inv_scale.to(table.device)
            skip = None if skip is None else skip.to(table.device)
            self._last.stats, decision = clipper.decide(table, inv_scale, skip, scale is not None)
            return decision
        given = skip if inv_scale is None else inv_scale
        if given is None:
            return None
        one = torch.ones((), dtype=torch.float64, device=given.device)
        return ClipDecision(one if inv_scale is None else inv_scale, skip)
