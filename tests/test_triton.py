"""The Triton kernels without a GPU: what they compile to, and their table cache (test_gpu.py runs them on one)."""

import importlib
import math
import re
import sys
import threading
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from ahead_of_time import assert_no_spills, compiled, pinned_triton
from cases import CASES, DTYPES, gradients, parameter
from hypothesis import given, settings
from hypothesis import strategies as st

import fastclip
from fastclip.backends import transfer
from fastclip.gradients.pack import pack

backend = importlib.import_module("fastclip.backends.triton")
table = importlib.import_module("fastclip.backends.triton.table")
tiles = importlib.import_module("fastclip.backends.triton.tiles")
if tiles.MISSING:
    pytest.skip(tiles.MISSING, allow_module_level=True)
interpreted = pytest.mark.skipif(not tiles.INTERPRET, reason="looks at the tables of CPU tensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch", [pytest.param(80, marks=pytest.mark.long), 90, pytest.param(100, marks=pytest.mark.long)]
)
def test_compiles_ahead_of_time(arch):
    """For sm_80, sm_90 and sm_100: 128-bit loads (and stores, where all is written) in the main loop, no spills."""
    rows = compiled("triton", arch)
    assert len(rows) == 32
    wide = {"fp64": "v2.b64"}
    for row in rows:
        norm = row.get("NORM")
        where = f"{row['kernel']} {row['dtype']} {norm}"
        # The stack of a logarithm; and a number or two, outside of the loops, where float64 or a clamp needs them.
        rare = (row["dtype"] == "fp64" or row["kernel"] == "_clamp_kernel") and row["STACK"] <= 8
        assert_no_spills({**row, "STACK": 0} if norm == 3 or rare else row)
        assert row["stack_in_loops"] == 0, where
        # From sm_90 on `apply_` waits for the launch in front before it reads anything, and `measure` lets the next one
        # begin once it has read all.
        waits = {"_measure_kernel": "launch_dependents", "_apply_kernel": "wait"}.get(row["kernel"])
        assert row["waits"] == ([waits] if waits and arch >= 90 else []), where
        if waits and arch >= 90:
            assert row["dependence"] in (["ACQBULK", "LDG"], ["LDG", "PREEXIT", "LDG"]), f"{where}: {row['dependence']}"
        vector = wide.get(row["dtype"], "v4.b32")
        if norm == 3:  # a general power waits for float64 logarithms, not for memory
            continue
        main = [loop for loop in row["loops"] if loop["loads"] and all(vector in load for load in loop["loads"])]
        assert any(len(loop["loads"]) >= 4 for loop in main), f"{where}: {row['loops']}"
        if row["bounded"]:  # PROGRAMS_PER_SM programs fit on a multiprocessor, each with a tile on its way
            assert row["REG"] <= tiles.MOST_REGISTERS, f"{where}: {row['REG']} registers"
            assert row["in_flight"] >= 4, where
            assert tiles.PROGRAMS_PER_SM * row["in_flight"] * 16 * 32 * tiles.NUM_WARPS >= 64 * 1024
        if row["kernel"] == "_apply_kernel":
            assert row["in_flight"] >= 4, where
            assert any(loop["stores"] and all(vector in s for s in loop["stores"]) for loop in main), where


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("file", ["triton", "triton_step"])
@pytest.mark.parametrize("arch", ["gfx942", "gfx1100"])
def test_compiles_ahead_of_time_for_amd(arch, file):
    """For an MI300 and an RX 7900: 128-bit loads, no spilled vector registers, no stack. (In steps on the first, whose
    warps have 64 threads, a thread has half as much of a tile: 64 bits.)"""
    rows = compiled(file, arch)
    wide = r"(dwordx[24]|b64|b128)$" if (file, arch) == ("triton_step", "gfx942") else r"(dwordx4|b128)$"
    assert len(rows) >= 32
    for row in rows:
        where = f"{row['kernel']} {row['dtype']} {row.get('NORM')}: {row}"
        assert row["SPILLS"] == row["STACK"] == 0, where
        if row["kernel"] != "_count_kernel" and row.get("NORM") != 3:
            assert any(re.search(wide, load) for load in row["loads"]), where


