"""Decide: the rules map the statistics of one read to what is to be done, a :class:`ClipDecision`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..backends import Measurement, capturing, upload, widened
from ..distributed.reduce import Wanted, reduce
from ..gradients.measure import measure
from ..gradients.table import GradTable
from ..rules.base import Needs, Rule, StepContext
from ..rules.coefficients import checked, clip_coefficient, combined
from ..stats import OverRanks, Stats, is_zero, leaves


class ClipDecision:
    """What was decided and is still to be done: to the gradients in place, or by an optimizer in its own pass.

    Args:
        coef: [] or [T] float64, what the gradients are to be multiplied by.
        skip: [] bool, whether nothing is to be done; None: it is.
        inv_scale: the part of `coef` that no rule asked for, [] float64; None: 1.
        decisions: the other parts of it, each with its rule; None: `coef` is one for all.
        freezing: [T] coefficients, 0 for gradients whose parameters are not to be touched at all.
        owners: -> for each gradient, the parameters that have it.
        leaves: whether `coef` is known to leave all gradients as they are.
    """

    def __init__(
        self,
        coef: Tensor,
        skip: Tensor | None = None,
        inv_scale: Tensor | None = None,
        decisions: list[tuple[Rule, Tensor]] | None = None,
        freezing: Sequence[Tensor] = (),
        owners: Callable[[], list[list[Tensor]]] = list,
        leaves: bool = False,
    ) -> None:
        self.coef, self.skip, self.owners, self.leaves = coef, skip, owners, leaves
        self._inv_scale, self._decisions, self._freezing = inv_scale, decisions, freezing

    @property
    def common(self) -> Tensor:
        """[] float64, what all gradients are multiplied by."""
        return self._split[0]

    @property
    def each(self) -> Tensor | None:
        """[] or [T] float64, what they are multiplied by besides; None: nothing."""
        return self._split[1]

    @functools.cached_property
    def _split(self) -> tuple[Tensor, Tensor | None]:
        if self._decisions is None:
            return self.coef, None
        common, each = self._inv_scale, None
        for rule, coef in self._decisions:
            if coef.dim():
                each = combined(each, coef)
                continue
            if not rule.finite_zero:  # +0 writes zeros, which no factor for all does to a NaN
                zeroes = torch.where(is_zero(coef), 0.0, 1.0).double()
                each = combined(each, zeroes)
                coef = torch.where(zeroes == 0, 1.0, coef)
            common = combined(common, coef)
        return torch.ones((), dtype=torch.float64, device=self.coef.device) if common is None else common, each

    @functools.cached_property
    def frozen(self) -> Tensor | None:
        """[T] bool, the gradients whose parameters are not to be touched at all; None: there is none."""
        mask = None
        for coef in self._freezing:
            mask = coef == 0 if mask is None else mask | (coef == 0)
        return mask

    def frozen_mask(self) -> Tensor | None:
        """Which parameters are to be left as they are, frozen or skipped, [] or [T] bool on the device; None: none."""
        skip, frozen = self.skip, self.frozen
        return skip if frozen is None else frozen if skip is None else frozen | skip

    def frozen_params(self) -> list[Tensor]:
        """The frozen parameters. Read back from the device, if a rule freezes any."""
        if self.frozen is None:
            return []
        positions = self.frozen.nonzero().flatten().tolist()
        owners = self.owners() if positions else []
        return [p for i in positions for p in owners[i]]

    def is_skipped(self) -> bool:
        """Whether nothing is to be done. Read back from the device, if it was decided there."""
        return self.skip is not None and bool(self.skip)

    def differs_by_tensor(self) -> bool:
        """Whether the decision is another one from gradient to gradient."""
        return self.coef.dim() > 0 or self.frozen is not None

    def positions(self) -> dict[int, int]:
        """id of a parameter -> the position of its gradient in the table."""
        return {id(p): i for i, parameters in enumerate(self.owners()) for p in parameters}

    def unless_skipped(self, coef: Tensor) -> Tensor:
        return coef if self.skip is None else torch.where(self.skip, 1.0, coef)

    def apply_(self, table: GradTable) -> None:
        """Do it to the gradients in place."""
        if len(table) and not self.leaves:
            table.apply_(self.unless_skipped(self.coef))


def clip(
    table: GradTable,
    rules: list[Rule],
    norm_type: float,
    check: Callable[[Stats], None] | None = None,
    tensor_stats: bool = False,
) -> Stats:
    """Run `rules` over the table's gradients: one read, one decision, at most one pass of writing per coefficient rule
    or run of them. `check` sees the statistics before anything is written and may raise."""
    stats, decision = decide(table, rules, norm_type, StepContext(), check, tensor_stats=tensor_stats)
    decision.apply_(table)
    return stats


def decide(
    table: GradTable,
    rules: list[Rule],
    norm_type: float,
    context: StepContext,
    check: Callable[[Stats], None] | None = None,
    nonfinite: str = "propagate",
    owners: Callable[[], list[list[Tensor]]] = list,
    tensor_stats: bool = False,
    norm: Tensor | None = None,
    skip_each: bool = False,
) -> tuple[Stats, ClipDecision]:
    """Read the gradients once and let the rules decide. Only what comes before the last rule that works in place is
    written. The statistics are those of the gradients times ``context.inv_scale``, as they were before any rule.
    `norm`: the norm of all gradients, measured elsewhere, for rules that need nothing else; nothing is read then.
    `skip_each`: ``nonfinite="skip"`` leaves the parameters alone whose gradients are not finite, and steps the others.
    """
    shards = table.shards
    if context.knows_params and any(rule.in_place for rule in rules):
        try:
            for rule in rules:
                rule.check_gradients(context)
        except Exception as error:
            if shards is None:
                raise
            shards.error = error  # for the other ranks too
    if capturing(table.device):
        for rule in rules:
            rule.check_capture()
    inv_scale, skip = context.inv_scale, context.skip
    wanted = _wanted(rules, nonfinite, tensor_stats, skip_each, inv_scale is None) if shards is not None else None
    limit = rules[0].static_limit(context.step) if len(rules) == 1 and inv_scale is None and shards is None else None
    coef: Tensor | None
    if norm is not None:
        before, coef = stats_of_norm(table, norm, norm_type), None
    else:
        before, coef = measure(table, norm_type, limit, repair=nonfinite == "zero")
    if shards is not None and wanted is not None and norm is None:
        before, skip, context.found_inf = reduce(before, shards, wanted, skip, context.found_inf)
    if inv_scale is not None:
        zeroed, before = before.zeroed, before.scaled(inv_scale)
        before.zeroed = zeroed
    before.step = context.step
    if check:
        check(before)
    if nonfinite == "skip" and not skip_each:
        broken = before.any_nonfinite()
        skip = broken if skip is None else skip | broken
    if coef is not None or (shards is None and not len(table)):
        if coef is None or not len(table):
            coef = torch.ones((), dtype=torch.float64, device=table.device)
        return before.record(coef, limit, None, skip), ClipDecision(coef, skip, owners=owners, leaves=leaves(coef))

    context.begin_rules(skip, table.sizes)
    coef, overall, changed = inv_scale, None, None  # None: 1, 1, no
    decisions: list[tuple[Rule, Tensor]] = []  # since the last rule that worked in place
    freezing: list[Tensor] = []
    if nonfinite == "skip" and skip_each:
        freezing.append((~before.nonfinite).double())
    stats: Stats | None = before
    all_left = inv_scale is None
    for i, rule in enumerate(rules):
        if rule.in_place:
            if coef is not None:
                table.apply_(coef if skip is None else torch.where(skip, 1.0, coef))
                coef, inv_scale, decisions = None, None, []
            in_place = rule.apply_(table, context)
            changed = in_place if changed is None else changed | in_place
            stats = None  # what the next rule needs must be read again
            all_left = False
            continue
        if stats is None:
            stats, _ = measure(table, norm_type)
            if shards is not None and wanted is not None:
                stats = reduce(stats, shards, wanted).stats
            stats.step = context.step
        returned = rule.decide(stats, context)
        if type(returned) is float and returned == 1 and stats.as_left() is not None:
            continue  # as if there were no such rule
        rule_coef = checked(returned, rule, stats.count, stats.device)
        decisions.append((rule, rule_coef))
        if rule_coef.dim() and rule.freezes:
            freezing.append(rule_coef)
        same = coef is overall
        left = leaves(rule_coef)
        all_left = all_left and left
        coef = combined(coef, rule_coef, left)
        overall = coef if same else combined(overall, rule_coef, left)
        if i + 1 < len(rules):
            stats = (stats.as_left() if left else None) or stats.scaled(rule_coef)
    if coef is None or overall is None:
        one = torch.ones((), dtype=torch.float64, device=table.device)
        coef, overall = one if coef is None else coef, one if overall is None else overall
    decision = ClipDecision(coef, skip, inv_scale, decisions, freezing, owners, all_left)
    if nonfinite == "skip" and skip_each:
        overall = torch.where(before.nonfinite, 1.0, overall)
    return before.record(overall, context.limit, changed, skip), decision


def _wanted(rules: list[Rule], nonfinite: str, tensor_stats: bool, skip_each: bool, unscaled: bool) -> Wanted:
    """What must be known over all ranks."""
    return Wanted(
        any(rule.needs & Needs.TENSOR_NORMS for rule in rules) or tensor_stats or (skip_each and nonfinite == "skip"),
        any(rule.needs & Needs.ABSMAX for rule in rules) or tensor_stats,
        f"{[type(rule).__name__ for rule in rules]} {nonfinite} {unscaled}",
    )


def stats_of_norm(table: GradTable, norm: Tensor, norm_type: float) -> Stats:
    """The statistics of the table's gradients where only the norm is known, which was measured elsewhere."""
    norm = _on(table.device, norm)
    unknown = torch.zeros(len(table), dtype=torch.float64, device=table.device)
    nothing = Stats(norm_type, table.dtype, table.device, [])
    known = OverRanks((~norm.isfinite()).double(), None, power=False, absmax=False)
    return nothing.reduced(Measurement(unknown, unknown), norm, known)


def clip_by_norm(table: GradTable, norm: Tensor, max_norm: float | Tensor) -> None:
    """Scale every gradient by the clip coefficient of a norm measured elsewhere."""
    limit = widened(max_norm, table.device) if isinstance(max_norm, Tensor) else max_norm
    table.apply_(clip_coefficient(_on(table.device, norm), limit))


def _on(device: torch.device, norm: Tensor) -> Tensor:
    return upload(norm, torch.float64, device) if norm.device.type == "cpu" else widened(norm, device)


def refuse_nonfinite(stats: Stats) -> None:
    """A check for :func:`clip`: RuntimeError unless the norm is finite. Reads it back to the host."""
    if not stats.norm.isfinite():
        raise RuntimeError(
            f"the total norm of order {stats.norm_type} of the gradients is {stats.norm.item()}, so they cannot be "
            f"clipped by it; nothing was changed. Set error_if_nonfinite=False to scale by it anyway"
        )
