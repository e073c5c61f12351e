"""What a backend is: verbs over the gradients of one device and dtype. CONTRIBUTING.md has a template.

Backends know no rule and never import each other. A failure inside a verb that writes is never caught and retried
elsewhere: the gradients may be half written.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..packers import NativeGroup, NativeStepGroup

WITHOUT_KERNELS = ("foreach", "reference")  # backends whose work torch does


class Measurement(NamedTuple):
    """What one read of a group's gradients gives, in float64: on the group's device or, if that has none, the host."""

    power: Tensor  # [T] sum of |g|^p of each tensor
    absmax: Tensor  # [T] max |g| of each tensor, NaN if it holds one
    # Where the backend has them at no extra cost, of this group and those measured `before` it:
    norm: Tensor | None = None  # [] the p-norm
    coef: Tensor | None = None  # [] the clip coefficient of that norm, where `max_norm` was given
    total: Tensor | None = None  # [2] sum of the powers (p = 0: the number of tensors that are not all zero), max |g|
    norm32: Tensor | None = None  # [] float32, the norm rounded, in memory of its own: what users get of it


class GradGroup:
    """T gradients of one device and dtype, and the backend that works on them."""

    __slots__ = ("__weakref__", "_numels", "_tensors", "backend", "device", "dtype", "native", "positions")

    def __init__(
        self,
        backend: Backend,
        positions: list[int],
        tensors: list[Tensor] | None,
        native: NativeGroup | None = None,
        numels: list[int] | None = None,
    ) -> None:
        assert tensors is not None or native is not None
        self.backend = backend
        self.positions = positions  # of each gradient among all of the table; empty if there is no other group
        self.native = native  # where the native packer took it
        self._tensors = tensors
        self._numels = numels  # None: as the native group has them
        first = native if tensors is None else tensors[0]
        assert first is not None
        self.device: torch.device = first.device
        self.dtype: torch.dtype = first.dtype

    def __len__(self) -> int:
        return len(self.tensors) if self.native is None else len(self.native)

    @property
    def tensors(self) -> list[Tensor]:
        """The memory of the gradients."""
        if self._tensors is None:
            assert self.native is not None
            self._tensors = self.native.tensors
        return self._tensors

    def addresses_and_sizes(self) -> Tensor:
        """int64 [2, T] on the host."""
        if self.native is not None:
            return self.native.addresses_and_sizes()
        rows = [[t.data_ptr() for t in self.tensors], [t.numel() for t in self.tensors]]
        return torch.tensor(rows, dtype=torch.int64, device="cpu")

    def numels(self) -> Tensor:
        """int64 [T] on the host, the element counts of the gradients; of a sparse one as if it were dense."""
        if self._numels is None:
            return self.addresses_and_sizes()[1]
        return torch.tensor(self._numels, dtype=torch.int64, device="cpu")

    def units(self) -> GradGroup | None:
        """The rows (slices along dimension 0) of all tensors of two or more dimensions, and the others whole, in order,
        as one group; None where they are not contiguous pieces of memory, or no kernel works on this one."""
        units = None if self.native is None else self.native.units()
        if units is None or self.backend.name in WITHOUT_KERNELS:
            return None
        return GradGroup(self.backend, [], None, units)

    def bump_version(self) -> None:
        """Tell autograd that the tensors were written."""
        if self.native is not None:
            self.native.bump_version()
        else:
            torch.autograd.graph.increment_version([t for t in self.tensors if not t.is_inference()])


class StepTable:
    """What one multi-tensor optimizer step works on: tensors of one device and dtype, row by row in the same order.

    Every tensor is dense and has its elements where its gradient has them. No two share memory.
    """

    __slots__ = ("_count", "device", "dtype", "native", "states")

    def __init__(self, params: list[Tensor], states: int, native: NativeStepGroup) -> None:
        self.device, self.dtype = params[0].device, params[0].dtype
        self.states = states  # how many of the three rows of states there are
        self.native = native
        self._count = len(params)

    def __len__(self) -> int:
        return self._count

    def addresses(self) -> Tensor:
        """int64 [7, T] on the host: addresses of gradient, parameter, three states and step count (0: there is none),
        and the element counts."""
        return self.native.addresses()

    def bump_version(self, gradients: bool) -> None:
        """Tell autograd that the parameters, and perhaps the gradients, were written."""
        self.native.bump_version(gradients)


class StepDecision(NamedTuple):
    """What the rules decided of the tensors of a StepTable, and what else is done in the pass."""

    coef: Tensor  # float64 [] or [T]: multiplies the gradients as they are read; +0 stands for gradients of zeros
    frozen_mask: Tensor | None = (
        None  # bool [] or [T]: where true, parameter, states and step count stay; None: nowhere
    )
    zero_grad: bool = False  # set the gradients to zero afterwards, frozen or not
    seed: int | None = None  # 32 bits: round bfloat16 stochastically


class AdamWOptions(NamedTuple):
    """The numbers of torch.optim.AdamW; `lr` may be a [] tensor on any device."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    amsgrad: bool
    maximize: bool


class SGDOptions(NamedTuple):
    """The numbers of torch.optim.SGD; `lr` may be a [] tensor on any device."""

    lr: float | Tensor
    momentum: float
    one_minus_dampening: float  # 1 in the first step, which starts from no momentum
    weight_decay: float
    nesterov: bool
    maximize: bool


class Backend(Protocol):
    """Tensors that a verb takes or returns besides the gradients are on the group's device, or on the host where that
    has no float64."""

    name: str

    def why_not(self, device: torch.device) -> str | None:
        """Why the backend cannot run on `device`; None: it can."""

    def describe(self) -> str:
        """Version and the like, for ``python -m fastclip info``."""

    def measure(
        self, group: GradGroup, norm_type: float, max_norm: float | None = None, before: Tensor | None = None
    ) -> Measurement:
        """One read: sum |g|^p and max |g| of each tensor.

        `max_norm`: of the global norm, for a backend that computes the coefficient as it measures; None: it is told not
        to. `before`: the ``total`` of a group measured before on the same device.
        """

    def apply_(self, group: GradGroup, coef: Tensor) -> None:
        """Multiply by `coef`, float64 [] or [T]: 1 neither reads nor writes, +0 writes zeros without reading."""

    def clamp_(self, group: GradGroup, low: float, high: float) -> Tensor:
        """Limit every element to [low, high]; [] bool, whether any was changed."""

    def repair_(self, group: GradGroup, measured: Measurement, norm_type: float) -> tuple[Measurement, Tensor]:
        """Set elements that are inf or NaN to 0, in the gradients that `measured` says have some.

        Returns what ``measure`` would give now and, as int64 [T], how many there were. Where there are none it costs no
        pass over the gradients, and the host of a GPU does not wait to know.
        """


class StepBackend(Backend, Protocol):
    """A backend that also takes the optimizers' steps, in one pass over gradients, parameters and states."""

    def adamw_(self, table: StepTable, decision: StepDecision, options: AdamWOptions) -> None:
        """One step of torch.optim.AdamW; with three rows of states as AMSGrad."""

    def sgd_(self, table: StepTable, decision: StepDecision, options: SGDOptions) -> None:
        """One step of torch.optim.SGD; with one row of states, momentum."""
