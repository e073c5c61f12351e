"""The Triton kernels without a GPU: what they compile to, and their table cache (test_gpu.py runs them on one)."""

import importlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from cases import CASES, gradients, parameter

import fastclip

backend = importlib.import_module("fastclip.backends.triton")
if backend.MISSING:
    pytest.skip(backend.MISSING, allow_module_level=True)
interpreted = pytest.mark.skipif(not backend.INTERPRET, reason="looks at the tables of CPU tensors")

# Runs without the interpreter, so in a process of its own: compiles every kernel for a GPU that need not be there.
COMPILE = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import fastclip.backends.triton as kernels

TYPES = dict(table_ptr="*i64", partial_ptr="*fp64", done_ptr="*i32", result_ptr="*fp64", coef_ptr="*fp64",
             clamped_ptr="*i32",
             limits_ptr="*fp64", tensors="i32", chunks="i32", chunk_size="i32", coef_stride="i32", before_ptr="*fp64",
             chained="i32", p_high="fp32", p_low="fp32", max_norm_high="fp32", max_norm_low="fp32")
cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
ALL = [(kernels._measure_kernel, norm) for norm in range(4)]
ALL += [(kernels._apply_kernel, None), (kernels._clamp_kernel, None)]
rows = []
for kernel, norm in ALL:
    for dtype in (tl.float32, tl.bfloat16, tl.float16, tl.float64):
        block = kernels.TILE_BYTES * 8 // dtype.primitive_bitwidth // (8 if norm == 3 else 1)
        constants = dict(DTYPE=dtype, BLOCK=block, **({} if norm is None else dict(NORM=norm)))
        signature = {a: "constexpr" if a in constants else TYPES[a] for a in kernel.arg_names}
        source, target = ASTSource(kernel, signature, constexprs=constants), GPUTarget("cuda", int(sys.argv[1]), 32)
        compiled = triton.compile(source, target=target, options=dict(num_warps=kernels.NUM_WARPS))
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run([cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True)
        resources = dict(re.findall(r"(REG|STACK|LOCAL):(\\d+)", usage.stdout))
        # The main loop: a block of instructions that branches back to its own label.
        blocks = re.findall(r"^(\\$L__BB\\S+):.*?\\n(.*?)(?=^\\$L__BB|\\Z)", compiled.asm["ptx"], re.M | re.S)
        loops = [body for label, body in blocks if re.search(r"bra(\\.uni)?\\s+" + re.escape(label) + ";", body)]
        memory = [[re.findall(rf"{op}\\.global[.\\w:]*", loop) for op in ("ld", "st")] for loop in loops]
        rows.append(dict(kernel=kernel.fn.__name__, dtype=str(dtype), norm=norm, **resources,
                         loops=[dict(loads=loads, stores=stores) for loads, stores in memory]))
print(json.dumps(rows))
"""


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_ahead_of_time(arch, monkeypatch):
    """For sm_80, sm_90 and sm_100: 128-bit loads (and stores, where all is written) in the main loop, no spills."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.chdir(Path(__file__).parent.parent)
    result = subprocess.run([sys.executable, "-c", COMPILE, str(arch)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert len(rows) == 24
    wide = {"fp64": "v2.b64"}
    for row in rows:
        where = f"{row['kernel']} {row['dtype']} {row['norm']}"
        assert int(row["LOCAL"]) == 0, where
        assert int(row["STACK"]) == 0 or row["norm"] == 3, where
        vector = wide.get(row["dtype"], "v4.b32")
        if row["norm"] == 3:  # a general power waits for float64 logarithms, not for memory
            continue
        main = [loop for loop in row["loops"] if loop["loads"] and all(vector in load for load in loop["loads"])]
        assert any(len(loop["loads"]) >= 4 for loop in main), f"{where}: {row['loops']}"
        if row["kernel"] == "_apply_kernel":
            assert any(loop["stores"] and all(vector in s for s in loop["stores"]) for loop in main), where


@interpreted
def test_table_is_reused_only_for_the_same_addresses():
    with fastclip.use_backend("triton"):
        entries = backend._tables.entries
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
        for _ in range(2 * backend._tables.SIZE):
            keep.append(parameters[0].grad)
            parameters[0].grad = torch.ones(3)
            fastclip.clip_norm_(parameters, 1e9)
        assert len(entries) == backend._tables.SIZE


@interpreted
def test_workspace_is_left_clean():
    """The counters that find the last program are zero again after every launch, or the next one would go wrong."""
    with fastclip.use_backend("triton"):
        backend._tables.entries.clear()
        parameters = CASES["many chunks"](dtype=torch.float32, device="cpu")
        norms = {fastclip.total_norm(gradients(parameters)).item() for _ in range(3)}
        assert len(norms) == 1
        tables = [table for _, _, table in backend._tables.entries]
        assert all((table.done == 0).all() for table in tables)
        assert tables[0].chunks > tables[0].programs > 1


@interpreted
def test_threads_share_the_tables_safely():
    """torch.equal lets other threads run in the middle of a search."""
    from fastclip.table import pack

    models = [[parameter(torch.ones(3 + k)) for _ in range(4)] for k in range(3)]
    wrong, interval = [], sys.getswitchinterval()

    def look_up(parameters):
        expected = torch.tensor([p.grad.data_ptr() // 16 * 16 for p in parameters])
        for _ in range(600):
            (group,) = pack(parameters, gradients=False, write=True).groups
            if not torch.equal(backend._table(group).device[:4], expected):
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
