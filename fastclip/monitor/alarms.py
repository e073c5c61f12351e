"""What a person should hear of while a run goes on, in words to act on."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left, insort
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..host_stats import HostStats


class GradientWarning(UserWarning):
    """Something about the gradients that a person should look at."""


class Seen(NamedTuple):
    """One step, as the alarms see it."""

    record: dict[str, Any]  # what is written of it
    numbers: HostStats
    which: Tensor  # int64 [T]: of all gradients ever seen
    names: list[str]  # of all gradients ever seen


class Share:
    """How many of the last `size` answers were yes."""

    def __init__(self, size: int) -> None:
        self.yes = 0
        self._answers: deque[bool] = deque(maxlen=size)

    def add(self, answer: bool) -> None:
        """Take in one, and forget the oldest."""
        if self.full:
            self.yes -= self._answers[0]
        self._answers.append(answer)
        self.yes += answer

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def full(self) -> bool:
        """Whether there were so many."""
        return len(self._answers) == self._answers.maxlen


class Clipping:
    """More than 90 % of the window's updates were clipped. Heard again only after fewer than half were."""

    def __init__(self, window: int) -> None:
        self._share, self._norms, self._announced = Share(window), deque[float](maxlen=window), False

    def update(self, seen: Seen) -> bool:
        if not seen.record["skipped"]:
            self._share.add(seen.record["clipped"])
            if math.isfinite(seen.record["total_norm"]):
                self._norms.append(seen.record["total_norm"])
        if self._share.yes < 0.5 * len(self._share):
            self._announced = False
        return self._share.full and self._share.yes > 0.9 * len(self._share) and not self._announced

    def message(self, seen: Seen) -> str:
        self._announced = True
        text = f"{self._share.yes} of the last {len(self._share)} updates were clipped"
        if (limit := seen.record.get("limit")) is not None and self._norms:
            ordered = sorted(self._norms)
            usual, high = statistics.median(ordered), ordered[int(0.9 * (len(ordered) - 1))]
            text += f" to a norm of {limit:.3g} (the median before is {usual:.3g})"
            advice = f"a limit near {high:.2g} would clip one in ten"
        else:
            advice = "raise the limits of the rules"
        return (
            f"{text}, so what the size of a gradient says is lost: with SGD, clipping alone sets the length of each "
            f"step. If that is not what you want, {advice}; or lower the learning rate"
        )


class Swallowed:
    """In most of the window's updates, clipping made the gradients so small that Adam's eps outweighs them.

    Adam's update is m / (sqrt(v) + eps), with m and sqrt(v) about as large as a gradient's elements: where these are
    smaller than eps, less than half of the update is left. They are as large as norm · coef / sqrt(elements) typically,
    where `elements` is known and the norm is the 2-norm, and at most as the largest coef · max|g|.
    """

    def __init__(self, window: int, eps: float, elements: int | None) -> None:
        self.eps, self.elements = eps, elements
        self._share, self._size, self._announced = Share(window), 0.0, False

    def update(self, seen: Seen) -> bool:
        record = seen.record
        if not record["skipped"] and math.isfinite(record["total_norm"]):
            small = False
            if record["clipped"]:
                size = self._left(seen.numbers)
                small = 0 < size < self.eps
                self._size = size if small else self._size
            self._share.add(small)
        if self._share.yes < 0.25 * len(self._share):
            self._announced = False
        return self._share.full and self._share.yes > 0.5 * len(self._share) and not self._announced

    def _left(self, numbers: HostStats) -> float:
        """How large the elements of the clipped gradients are; inf: not known."""
        coef = numbers.coef
        if not self._typical(numbers):
            if not numbers.absmax:  # sharded gradients, whose Clipper has no tensor_stats
                return math.inf
            if isinstance(coef, Tensor):
                return float((numbers.vector("absmax") * coef).max())
            return max(numbers.absmax) * coef
        if isinstance(coef, Tensor):
            norm = float(torch.linalg.vector_norm(numbers.norms * coef))
        else:
            norm = numbers.total_norm * coef
        return norm / math.sqrt(self.elements or 1)

    def _typical(self, numbers: HostStats) -> bool:
        return self.elements is not None and numbers.layout.norm_type == 2

    def message(self, seen: Seen) -> str:
        self._announced = True
        which = "a typical element" if self._typical(seen.numbers) else "even the largest element"
        return (
            f"the clipped gradients are so small that Adam's eps swallows the update: {which} is {self._size:.1e} "
            f"(coefficient {seen.record['coef']:.1e}), below eps {self.eps:.0e}, in {self._share.yes} of the last "
            f"{len(self._share)} updates, which leaves less than half of m / (sqrt(v) + eps). "
            f"Raise the limit, or lower Adam's eps"
        )


