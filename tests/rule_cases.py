"""What the tests of several rules share."""

import importlib.util

import torch
from cases import parameter

# Gradients, rules and oracles here are float64. A hundred steps of a running mean are off by less than 1e-14; a
# z-score, the difference of numbers near 1 divided by at least 1e-6, makes that 1e-8.
CLOSE = 1e-8


def agc_parameters(dtype=torch.float32):
    torch.manual_seed(1)
    shapes = [(16, 9), (8, 3, 3, 3), (7,), (), (1, 5), (4, 1), (3, 0), (0, 3), (0,), (2, 70_000)]
    ps = [parameter(torch.randn(s).mul(0.05).to(dtype), torch.randn(s).to(dtype)) for s in shapes]
    with torch.no_grad():
        ps[0][3] = 0  # its limit is eps
        ps[0].grad[5] = 0
        ps[1][:4] *= 100  # unclipped
    return ps


def installed(package):
    return importlib.util.find_spec(package) is not None


def named():
    torch.manual_seed(0)
    shapes = {"embed.weight": (5, 4), "body.0.weight": (4, 4), "body.0.bias": (4,), "head.weight": (3, 4)}
    return {name: parameter(torch.randn(shape)) for name, shape in shapes.items()}
