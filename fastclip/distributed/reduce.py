"""Reduce: from the statistics of this rank's parts to those of whole tensors, by one sum over the ranks.

Messages are float64 and, for one configuration, of one length on all ranks, whatever gradients there are: a rank
without any joins with zeros, and one that cannot clip joins with a flag, so that all raise. The root comes last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends import Measurement, capturing, packers, upload, widened
from ..host_stats import root
from ..stats import OverRanks, Stats
from .groups import gather_strings, ranks_of
from .plan import Plan, agreed
from .unwrap import Spec

TOLERANCE = 0.01  # by which power sums of what should be the same on all ranks may differ, relatively


class Shards:
    """The T gradients of a call as parts of whole tensors.

    Attributes:
        plan: of all N tensors of the call.
        index: which of the N each gradient is; None: all of them, in order.
        wrappers: [T] the gradients that the parts are of: DTensors, or plain tensors, which are their own.
        partial: gradient -> how it lies, of those that are yet to be summed over some dimensions of their mesh.
        other_layouts: gradient -> how it lies, where that is not as its parameter does.
        error: why this rank cannot do the call; it has no gradients then.
    """

    def __init__(self, plan: Plan, error: Exception | None = None) -> None:
        self.plan, self.error = plan, error
        self.index: list[int] | None = None if error is None else []
        self.wrappers: list[Tensor] = []
        self.partial: dict[int, Spec] = {}
        self.other_layouts: dict[int, Spec] = {}

    def keep(self, positions: list[int]) -> None:
        """Go on with the gradients at these positions: the others are tied to one of them."""
        self.index = positions if self.index is None else [self.index[i] for i in positions]
        self.wrappers = [self.wrappers[i] for i in positions]
        moved = {old: new for new, old in enumerate(positions)}
        self.partial = {moved[i]: spec for i, spec in self.partial.items() if i in moved}
        self.other_layouts = {moved[i]: spec for i, spec in self.other_layouts.items() if i in moved}

    def bump_versions(self) -> None:
        """Tell autograd that the gradients were written whose parts were."""
        packers.get().packer.bump_versions(self.wrappers)

    def numels(self) -> list[int]:
        """[T] how many elements the whole tensors have. Of a declared one: as if all parts were alike."""
        counts = [math.prod(wrapper.shape) for wrapper in self.wrappers]
        marks = self.plan.marks
        if marks is not None:
            index = range(len(counts)) if self.index is None else self.index
            counts = [
                count if (group := marks[i].sharded) is None else count * len(ranks_of(group))
                for i, count in zip(index, counts)
            ]
        return counts

    def positions(self, device: torch.device) -> Tensor | None:
        """`index` on `device`."""
        return None if self.index is None else upload(self.index, torch.int64, device)

    def weights(self, device: torch.device) -> Tensor:
        """[T] float64, of each gradient in a sum over U."""
        weights, index = self.plan.on(device)[0], self.positions(device)
        weights = weights if index is None else weights[index]
        if self.other_layouts:
            weights = weights.clone()
            for i, spec in self.other_layouts.items():
                weights[i] = self.plan.weight_of(spec)
        return weights

    def texts(self, text: str) -> list[str]:
        """What each rank has to say about an error that all of them know of."""
        return gather_strings(f"rank {dist.get_rank()}: {text}" if text else "", self.plan.groups)

    def scatter(self, values: Tensor) -> Tensor:
        """[N]: `values` [T] at their places, 0 where there is no gradient."""
        index = self.positions(values.device)
        if index is None:
            return values
        return values.new_zeros(len(self.plan.specs)).index_copy_(0, index, values)

    def select(self, values: Tensor) -> Tensor:
        """[T] of [N]."""
        index = self.positions(values.device)
        return values if index is None else values[index]


class Reduced(NamedTuple):
    """What :func:`reduce` gives: statistics of whole tensors, and what any rank asked for."""

    stats: Stats
    skip: Tensor | None
    found_inf: Tensor | None


class Wanted(NamedTuple):
    """What is to be known of each tensor. Part of the configuration, which must be the same on all ranks."""

    power: bool
    absmax: bool
    purpose: str  # what else of the configuration ranks must agree on


# What a rank that cannot do the call adds to the count of gradients that are not finite, which is less. Two numbers in
# one, since a short message of gloo's takes as long as it has numbers: bench/NOTES.md.
CANNOT = 2.0**40


def reduce(
    local: Stats, shards: Shards, wanted: Wanted, skip: Tensor | None = None, found_inf: Tensor | None = None
) -> Reduced:
    """`local`, summed over the ranks of the plan; `skip` and `found_inf` where they are so on any of them.

    Raises:
        RuntimeError: another rank cannot do the call; the ranks disagree about what they do (seen in the first call).
        The error of ``shards.error``: of this rank.
    """
    plan, device, p = shards.plan, local.device, local.norm_type
    _check_unread(plan)
    as_maximum, counts = math.isinf(p), p == 0
    vectors = wanted.power or wanted.absmax or counts
    maxima = wanted.absmax or as_maximum
    weights = shards.weights(device)
    absmax = local.absmax
    amounts = absmax.isnan().double() if as_maximum else local.power
    if counts and wanted.absmax:
        amounts = torch.where(absmax.isnan(), math.nan, amounts)  # as other powers have it
    broken = ~absmax.isfinite() if local.zeroed is None else local.zeroed > 0
    configuration = f"{p} {wanted} {skip is None} {found_inf is None} {local.zeroed is None}"
    agreement = plan.agreement(configuration, vectors)
    first = agreement not in agreed
    if first:
        agreed[agreement] = _check_agreement(plan, configuration, vectors, device)
    everybody = [plan.world] if agreed[agreement] and plan.world is not None else plan.groups
    # Behind the amounts of the norm: the count of broken gradients, and what else the configuration has.
    slots = [weights.dot(broken.double()) if shards.error is None else weights.new_tensor(CANNOT)]
    slots += [widened(flag, device) for flag in (skip, found_inf) if flag is not None]
    if local.zeroed is not None:
        slots.append(weights.dot(local.zeroed.double()))
    shared = plan.on(device)[1]
    if vectors:
        message = torch.cat([shards.scatter(weights * amounts), torch.stack(slots)])
        message = plan.all_reduce(message, plan.mesh_groups)
        amounts, flags = message[: len(plan.specs)], message[len(plan.specs) :]
        total = ((amounts != 0).double() if counts else amounts) * (1 if shared is None else shared)
        if plan.stage_groups:
            message = plan.all_reduce(torch.cat([total.sum().reshape(1), flags]), plan.stage_groups)
            total, flags = message[0], message[1:]
    else:
        factors = weights if shared is None else weights * shards.select(shared)
        message = plan.all_reduce(torch.stack([factors.dot(amounts), *slots]), everybody)
        total, flags = message[0], message[1:]

    _check_errors(shards, flags, first)
    if first:
        _check_replicas(shards, shards.scatter(local.absmax if as_maximum else local.power))

    most = None
    if maxima:
        sendable = torch.where(absmax.isnan(), math.inf, absmax)  # NaN does not travel by MAX
        if vectors:
            most = plan.all_reduce(shards.scatter(sendable), plan.mesh_groups, dist.ReduceOp.MAX)
            most = torch.where(amounts > 0 if as_maximum else amounts.isnan(), math.nan, most)
        elif as_maximum:
            most = sendable.max() if len(sendable) else sendable.sum()
            most = plan.all_reduce(most.reshape(1), everybody, dist.ReduceOp.MAX)[0]
    if as_maximum:
        assert most is not None
        if vectors:
            most_of_all = torch.where(most.isnan(), math.inf, most)
            most_of_all = most_of_all.max() if len(most) else most_of_all.sum()
            most_of_all = plan.all_reduce(most_of_all.reshape(1), plan.stage_groups, dist.ReduceOp.MAX)[0]
        norm = torch.where(total.sum() > 0, math.nan, most_of_all if vectors else most)
    else:
        norm = root(total.sum(), p)
    if flags.device.type != "cpu":  # an error of another rank is seen only later, so clip nothing now
        norm = torch.where(flags[0] >= CANNOT, 0.0, norm)

    part = _part(shards, amounts, most) if vectors else Measurement(local.power, local.absmax)
    over_stages: Callable[[Tensor, bool], Tensor] | None = None
    if plan.stage_groups:
        over_stages = _OverStages(plan)
    nonfinite, *others = flags.unbind()
    if flags.device.type != "cpu":
        nonfinite = torch.where(nonfinite >= CANNOT, 0.0, nonfinite)
    any_skip = None if skip is None else others.pop(0) > 0
    any_inf = None if found_inf is None else others.pop(0) > 0
    ranks = OverRanks(
        nonfinite=nonfinite,
        zeroed=None if local.zeroed is None else others.pop(0),
        power=vectors and not as_maximum,
        absmax=vectors and maxima,
        shared=None if shared is None else shards.select(shared),
        over_stages=over_stages,
    )
    return Reduced(local.reduced(part, norm, ranks), any_skip, any_inf)


def _part(shards: Shards, amounts: Tensor, most: Tensor | None) -> Measurement:
    power = shards.select(amounts)
    return Measurement(power, power if most is None else shards.select(most))


class _OverStages:
    """A sum or a maximum of one number over the pipeline stages."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __call__(self, value: Tensor, maximum: bool) -> Tensor:
        operation = dist.ReduceOp.MAX if maximum else None
        return self._plan.all_reduce(value.reshape(1), self._plan.stage_groups, operation)[0]