class Spike:
    """The norm is far above what it lately was.

    The score is (log n - median) / max(IQR / 1.349, 0.1), of the logarithms of the window's finite norms before n, from
    20 of them on. IQR / 1.349 is the standard deviation of a normal distribution, and no outlier moves it.
    """

    SCORE, LEAST, FLOOR = 6.0, 20, 0.1

    def __init__(self, window: int) -> None:
        self.window = window
        self._recent: deque[float] = deque()
        self._ordered: list[float] = []
        self._median, self._unannounced = 0.0, 0

    def update(self, seen: Seen) -> bool:
        norm = seen.record["total_norm"]
        if not (0 < norm < math.inf):
            return False
        log, ordered = math.log(norm), self._ordered
        count, spike = len(ordered), False
        if count >= self.LEAST:
            low, self._median, high = (ordered[int(q * (count - 1))] for q in (0.25, 0.5, 0.75))
            spike = log - self._median > self.SCORE * max((high - low) / 1.349, self.FLOOR)
        if count == self.window:
            del ordered[bisect_left(ordered, self._recent.popleft())]
        self._recent.append(log)
        insort(ordered, log)
        self._unannounced += spike
        return spike

    def message(self, seen: Seen) -> str:
        norm, usual, record = seen.record["total_norm"], math.exp(self._median), seen.record
        more = f" ({self._unannounced - 1} more since the last such warning)" if self._unannounced > 1 else ""
        self._unannounced = 0
        top = next(iter(record["top_norms"]), None)
        where = f", largest in {top}" if top is not None else ""
        if record["skipped"]:
            done = "the update was skipped"
        elif record["clipped"]:
            done = f"it was clipped (coefficient {record['coef']:.2g})"
        else:
            done = f"it was not clipped; a limit near {2 * usual:.2g} would have"
        return (
            f"the gradient norm {norm:.3g} is {norm / usual:.3g} times its recent median {usual:.3g}{where}{more}; "
            f"{done}. Look at this batch and its loss; if it happens often, lower the learning rate or warm up longer"
        )


class Silent:
    """A gradient was exactly zero for 100 of its steps in a row. Each is named once."""

    STEPS = 100

    def __init__(self) -> None:
        self._runs = torch.zeros(0, dtype=torch.int64, device="cpu")
        self._announced = torch.zeros(0, dtype=torch.bool, device="cpu")
        self._any = False

    def update(self, seen: Seen) -> bool:
        if not self._any and 0.0 not in seen.numbers.absmax:
            return False
        zero = seen.numbers.vector("absmax") == 0
        missing = len(seen.names) - len(self._runs)
        if missing:
            self._runs = torch.cat([self._runs, self._runs.new_zeros(missing)])
            self._announced = torch.cat([self._announced, self._announced.new_zeros(missing)])
        run = torch.where(zero, self._runs[seen.which] + 1, 0)
        self._runs = self._runs.index_copy(0, seen.which, run)  # not in place, see Maxima
        self._any = bool(self._runs.any())
        return bool(self._due().any())

    def _due(self) -> Tensor:
        return (self._runs >= self.STEPS) & ~self._announced

    def message(self, seen: Seen) -> str:
        new = self._due()
        due = new.nonzero().flatten().tolist()
        self._announced = self._announced | new
        been = "gradient has" if len(due) == 1 else "gradients have"
        return (
            f"the {been} been exactly zero for {self.STEPS} steps: {listing(seen.names, due)}. Such a parameter learns "
            f"nothing, and weight decay still moves it: look for a dead activation, a mask, a detach or a branch that "
            f"is never taken, or freeze it with requires_grad_(False)"
        )


