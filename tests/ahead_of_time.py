"""Compiles Triton kernels for a GPU that need not be there: `python ahead_of_time.py triton_step 90` prints the result.
(Or, for AMD's, `triton gfx942`.)

Without the interpreter, so in a process of its own: the tests call `compiled`.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent

TYPES = {
    "fp64": {"p", "max_norm", "lr", "beta1", "beta2", "eps", "weight_decay", "momentum", "rest", "log_beta1",
             "log_beta2"},
    "*fp64": {"partial_ptr", "result_ptr", "earlier_ptr", "before_ptr", "absmax_ptr", "coef_ptr", "limits_ptr",
              "rates_ptr"},
    "*fp32": {"lr_ptr", "norm32_ptr"},
    "*i64": {"table_ptr", "addresses_ptr", "counts_ptr"},
    "*i32": {"layout_ptr", "done_ptr", "clamped_ptr"},
    "*i1": {"frozen_ptr"},
}  # fmt: skip


def compiled(file, arch):
    """A dict for each variant of each kernel in fastclip/backends/`file`.py: registers, stack, loops."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, __file__, file, str(arch)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def pinned_triton():
    return re.search(r"^triton==(\S+)", (ROOT / "constraints.txt").read_text(), re.M).group(1)


def assert_no_spills(row):
    """No stack and no local memory, for the triton of constraints.txt; other versions allocate registers in their own
    way, so what they leave on the stack is only a warning."""
    found = {key: row[key] for key in ("STACK", "LOCAL") if row[key]}
    if not found:
        return
    version = metadata.version("triton").partition("+")[0]
    message = f"triton {version} makes a {row['kernel']} for {row['dtype']} with {found}: {row}"
    assert version != pinned_triton(), message
    warnings.warn(message, stacklevel=2)


def in_flight(sass):
    """How many loads of 128 bits the machine code issues, where it issues most in a row before it uses what one of them
    brings."""
    lines = re.findall(r"^\s+/\*[0-9a-f]{4}\*/\s+(.*?);", sass, re.M)
    most, loaded = 0, set()
    for line in lines:
        load = re.match(r".*LDG\.E(\.\w+)*\.128", line)
        target = re.search(r"LDG\S*\s+R(\d+)", line)
        used = {int(r) for r in re.findall(r"\bR(\d+)\b", line.split(",", 1)[1] if "," in line else "")}
        registers = {r for first in loaded for r in range(first, first + 4)}
        if used & registers or re.search(r"\b(BRA|EXIT|BAR)\b", line):
            loaded = set()
        if load and target:
            loaded.add(int(target.group(1)))
            most = max(most, len(loaded))
    return most


def stack_in_loops(sass):
    """How often the stack is used in the innermost loops that load 128 bits."""
    code = [(int(at, 16), line) for at, line in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.M)]
    jumps = [(int(to, 16), at) for at, line in code for to in re.findall(r"\bBRA\b.*?0x([0-9a-f]+)", line)]
    loops = [(begin, end) for begin, end in jumps if begin < end]
    count = 0
    for begin, end in loops:
        body = [line for at, line in code if begin <= at <= end]
        inner = any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in loops)
        if not inner and any(re.search(r"LDG\.E(\.\w+)*\.128", line) for line in body):
            count += sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in body)
    return count


def dependence(sass):
    """What there is of waiting for the launch in front (ACQBULK), of letting the next begin (PREEXIT), and of reads,
    in the order of the machine code, each once in a row."""
    found = re.findall(r"\b(ACQBULK|PREEXIT|LDG)\b", sass)
    return [kind for i, kind in enumerate(found) if i == 0 or found[i - 1] != kind]


def of_amd(assembly):
    """Registers, spills, stack, and the loads of each kind of memory, by their names."""
    fields = {"REG": "vgpr_count", "SPILLS": "vgpr_spill_count", "STACK": "private_segment_fixed_size"}
    found = {name: int(re.search(rf"\.{field}:\s+(\d+)", assembly).group(1)) for name, field in fields.items()}
    return {**found, "loads": sorted(set(re.findall(r"(?:global|buffer|flat)_load_\w+", assembly)))}