def test_options_of_a_launch():
    """Registers are bounded and launches depend on each other where Triton knows the options: on NVIDIA's GPUs."""
    launch = importlib.import_module("fastclip.backends.triton.launch")
    reduction = importlib.import_module("fastclip.backends.triton.reduction")
    old, new = (SimpleNamespace(backend="cuda", arch=arch) for arch in (80, 90))
    amd, intel = (SimpleNamespace(backend=name, arch=arch) for name, arch in (("hip", "gfx942"), ("xpu", {})))
    warps = {"num_warps": tiles.NUM_WARPS}
    for target in (amd, intel, None):
        assert launch.options_of(target, 64, True) == warps and not launch.depends_on(target)
    assert launch.options_of(new, 64, True) == {**warps, "maxnreg": 64, "launch_pdl": True}
    assert launch.options_of(old, None, False) == warps
    assert launch.depends_on(new) and not launch.depends_on(old)
    assert reduction.most_registers(0) == tiles.MOST_REGISTERS and reduction.most_registers(reduction.GENERAL) is None


def test_spills_fail_for_the_pinned_triton_only(monkeypatch):
    clean = {"kernel": "_apply_kernel", "dtype": "fp32", "STACK": 0, "LOCAL": 0}
    assert_no_spills(clean)
    for key in ("STACK", "LOCAL"):
        monkeypatch.setattr(metadata, "version", lambda name: f"{pinned_triton()}+git1234")
        with pytest.raises(AssertionError, match=f"makes a _apply_kernel for fp32 with {{'{key}': 8}}"):
            assert_no_spills({**clean, key: 8})
        monkeypatch.setattr(metadata, "version", lambda name: "99.0")
        with pytest.warns(UserWarning, match="triton 99.0 makes"):
            assert_no_spills({**clean, key: 8})


@interpreted
def test_table_is_reused_only_for_the_same_addresses():
    with fastclip.use_backend("triton"):
        entries = table._tables.entries
        entries.clear()
        parameters = [parameter(torch.ones(n)) for n in (3, 5000)]
        for _ in range(3):
            fastclip.clip_norm_(parameters, 1e9)
        assert len(entries) == 1
        first = entries[0]
        parameters[0].grad = torch.ones(3)
        fastclip.clip_norm_(parameters, 1e9)
        assert len(entries) == 2 and entries[0] is not first
        keep = []
        for _ in range(2 * table._tables.SIZE):
            keep.append(parameters[0].grad)
            parameters[0].grad = torch.ones(3)
            fastclip.clip_norm_(parameters, 1e9)
        assert len(entries) == table._tables.SIZE


@interpreted
def test_a_layout_is_kept_for_other_addresses():
    """Of the same sizes and alignments; never between a CUDA graph, which has its own workspace, and others."""

    def table_at(offset, size=100, count=3):
        memory = torch.zeros(count, 4096)
        keep.append(memory)
        (group,) = pack([row[offset : offset + size] for row in memory], gradients=True, write=True).groups
        made = table.table_of(group)
        assert made.addresses.tolist() == [row.data_ptr() + offset // 4 * 16 for row in memory]
        return made

    keep = []
    with fastclip.use_backend("triton"):
        first, moved = table_at(0), table_at(0)
        assert first.addresses.tolist() != moved.addresses.tolist() and first.layout is moved.layout
        assert table_at(4).layout is first.layout
        for other in (table_at(1), table_at(0, size=101), table_at(0, count=2)):
            assert other.layout is not first.layout
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transfer, "capturing", lambda device: True)
            captured = [table_at(0) for _ in range(2)]
        assert len({id(made.layout) for made in (*captured, first, table_at(0))}) == 3


