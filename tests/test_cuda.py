"""csrc/cuda/ without a GPU: what nvcc makes of it, and its kernels run on the CPU (see emulation/)."""

import ctypes
import fractions
import functools
import importlib
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import emulation
import pytest
import torch
from cases import (
    CASES,
    EXTREMES,
    NORM_ERROR,
    assert_scaled,
    clip_factor,
    gradients,
    parameter,
    rounding,
    tensor_norm,
    tiny,
    total_norm,
    wide,
)

import fastclip
from fastclip import backends
from fastclip.gradients.pack import pack
from fastclip.native import build_cache, libraries

cuda = importlib.import_module("fastclip.backends.cuda")
emulated = pytest.mark.skipif(torch.cuda.is_available(), reason="emulated only where there is no GPU")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, CUDA's compiler")


def _cuobjdump():
    """CUDA's disassembler: the one inside the triton package, or on the PATH; None if there is neither."""
    triton = importlib.util.find_spec("triton")
    inside = [Path(p) / "backends/nvidia/bin/cuobjdump" for p in triton.submodule_search_locations] if triton else []
    return next((str(path) for path in inside if path.is_file()), shutil.which("cuobjdump"))


# tables × (dtypes × norms + apply, clamp, repair), then dtypes × steps, and tables × what prepares them
KERNELS = 4 * (4 * 4 + 3 * 4) + 5 * 5 + 3 * 2 * 2

needs_cuobjdump = pytest.mark.skipif(_cuobjdump() is None, reason="needs cuobjdump, from CUDA or triton")


@pytest.fixture(
    scope="module",
    params=[pytest.param("80", marks=pytest.mark.long), "90", pytest.param("100", marks=pytest.mark.long)],
)
def compiled(request, tmp_path_factory):
    """The library for one architecture, and what ptxas said of each kernel: compiled once for all workers."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    library, log = (folder / f"nvcc{request.param}{suffix}" for suffix in (".so", ".log"))
    with build_cache.Entry(library, "").locked():
        if not log.is_file():
            command = [*libraries.nvcc_command(library, [request.param]), "-Xptxas", "-v"]
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            log.write_text(result.stderr)
    assert "warning" not in log.read_text(), log.read_text()
    return library, log.read_text()


@needs_nvcc
@pytest.mark.slow
def test_registers(compiled):
    """No kernel spills or has a stack frame, and all leave room for 4 blocks of 256 threads on a multiprocessor.

    But for the steps that have more to keep: float64's, for 2, and AMSGrad's stochastically rounded, for 3.
    """
    _, log = compiled
    rows = re.findall(
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        log,
        re.S,
    )
    assert len(rows) == KERNELS
    for name, *usage in rows:
        assert usage[:3] == ["0", "0", "0"], f"{name}: {usage}"
        wide = "step_kernel" in name and "F64" in name
        amsgrad = "StochasticBF16" in name and "AdamWStepILb1" in name
        assert int(usage[3]) <= (128 if wide else 80 if amsgrad else 64), name


@needs_nvcc
@needs_cuobjdump
@pytest.mark.slow
def test_loads_are_128_bits_wide(compiled):
    """The main loops hold four or more 16-byte loads (and stores, where all is written), a step's of every array."""
    library, _ = compiled
    kernels = _disassembled(library)
    assert len(kernels) == KERNELS
    seen = set()
    for name, code in kernels.items():
        kind = re.search(r"(measure|apply|clamp|repair|prepare|step)_kernel", name).group(1)
        if kind == "prepare" or (kind == "measure" and "NormE3" in name):
            continue  # a thread a tensor; and a general power waits for float64 logarithms, not for memory
        loads = [len(re.findall(r"LDG\.E\.128", loop)) for loop in _loops(code)]
        stores = [len(re.findall(r"STG\.E\.128", loop)) for loop in _loops(code)]
        assert max(loads) >= 4, f"{name}: {loads}"
        if kind == "apply":
            assert max(stores) >= 4, name
        if kind == "step":
            optimizer = re.search(r"(AdamW|Sgd)StepILb(\d)", name).groups()
            arrays = {("AdamW", "1"): 5, ("AdamW", "0"): 4, ("Sgd", "1"): 3, ("Sgd", "0"): 2}[optimizer]
            each = 2 if arrays <= 3 else 1
            # All but the gradient's are stored; of a pipelined loop one store may stand outside.
            assert any(n == arrays * each and m >= (arrays - 1) * each - 1 for n, m in zip(loads, stores)), name
        seen.add((kind, re.search(r"cuda\S*?(F32|F64|StochasticBF16|BF16|F16)E", name).group(1)))
    assert len(seen) == 5 * 4 + 1


