"""Runs made up for the monitor: gradients set by hand, and events that complete when told."""

import contextlib
import itertools
import json
import math
import warnings

import torch

import fastclip
from fastclip.host_stats import flattened
from fastclip.monitor import GradientWarning
from fastclip.monitor.pending import PendingRead

NAN, INF = math.nan, math.inf


class Model:
    """Parameters of one element, whose gradients are set by hand."""

    def __init__(self, names, limit=1.0, nonfinite="propagate", named=True):
        self.names = names
        self.parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in names]
        given = list(zip(names, self.parameters)) if named else self.parameters
        self.clipper = fastclip.Clipper(given, limit, nonfinite=nonfinite)

    def step(self, *gradients):
        """The statistics of these gradients; None stands for no gradient."""
        for parameter, gradient in zip(self.parameters, gradients):
            parameter.grad = None if gradient is None else torch.tensor([float(gradient)])
        return self.clipper.clip_()


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientWarning)
        yield


def watch(monitor, steps, losses=None, **options):
    """Steps, each a tuple of gradients, through a monitor; what it warned of, as (kind, step)."""
    steps = list(steps)
    model = Model([f"layer{i}.weight" for i in range(len(steps[0]))], **options)
    with quiet():
        for gradients, loss in zip(steps, losses or itertools.repeat(None)):
            monitor.update(model.step(*gradients), loss)
        return [(notice.kind, notice.step) for notice in monitor.warnings]


def lines(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def steps_of(path):
    return [line for line in lines(path) if "step" in line and "warning" not in line]


class Event:
    """As torch.cuda's, complete once told."""

    def __init__(self):
        self.complete, self.waits = False, 0

    def query(self):
        return self.complete

    def synchronize(self):
        self.complete, self.waits = True, self.waits + 1


def late(monkeypatch):
    """From now on monitors read late; the events, one a step, to complete at will."""
    made = []

    def start(step, stats, loss, loss_on_device):
        made.append(Event())
        host, layout = flattened(stats.tensors(), loss_on_device)
        return PendingRead(step, loss, host=host, layout=layout, event=made[-1])

    monkeypatch.setattr(PendingRead, "start", start)
    return made