SIZES = st.sampled_from([0, 1, 3, 100, 1030, 4096, 4100, 9000])
PLACES = st.lists(st.tuples(SIZES, st.integers(0, 5)), min_size=1, max_size=6)


@interpreted
@settings(max_examples=8, deadline=None)
@given(st.lists(PLACES, min_size=1, max_size=3), st.lists(st.integers(0, 2), min_size=1, max_size=5), st.integers(0, 9))
def test_churn_of_layouts(models, order, seed):
    """Models whose gradients have other sizes, numbers and alignments take turns, each time at other addresses: what is
    a gradient is measured and scaled, and the memory around it is not touched."""
    torch.manual_seed(seed)
    keep = []
    with fastclip.use_backend("triton"):
        for model in (models[which % len(models)] for which in order):
            memory = torch.full((sum(size + 16 for size, _ in model) + 16,), 7.0)
            keep.append(memory)
            gradients, at = [], 8
            for size, offset in model:
                gradients.append(memory[at + offset : at + offset + size].normal_())
                at += size + 16
            expected, inside = memory.double(), torch.zeros(len(memory), dtype=torch.bool)
            for gradient in gradients:
                begin = gradient.storage_offset()
                inside[begin : begin + len(gradient)] = True
            expected[inside] *= 0.5
            powers = [gradient.double().square().sum().item() for gradient in gradients]
            for group in pack(gradients, gradients=True, write=True).groups:
                measured = backend.measure(group, 2.0)
                backend.apply_(group, torch.tensor(0.5, dtype=torch.float64))
                assert sorted(measured.power.tolist()) == pytest.approx(sorted(powers), rel=2e-6)
            assert torch.equal(memory.double(), expected)