# ---- errors ----


def _check_agreement(plan: Plan, configuration: str, vectors: bool, device: torch.device) -> bool:
    """Before the first call of a configuration: RuntimeError on all ranks if they do not make the same call, whose
    messages might not even be of one length. Returns whether all of them may sum over the whole world instead."""
    digests = plan.digests(configuration, vectors)
    # All are equal if the mean square is the square of the mean; below 2^53 these sums are exact.
    numbers = [1, plan.is_everybody(), *digests, *(d * d for d in digests)]
    message = torch.tensor(numbers, dtype=torch.float64, device="cpu").to(device)
    ranks, in_world, *sums = plan.all_reduce(message, plan.groups).tolist()
    if any(ranks * square != total * total for total, square in zip(sums, sums[len(digests) :])):
        raise RuntimeError(
            "the ranks do not make the same call: their parameters, placements, rules or arguments differ. (Ranks that "
            "hold other parameters, such as pipeline stages, must be told by process_group=.)"
        )
    return bool(in_world == ranks == plan.everybody)


def _check_errors(shards: Shards, flags: Tensor, first: bool) -> None:
    """Raise on all ranks if one of them cannot do the call.

    Looked at at once in the first call, and where the flags are on the host anyway. Else the flags are copied to the
    host behind this call, and looked at when the next one begins, before anything is sent.
    """
    error = shards.error
    if capturing(flags.device):
        pass
    elif flags.device.type == "cpu" or first:
        if flags[0].item() >= CANNOT:
            texts = shards.texts(str(error or ""))
            if error is None:
                raise RuntimeError(f"the gradients cannot be clipped; nothing was changed. {'; '.join(texts)}")
    else:
        host = torch.empty(flags.shape, dtype=flags.dtype, device="cpu", pin_memory=True)
        host.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(flags.device))
        shards.plan.unread = host, event
    if error is not None:
        raise error