class Skips:
    """At least 10 of the window's updates were skipped for gradients that were not finite. Skips by `when` are meant.

    Heard again only after fewer than 5 were.
    """

    MANY = 10

    def __init__(self, window: int) -> None:
        self._share, self._announced = Share(window), False

    def update(self, seen: Seen) -> bool:
        self._share.add(bool(seen.record["skipped"] and seen.record["nonfinite"]))
        if 2 * self._share.yes < self.MANY:
            self._announced = False
        return self._share.yes >= self.MANY and not self._announced

    def message(self, seen: Seen) -> str:
        self._announced = True
        return (
            f"{self._share.yes} of the last {len(self._share)} updates were skipped because gradients were not finite, "
            f"this time in {broken(seen)}. Look at the loss and the batches of those steps; in mixed precision, use "
            f"bfloat16 or a GradScaler with a lower init_scale; otherwise lower the learning rate"
        )


class Passed:
    """A gradient was not finite, and the update was not skipped: its elements were set to 0, or nothing was done."""

    def update(self, seen: Seen) -> bool:
        return bool(seen.record["nonfinite"] and not seen.record["skipped"])

    def message(self, seen: Seen) -> str:
        if "zeroed" in seen.record:
            return (
                f"{seen.record['zeroed']} elements of {seen.record['nonfinite']} of {seen.numbers.count} gradients "
                f"were not finite and were set to 0: {broken(seen)}. Look at this batch and its loss: what is left of "
                f'such a gradient may mean little, and Clipper(..., nonfinite="skip") leaves the update out'
            )
        return (
            f"{seen.record['nonfinite']} of {seen.numbers.count} gradients were not finite and were passed on: "
            f"{broken(seen)}. Unless something else leaves this update out, the parameters are NaN from now on: "
            f'Clipper(..., nonfinite="skip") leaves such updates out, "raise" stops there'
        )


class Alarms:
    """All of them. Each kind keeps quiet for 1000 steps after it was heard."""

    QUIET = 1000

    def __init__(self, window: int, adam_eps: float | None, elements: int | None) -> None:
        self.alarms: dict[str, Any] = {"clipping": Clipping(window)}
        if adam_eps is not None:
            self.alarms["eps"] = Swallowed(window, adam_eps, elements)
        self.alarms |= {"spike": Spike(window), "zero": Silent(), "skips": Skips(window), "nonfinite": Passed()}
        self._quiet = dict.fromkeys(self.alarms, 0)  # for so many steps more

    def update(self, seen: Seen) -> list[tuple[str, str]]:
        """What there is to say after this step: kinds and messages."""
        notices = []
        for kind, alarm in self.alarms.items():
            if alarm.update(seen) and not self._quiet[kind]:
                notices.append((kind, alarm.message(seen)))
                self._quiet[kind] = self.QUIET
            elif self._quiet[kind]:
                self._quiet[kind] -= 1
        return notices


def broken(seen: Seen) -> str:
    """The gradients that are not finite."""
    which = seen.which.tolist()
    return listing(seen.names, [which[i] for i in seen.numbers.broken])


def listing(names: list[str], chosen: list[int]) -> str:
    """The names of those chosen; of many, the first five."""
    called = [names[i] if not names[i].isdecimal() else f"gradient {names[i]}" for i in chosen[:5]]
    return ", ".join(called) + (f" and {len(chosen) - 5} more" if len(chosen) > 5 else "")