def main(file, arch):
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if file == "triton":
        from fastclip.backends.triton import clip as kernels
        from fastclip.backends.triton import reduction
        from fastclip.backends.triton.launch import depends_on, options_of
        from fastclip.backends.triton.table import TILE_BYTES
    else:
        import fastclip.backends.triton.optim as kernels

    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32) if amd else GPUTarget("cuda", int(arch), 32)

    def variants(dtype):
        bits, narrow = dtype.primitive_bitwidth, dtype == tl.bfloat16
        if file == "triton":  # with the options they are launched with
            block, dependent = TILE_BYTES * 8 // bits, depends_on(target)
            torch_dtype = next(known for known, dtype_of in reduction.DTYPES.items() if dtype_of == dtype)
            for norm in range(4):
                for repaired in (False, True) if norm == 0 else (False,):
                    names = reduction._measure_kernel.arg_names[-6:]
                    values = reduction.constants(torch_dtype, block, norm, repaired, dependent)
                    options = options_of(target, reduction.most_registers(norm))
                    yield reduction._measure_kernel, dict(zip(names, values)), options
            options = options_of(target, kernels.MOST_REGISTERS, dependent)
            yield kernels._apply_kernel, {"TILE": block, "DEPENDENT": dependent}, options
            yield kernels._repair_kernel, {"TILE": block}, options_of(target, kernels.MOST_REGISTERS)
            yield kernels._clamp_kernel, {"TILE": block}, options_of(target)
        else:
            block = min(kernels.MOST_TILE, kernels.TILE_BYTES * 8 // bits)
            common, warps = {"MAXIMIZE": False, "BLOCK": block}, {"num_warps": kernels.NUM_WARPS}
            absent = {"frozen_ptr": None, "lr_ptr": None}
            for pointers in ({}, absent) if dtype == tl.float32 else ():
                yield kernels._count_kernel, {"BLOCK": kernels.COUNTED, **pointers}, warps
            for stochastic in (False, True) if narrow else (False,):
                for zero_grad in (False, True):
                    last = {**common, **({} if zero_grad else absent), "STOCHASTIC": stochastic, "ZERO_GRAD": zero_grad}
                    for amsgrad in (False, True):
                        yield kernels._adamw_kernel, {**last, "AMSGRAD": amsgrad}, warps
                    for momentum in (False, True):
                        yield kernels._sgd_kernel, {**last, "MOMENTUM": momentum, "NESTEROV": momentum}, warps

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    rows = []
    for dtype in (tl.float32, tl.bfloat16, tl.float16, tl.float64):
        for kernel, options, limits in variants(dtype):
            constants = {n: v for n, v in {"DTYPE": dtype, **options}.items() if n in kernel.arg_names}
            known = {name: kind for kind, names in TYPES.items() for name in names}
            signature = {a: "constexpr" if a in constants else known.get(a, "i32") for a in kernel.arg_names}
            source = ASTSource(kernel, signature, constexprs=constants)
            binary = triton.compile(source, target=target, options=limits)
            row = {"kernel": kernel.fn.__name__, "dtype": str(dtype)}
            row |= {name: value for name, value in options.items() if name != "DTYPE" and value is not None}
            if amd:
                rows.append({**row, **of_amd(binary.asm["amdgcn"])})
                continue
            with tempfile.NamedTemporaryFile(suffix=".cubin") as opened:
                opened.write(binary.asm["cubin"])
                opened.flush()
                command = [cuobjdump, "--dump-resource-usage", opened.name]
                usage = subprocess.run(command, capture_output=True, text=True).stdout
                code = subprocess.run([cuobjdump, "-sass", opened.name], capture_output=True, text=True).stdout
            # A loop: a block of instructions that branches back to its own label.
            ptx = binary.asm["ptx"]
            blocks = re.findall(r"^(\$L__BB\S+):.*?\n(.*?)(?=^\$L__BB|\Z)", ptx, re.M | re.S)
            loops = [body for label, body in blocks if re.search(r"bra(\.uni)?\s+" + re.escape(label) + ";", body)]
            memory = [[re.findall(rf"{op}\.global[.\w:]*", loop) for op in ("ld", "st")] for loop in loops]
            rows.append({
                **row,
                **{name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)},
                "loops": [{"loads": loads, "stores": stores} for loads, stores in memory],
                "in_flight": in_flight(code),
                "stack_in_loops": stack_in_loops(code),
                "dependence": dependence(code),
                "bounded": "maxnreg" in limits,
                "waits": re.findall(r"griddepcontrol\.(\w+)", ptx),
            })  # fmt: skip
    print(json.dumps(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
