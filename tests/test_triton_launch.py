"""Triton's launches without a GPU and without the interpreter: what a driver that does nothing is told to launch."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

LAUNCHES = """
import types
import torch
import triton
from triton import knobs
from bench.launches import activate
from fastclip.backends import transfer
from fastclip.backends.triton import apply_, launch, measure, reduction, clip, table
from fastclip.gradients.pack import pack

driver = activate(90)
assert knobs.compilation.instrumentation_mode == "" and knobs.runtime.debug is False  # they are there
gradients = [torch.ones(n) for n in (5, 100_000, 0, 7)]
numbers = torch.ones(3, dtype=torch.float64)
groups, through_triton = [], []

def watched(launcher):
    kernel = launcher.kernel
    class Kernel:
        def __getitem__(self, grid):
            through_triton.append(kernel.fn.__name__)
            return kernel[grid]
    launcher.kernel = Kernel()

watched(reduction._launch)
watched(clip._launch_apply)

def call(coef=numbers[0], max_norm=1.0):
    driver.launches.clear()
    through_triton.clear()
    (group,) = pack(gradients, gradients=True, write=True).groups
    measured = measure(group, 2.0, max_norm)
    apply_(group, coef)
    assert [launched.kernel for launched in driver.launches] == ["_measure_kernel", "_apply_kernel"]
    groups.append(group)
    return measured, table.table_of(group), *driver.launches

names = {"_measure_kernel", "_apply_kernel"}
def addresses(launched):
    return {n: a if isinstance(a, int) else a.data_ptr() for n, a in launched.arguments.items() if n.endswith("_ptr")}

# What Triton's own launch passes on, the short way passes on too: numbers for the tensors.
for turn in range(2):
    coef = numbers[turn]  # whose address is a multiple of 16, and then is not: nothing is compiled anew for it
    measured, made, first, second = call(coef)
    assert set(through_triton) == (set() if turn else names), through_triton
    layout = made.layout
    assert addresses(first)["norm32_ptr"] == measured.norm32.data_ptr()
    assert addresses(first)["result_ptr"] == measured.power.data_ptr() == addresses(first)["before_ptr"]
    assert addresses(first)["partial_ptr"] == layout.partial.data_ptr()
    assert addresses(first)["done_ptr"] == layout.done.data_ptr()
    for launched in (first, second):
        assert launched.grid == (layout.programs, 1, 1) and launched.stream == 0
        assert addresses(launched)["addresses_ptr"] == made.addresses.data_ptr()
        assert addresses(launched)["layout_ptr"] == layout.device.data_ptr()
        assert launched.arguments["tensors"] == 4 and launched.arguments["tiles"] == layout.tiles
        assert launched.arguments["DEPENDENT"] is True and launched.arguments["TILE"] == layout.tile
        assert launched.metadata.num_warps == 8 and launched.metadata.maxnreg == 64
        kinds = {n: isinstance(a, int if turn else torch.Tensor) for n, a in launched.arguments.items() if "_ptr" in n}
        assert all(kinds.values()), kinds
    assert addresses(second)["coef_ptr"] == coef.data_ptr() and second.arguments["coef_stride"] == 0
    assert (first.arguments["p"], first.arguments["max_norm"], first.arguments["chained"]) == (2.0, 1.0, 0)
    assert not first.metadata.launch_pdl and second.metadata.launch_pdl

# A stream of its own has a workspace of its own, and so has a CUDA graph.
layouts = [layout]
driver.stream = 5
_, made, first, second = call()
assert first.stream == second.stream == 5 and not through_triton
layouts.append(made.layout)
transfer.capturing = lambda device: True
layouts += [call()[1].layout, call()[1].layout]
transfer.capturing = lambda device: False
driver.stream = 0
assert len({layout.done.data_ptr() for layout in layouts}) == 4
assert call()[1].layout is layouts[0]

# Profilers are told of every launch.
told = []
hook = lambda metadata: told.append(metadata.get()["name"])
knobs.runtime.launch_enter_hook.add(hook)
call()
assert set(told) == names and not through_triton
knobs.runtime.launch_enter_hook.remove(hook)
call()
assert len(told) == 2
before = knobs.runtime.launch_enter_hook
for assigned in (hook, None):  # in the place of Triton's chain of hooks
    knobs.runtime.launch_enter_hook = assigned
    call()
assert len(told) == 4 and not through_triton
knobs.runtime.launch_enter_hook = before

# Tools that change the code compile anew; another GPU has its own kernels.
knobs.compilation.instrumentation_mode = "tool"
call()
assert set(through_triton) == names
knobs.compilation.instrumentation_mode = ""
driver.device = 1
call()
assert set(through_triton) == names
call()
assert not through_triton

# Where a Triton is made otherwise, every launch is its own.
for launcher in (reduction._launch, clip._launch_apply):
    launcher._compiled.clear()
launch.HOOKS = ("gone",)
for _ in range(2):
    call()
    assert set(through_triton) == names
assert launch.Compiled.of(None) is None and launch.Compiled.of(types.SimpleNamespace(run=1)) is None
"""


def test_launches_past_triton(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.chdir(Path(__file__).parent.parent)
    result = subprocess.run([sys.executable, "-c", LAUNCHES], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