@interpreted
@pytest.mark.parametrize("tensors", [[9 * 4096], [4096, 9 * 4096 + 5, 3], [0, 1, 20 * 4096, 0, 5 * 4096, 0]])
@pytest.mark.parametrize("offset", [0, 1])
def test_every_program_has_a_run(tensors, offset, monkeypatch):
    """For any number of programs: each tile is in one run, and runs differ by one tile at most."""
    for programs in (1, 2, 3, 5, 7, 64):
        monkeypatch.setattr(table, "most_programs", lambda device, most=programs: most)
        sizes, begins = torch.tensor(tensors), torch.tensor([offset] * len(tensors))
        group = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
        layout = table.Layout(group, sizes, begins)
        count, runs = len(tensors), layout.programs
        offsets = layout.device[2 * count : 3 * count + 1].tolist()
        first, last = layout.device[3 * count + 1 :].view(2, runs).tolist()
        assert runs == min(programs, layout.tiles)
        met = []
        for program in range(runs):
            begin, end = layout.tiles * program // runs, layout.tiles * (program + 1) // runs
            for tensor in range(first[program], last[program] + 1):
                met += [(tensor, t) for t in range(max(begin, offsets[tensor]), min(end, offsets[tensor + 1]))]
        assert met == [(t, i) for t in range(count) for i in range(offsets[t], offsets[t + 1])]
    monkeypatch.setattr(table, "MOST_RUN", 3 * layout.tile)  # more than run at a time, so that 32 bits hold a run
    monkeypatch.setattr(table, "most_programs", lambda device: 1)
    assert table.Layout(group, sizes, begins).programs == -(-layout.tiles // 3)


@interpreted
def test_workspace_is_left_clean():
    """The counters that find the last program are zero again after every launch, or the next one would go wrong."""
    with fastclip.use_backend("triton"):
        table._tables.entries.clear()
        parameters = CASES["many chunks"](dtype=torch.float32, device="cpu")
        norms = {fastclip.total_norm(gradients(parameters)).item() for _ in range(3)}
        assert len(norms) == 1
        tables = [cached for _, _, cached in table._tables.entries]
        assert all((cached.layout.done == 0).all() for cached in tables)
        assert tables[0].layout.tiles > tables[0].layout.programs > 1


@interpreted
@pytest.mark.parametrize("p", [2.0, 1.0, math.inf, 3.0, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repair(dtype, p):
    """inf and NaN become 0 and are counted; the new measurement is that of the gradients as they are then."""
    sizes, offset = (5, 40_000, 7, 3001, 0), 1
    values = [torch.randn(n + offset).to(dtype)[offset:] for n in sizes]
    values[0][2] = math.inf
    values[1][::1000] = math.nan
    values[1][5], values[1][-1] = -math.inf, math.inf
    expected = [v.nan_to_num(0, 0, 0) for v in values]
    counts = [int((~v.isfinite()).sum()) for v in values]
    with fastclip.use_backend("triton"):
        (group,) = pack(values, gradients=True, write=True).groups
        measured = backend.measure(group, p)
        before = [t.clone() for t in measured[:2]]
        repaired, count = backend.repair_(group, measured, p)
        torch.testing.assert_close(list(measured[:2]), before, rtol=0, atol=0, equal_nan=True)
        assert count.tolist() == counts and count.dtype == torch.int64
        assert all(torch.equal(v, e) for v, e in zip(values, expected))
        again = backend.measure(group, p)
        assert repaired.coef is again.coef is None
        for mine, theirs in ((repaired.power, again.power), (repaired.absmax, again.absmax),
                             (repaired.norm, again.norm), (repaired.total, again.total)):  # fmt: skip
            assert torch.equal(mine, theirs)
        assert (table._tables.entries[0][2].layout.done == 0).all()


@interpreted
def test_repair_touches_only_what_was_measured_as_broken():
    """A tensor whose maximum was finite is neither read nor measured again."""
    values = [torch.ones(100), torch.ones(3000)]
    values[1][7] = math.inf
    with fastclip.use_backend("triton"):
        (group,) = pack(values, gradients=True, write=True).groups
        measured = backend.measure(group, 2.0)
        values[0][0] = math.nan  # would be found if it were read
        repaired, count = backend.repair_(group, measured, 2.0)
    assert values[0][0].isnan() and count.tolist() == [0, 1]
    assert repaired.power.tolist() == [100, 2999] and repaired.absmax.tolist() == [1, 1]
    assert repaired.total.tolist() == [3099, 1] and repaired.norm.item() == pytest.approx(math.sqrt(3099))


@interpreted
def test_threads_share_the_tables_safely():
    """torch.equal lets other threads run in the middle of a search."""
    models = [[parameter(torch.ones(3 + k)) for _ in range(4)] for k in range(3)]
    wrong, interval = [], sys.getswitchinterval()

    def look_up(parameters):
        expected = torch.tensor([p.grad.data_ptr() // 16 * 16 for p in parameters])
        for _ in range(600):
            (group,) = pack(parameters, gradients=False, write=True).groups
            if not torch.equal(table.table_of(group).addresses, expected):
                wrong.append(group)

    with fastclip.use_backend("triton"):
        sys.setswitchinterval(1e-6)
        try:
            threads = [threading.Thread(target=look_up, args=(model,)) for model in models]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
    assert not wrong


def test_a_gpu_without_float64_is_told_of(monkeypatch):
    """As some of Intel's: torch's own operations do the work there."""
    clip = importlib.import_module("fastclip.backends.triton.clip")
    monkeypatch.setattr(clip, "_no_driver", lambda: None)
    monkeypatch.setattr(clip, "has_float64", lambda device: device.index == 0)
    assert clip.why_not(torch.device("xpu", 0)) is None
    assert clip.why_not(torch.device("xpu", 1)) == "its kernels compute in float64 too, which this GPU has not"
    monkeypatch.setattr(fastclip.backends.get("triton"), "why_not", clip.why_not)
    assert fastclip.backends.choose(torch.device("xpu", 1)).name == "foreach"