@needs_nvcc
@needs_cuobjdump
@pytest.mark.slow
def test_steps_calculate_alike_wherever_an_element_lies(compiled):
    """Vectors, edges and misaligned arrays: the same sums, products and fused ones, whatever the compiler likes."""
    library, _ = compiled
    kernels = {name: code for name, code in _disassembled(library).items() if "step_kernel" in name}
    assert len(kernels) == 5 * 5
    for name, code in kernels.items():
        found = set()
        for loop in _loops(code):
            counts = [len(re.findall(rf"\b[FD]{operation}\b", loop)) for operation in ("ADD", "MUL", "FMA")]
            if len(re.findall(r"\bLDG", loop)) > 1 and sum(counts):
                found.add(tuple(fractions.Fraction(n, sum(counts)) for n in counts))
        assert len(found) == 1, f"{name}: {found}"


@needs_nvcc
@needs_cuobjdump
@pytest.mark.slow
def test_only_apply_begins_early_and_waits_first(compiled):
    """From sm_90 on measure lets the next kernel begin (PREEXIT), and apply, which alone is launched so, waits for the
    end of the one before (ACQBULK) ahead of whatever touches memory, and of every branch and end."""
    library, _ = compiled
    early = not library.name.startswith("nvcc80")
    for name, code in _disassembled(library).items():
        kind = re.search(r"(measure|apply|clamp|repair|prepare|step)_kernel", name).group(1)
        code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", code)
        assert any("PREEXIT" in line for line in code) == (early and kind == "measure"), name
        waits = [i for i, line in enumerate(code) if "ACQBULK" in line]
        assert len(waits) == (early and kind == "apply"), name
        touches = re.compile(r"\b(LDG|LD|LDGSTS|STG|ST|ATOM|ATOMG|RED|REDG|EXIT|BRA|CALL|RET)\b")
        first = next(i for i, line in enumerate(code) if touches.search(line))
        assert not waits or waits[0] < first, f"{name}: {code[: waits[0]]}"