def _check_unread(plan: Plan) -> None:
    """What the call before left to be looked at."""
    if plan.unread is not None:
        (host, event), plan.unread = plan.unread, None
        event.synchronize()
        if host[0] >= CANNOT:
            raise RuntimeError("another rank could not clip its gradients in the call before this one, and has raised")


def _check_replicas(shards: Shards, power: Tensor) -> None:
    """In the first call: RuntimeError, on all ranks, if gradients that should be the same on all of them are not."""
    plan = shards.plan
    otherwise = {i if shards.index is None else shards.index[i] for i in shards.other_layouts}
    replicated = [i for i in plan.replicated() if i not in otherwise]
    power = power[upload(replicated, torch.int64, power.device)]
    power = torch.where(power.isfinite(), power, -1.0)
    least, most = -power, power
    if replicated:
        least, most = plan.all_reduce(torch.stack([-power, power]), plan.mesh_groups, dist.ReduceOp.MAX)
    differ = ((most + least) > TOLERANCE * most.abs()).nonzero().flatten().tolist()
    anywhere = torch.full((1,), float(len(differ)), dtype=torch.float64, device=power.device)
    if plan.stage_groups:
        anywhere = plan.all_reduce(anywhere, plan.stage_groups)
    if differ:
        i = replicated[differ[0]]
        more = f", and {len(differ) - 1} others" if len(differ) > 1 else ""
        raise RuntimeError(
            f"parameters[{i}]{more}: its gradient should be the same on all ranks, but it is not (sums of |g|^p from "
            f"{-least[differ[0]].item():.6g} to {most[differ[0]].item():.6g}). If each rank has a parameter of its own "
            f"there, such as an expert or a flat shard, declare that by fastclip.distributed.mark_sharded; if it is a "
            f"copy, sum its gradients over the ranks first. Nothing was changed"
        )
    if plan.stage_groups and anywhere > 0:
        raise RuntimeError(
            "gradients of another stage that should be the same on all ranks are not. Nothing was changed"
        )