@functools.cache
def _disassembled(library):
    """Kernel name -> its machine code."""
    listing = subprocess.run([_cuobjdump(), "-sass", str(library)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\s*Function : (\S+)$", listing, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


def _loops(code):
    """The innermost loops: from the target of a branch backwards to the branch, with no other such in between."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)]
    spans = []
    for at, text in lines:
        target = re.search(r"\bBRA\S*\s.*?0x([0-9a-f]+)", text)
        if target and int(target.group(1), 16) < at:
            spans.append((int(target.group(1), 16), at))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return ["\n".join(text for at, text in lines if begin <= at <= end) for begin, end in inner]


# ---- the kernels, run ----


@pytest.fixture
def machine():
    """Sets the number of multiprocessors and the order of the blocks of the emulated GPU."""

    def emulate(units, order):
        emulation.library.load().fastclip_emulate(units, order)
        cuda._workspaces.clear()  # their size goes by the multiprocessors, which no real device changes

    yield emulate
    emulate(2, 0)


def clipped(parameters, max_norm, norm_type=2.0):
    with fastclip.use_backend("cuda"):
        stats = fastclip.Clipper(parameters, fastclip.rules.GlobalNorm(max_norm, norm_type)).clip_()
    values = [stats.total_norm, stats.tensor_norms, stats.tensor_absmax, stats.coef]
    return [torch.as_tensor(v).clone() for v in values] + [g.clone() for g in gradients(parameters)]


@emulated
@pytest.mark.parametrize("p", [2.0, 1.0, math.inf, 3.0, 0.5, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_whatever_the_order_of_the_blocks(machine, dtype, p):
    """Bitwise: whichever block comes last combines what the others left in one and the same order."""
    before = CASES["many chunks"](dtype=dtype, device="cpu") + CASES["misaligned"](dtype=dtype, device="cpu")
    results = []
    for order in range(4):
        machine(3, order)
        results.append(clipped([parameter(q.grad.clone()) for q in before], 0.5, p))
    for other in results[1:]:
        for a, b in zip(other, results[0]):
            assert torch.equal(a, b)
    expected = torch.tensor([tensor_norm(q.grad, p) for q in before], dtype=torch.float64)
    torch.testing.assert_close(results[0][1].double(), expected, rtol=NORM_ERROR, atol=0)


@emulated
@pytest.mark.parametrize("units", [1, 2, 5, 64])
def test_any_number_of_multiprocessors(machine, units):
    machine(units, units)
    parameters = [parameter(torch.randn(n)) for n in (50_000, 0, 1, 1024, 1023, 7, 4096, 30_000)]
    before = wide(gradients(parameters))
    norm, norms, absmax, coef, *after = clipped(parameters, 1.0)
    expected = torch.tensor([tensor_norm(b) for b in before], dtype=torch.float64)
    torch.testing.assert_close(norms.double(), expected, rtol=NORM_ERROR, atol=0)
    assert norm.item() == pytest.approx(expected.norm().item(), rel=NORM_ERROR)
    assert absmax.tolist() == [b.abs().max().item() if b.numel() else 0 for b in before]
    assert_scaled(after, before, [coef.item()] * len(before), relative=rounding(torch.float32))


@emulated
@pytest.mark.parametrize("place", [0, 1023, 1024, 70_001, 99_999])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_nonfinite_element(machine, value, place):
    machine(3, 1)
    parameters = [parameter(torch.ones(100_000)), parameter(torch.ones(9))]
    parameters[0].grad[place] = value
    norm, norms, absmax, _, *after = clipped(parameters, 1.0)
    assert torch.equal(norm.isnan(), torch.tensor(math.isnan(value)))
    assert norms[1] == 3 and absmax[1] == 1
    assert absmax[0].isnan() if math.isnan(value) else absmax[0] == math.inf
    assert after[0][place].isnan()


@emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("extreme", EXTREMES)
def test_squares_that_float32_cannot_hold(machine, extreme, dtype):
    machine(3, 2)
    parameters = [parameter(EXTREMES[extreme](dtype)), parameter(torch.full((5,), 0.25, dtype=dtype))]
    expected = torch.tensor([tensor_norm(g) for g in gradients(parameters)], dtype=torch.float64)
    norm, norms, *_ = clipped(parameters, math.inf)
    torch.testing.assert_close(norms.double(), expected, rtol=NORM_ERROR, atol=tiny(torch.float32))
    assert norm.item() == pytest.approx(expected.norm().item(), rel=NORM_ERROR)


@emulated
def test_more_tensors_than_parameters_hold(machine):
    """Beyond that the table is read from device memory, uploaded once and again when an address changes."""
    most = emulation.library.load().fastclip_cuda_max_table()
    assert most == emulation.MOST_PARAMETERS
    entries = cuda._addresses.entries
    entries.clear()
    for count, uploads in ((most, 0), (most + 1, 1)):
        parameters = [parameter(torch.full((k % 50 // 46,), 0.5)) for k in range(count)]  # most of them empty
        expected = math.sqrt(sum(0.25 * (k % 50 // 46) for k in range(count)))
        for _ in range(2):
            assert clipped(parameters, math.inf)[0].item() == pytest.approx(expected, rel=NORM_ERROR)
        assert len(entries) == uploads
    parameters[49].grad = torch.tensor([100.0])
    changed = math.sqrt(expected**2 - 0.25 + 100**2)
    assert clipped(parameters, math.inf)[0].item() == pytest.approx(changed, rel=NORM_ERROR)
    assert len(entries) == 2
    before = wide(gradients(parameters))
    clipped(parameters, 1.0)
    assert_scaled(gradients(parameters), before, [clip_factor(total_norm(before), 1.0)] * len(before))


@emulated
def test_tables_of_every_size(machine):
    """The three sizes of parameters, and device memory: at their edges, among tensors without elements."""
    machine(5, 1)
    edges = (320, emulation.SECOND_PARAMETERS, emulation.MOST_PARAMETERS)
    for count in (1, *edges, *(edge + 1 for edge in edges)):
        parameters = [parameter(torch.full((k % 17 // 15 * (1 + k % 3 * 300),), 0.5)) for k in range(count - 1)]
        parameters.append(parameter(torch.full((9,), 0.5)))
        before = wide(gradients(parameters))
        norm = total_norm(before)
        assert clipped(parameters, 1.0)[0].item() == pytest.approx(norm, rel=NORM_ERROR)
        assert_scaled(gradients(parameters), before, [clip_factor(norm, 1.0)] * count)


def packed_by_hand(places, itemsize):
    """What csrc/cuda/table.h says of a table, of tensors at (address, elements)."""
    tile, addresses, offsets = emulation.THREADS * 64 // itemsize, [], [0]
    for address, size in places:
        end = address % 16 // itemsize + size if size else 0
        addresses.append(address << 16 | ((end - 1) % tile if size else 0))
        offsets.append(offsets[-1] + (end + tile - 1) // tile)
    return addresses, offsets


@emulated
def test_no_address_from_before_is_used():
    """Gradients that move, grow, lose their alignment, come and go, call by call, some to where they were before."""
    generator = torch.Generator().manual_seed(0)
    most = emulation.MOST_PARAMETERS
    memory = torch.ones(1 << 18)

    def draw(count, most_elements):
        sizes = torch.randint(0, most_elements, (count,), generator=generator)
        ends = (sizes + torch.randint(0, 9, (count,), generator=generator)).cumsum(0)
        return list(zip((ends - sizes).tolist(), sizes.tolist()))

    kept = [draw(most + 1, 700), draw(most + 7, 60), draw(most - 1, 60)]
    cuda._addresses.entries.clear()
    cuda._layouts.entries.clear()
    for call in range(150):
        some = kept[int(torch.randint(0, 3, (), generator=generator))]
        by = int(torch.randint(0, 13, (), generator=generator))
        places = (
            some,
            [(begin + 4 * by, size) for begin, size in some],  # the layout stays
            [(begin + by, size) for begin, size in some],  # but for the alignment
            [(begin, size - (size > by)) for begin, size in some],  # the addresses stay
            draw(most - 2 + by, 90),
        )[call % 5]
        views = [memory[begin : begin + size] for begin, size in places]
        (group,) = pack(views, gradients=True, write=False).groups
        gradients = cuda._table(group).gradients
        found = [
            list((kind * length).from_address(address))
            for kind, address, length in (
                (ctypes.c_uint64, gradients.packed_address, len(places)),
                (ctypes.c_uint32, gradients.tile_offsets, len(places) + 1),
            )
        ]
        expected = packed_by_hand([(view.data_ptr(), view.numel()) for view in views], 4)
        for i, view in enumerate(views):
            if not view.numel():  # whose address is of no concern
                found[0][i] = expected[0][i]
        assert tuple(found) == expected, call
        assert gradients.tiles == found[1][-1] and gradients.tensors == len(places)
    assert len(cuda._addresses.entries) == cuda._addresses.SIZE


@emulated
def test_a_layout_is_uploaded_once(monkeypatch):
    """Where gradients lie elsewhere in every call, their sizes and alignment are as they were: addresses go alone."""
    found = []

    def upload(values, *arguments):
        found.append(len(values))
        return backends.upload(values, *arguments)

    monkeypatch.setattr(cuda, "upload", upload)
    for cache in (cuda._addresses, cuda._layouts):
        cache.entries.clear()
    count = emulation.MOST_PARAMETERS + 1
    sets = [[parameter(torch.ones(4 * (k % 40 == 0))) for k in range(count)] for _ in range(3)]
    for parameters in sets:
        for _ in range(2):
            assert clipped(parameters, math.inf)[0].item() == pytest.approx(math.sqrt(44), rel=NORM_ERROR)
    assert found == [count, count + 1, count, count]
    for module in (backends, backends.transfer):
        monkeypatch.setattr(module, "capturing", lambda device: True)
    monkeypatch.setattr(cuda, "capturing", lambda device: True)
    found.clear()
    clipped(sets[0], math.inf)
    assert found == [count, count + 1], "a CUDA graph needs copies of its own"


@emulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_clip_is_two_launches(dtype):
    """The second may begin before the first has ended. The norm is rounded without one, and has memory of its own."""

    def launches():
        numbers = ctypes.c_int(), ctypes.c_int()
        emulation.library.load().fastclip_emulated_launches(*map(ctypes.byref, numbers))
        return [number.value for number in numbers]

    parameters = [parameter(torch.ones(5000, dtype=dtype)) for _ in range(3)]
    before = launches()
    with fastclip.use_backend("cuda"):
        norm = fastclip.clip_norm_(parameters, 1.0)
    assert [new - old for new, old in zip(launches(), before)] == [2, 1]
    assert norm.dtype == torch.promote_types(dtype, torch.float32)
    assert dtype == torch.float64 or norm.untyped_storage().nbytes() == 4
    assert norm.item() == pytest.approx(math.sqrt(15000), rel=NORM_ERROR)


@emulated
def test_workspace_is_left_clean(machine):
    """The counters that find the last block are zero again, also after fewer blocks than the launch before had."""
    for units, size in ((3, 200_000), (3, 3000), (1, 100_000), (3, 200_000)):
        machine(units, 0)
        for n in (size, 5, size):
            clipped([parameter(torch.ones(n)), parameter(torch.ones(3))], 1.0)
        (workspace,) = cuda._workspaces.values()
        counters = workspace[units * 4 * 32 :].view(torch.int32)
        assert len(counters) == units * 4 + 1 and not counters.any()


@emulated
def test_an_error_of_cuda_is_raised():
    with pytest.raises(RuntimeError, match="fastclip_cuda_workspace_bytes: invalid device ordinal"):
        cuda._check("fastclip_cuda_workspace_bytes", 7, ctypes.byref(ctypes.c_int64()))


SANITIZERS = {
    "thread": (["-fsanitize=thread", "-Wno-tsan"], None, "clean"),
    "address": (["-fsanitize=address,undefined", "-fno-sanitize-recover"], None, "clean"),
    "thread, a barrier missing": (
        ["-fsanitize=thread", "-Wno-tsan"],
        ("__syncthreads();  // the previous call's sums have been read", ""),
        "data race",
    ),
    "address, a bound of the steps missing": (
        ["-fsanitize=address"],
        ("for (; i < to; i += THREADS) stepper", "for (; i < to + 1; i += THREADS) stepper"),
        "heap-buffer-overflow",
    ),
    "address, a bound missing": (
        ["-fsanitize=address"],
        ("min(vectors_begin * VECTOR, to)", "vectors_begin * VECTOR"),
        "heap-buffer-overflow",
    ),
}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("case", SANITIZERS)
def test_sanitizers(case, tmp_path):
    """No race between the threads of a block and no access outside a tensor; and either would be found."""
    flags, change, expected = SANITIZERS[case]
    source = {p.relative_to(libraries.source_folder()): p.read_text() for p in libraries.sources(".cu", ".h")}
    if change:
        (name,) = (name for name, text in source.items() if text.count(change[0]) == 1)
        source[name] = source[name].replace(*change)
    for name, text in source.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    program = tmp_path / "program"
    command = [
        *("g++", *emulation.FLAGS, f"-I{emulation.FOLDER}", "-g", "-O0", *flags),
        *("-x", "c++", *sorted(tmp_path.rglob("*.cu")), emulation.FOLDER / "race.cpp", "-o", program),
    ]
    subprocess.run(command, check=True, capture_output=True)
    run = [program, "2" if "-fsanitize=thread" in flags else "1"]
    result = subprocess.run(run, capture_output=True, text=True)
    if "unexpected memory mapping" in result.stderr:  # ThreadSanitizer of GCC 12 against much randomised addresses
        result = subprocess.run(["setarch", "-R", *run], capture_output=True, text=True)
    assert expected in result.stdout + result.stderr, result.stderr[-3000:]
    assert (result.returncode == 0) == (change is None)


# ---- the choice ----


@emulated
def test_auto_takes_cuda_where_triton_cannot_run(monkeypatch):
    triton = importlib.import_module("fastclip.backends.triton.clip")
    monkeypatch.setattr(cuda, "DEVICE", "cuda")
    monkeypatch.setattr(triton, "_no_driver", lambda: "there is no C compiler")
    assert backends.choose(torch.device("cuda")).name == "cuda"
    monkeypatch.setattr(triton, "_no_driver", lambda: None)
    assert backends.choose(torch.device("cuda")).name == "triton"


@emulated
def test_triton_says_why_it_cannot_run():
    reason = backends.get("triton").why_not(torch.device("cuda"))
    assert reason.startswith("triton cannot run (") and "driver" in reason
