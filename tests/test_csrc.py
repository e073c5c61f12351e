"""The folders of csrc/ and what they share with Python: who knows torch, the layout of structs, equal constants."""

import ast
import ctypes
import importlib
import re
import shutil
import subprocess

import emulation
import pytest
import torch

from fastclip.native import cpu_interface, cuda_interface, libraries

ROOT = libraries.source_folder()
BACKENDS = ROOT.parent / "fastclip" / "backends"
cuda = importlib.import_module("fastclip.backends.cuda")


def sources(folder):
    return [path for path in libraries.sources(".h", ".cpp", ".cu") if path.is_relative_to(ROOT / folder)]


def test_only_two_folders_know_python_and_one_torch():
    folders = {path.relative_to(ROOT).parts[0] for path in sources("")}
    assert folders == {"abi3", "cpu", "cuda", "torch", "elementwise.h"}
    for path in sources(""):
        folder = path.relative_to(ROOT).parts[0]
        code = _code(path.read_text())
        assert folder == "torch" or not re.search(r"\b(?:ATen|c10|at|torch|pybind11|py)(?:/|::)", code), path
        assert folder in ("torch", "abi3") or "Python.h" not in code, path
        assert folder != "abi3" or "Python.h" not in code or "define Py_LIMITED_API 0x030A0000" in code, path
        includes = re.findall(r'#include "(?:\.\./)?(abi3|cpu|cuda|torch)/', path.read_text())
        assert set(includes) <= ({"cpu"} if folder in ("torch", "abi3") else set()), f"{path}: {includes}"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_cpu_launchers_compile_without_torch():
    command = ["g++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", ROOT / "cpu" / "launch.cpp"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_no_file_is_longer_than_450_lines():
    for path in sources(""):
        assert len(path.read_text().splitlines()) < 450, path


# ---- structs ----


def layout(structs):
    """Names of structs and of their fields -> offset and size in bytes."""
    found = {}
    for struct in structs:
        found[struct.__name__] = (0, ctypes.sizeof(struct))
        for name, *_ in struct._fields_:
            field = getattr(struct, name)
            found[f"{struct.__name__}.{name}"] = (field.offset, field.size)
    return found


def library_layout(library):
    found, offset, size = {}, ctypes.c_uint32(), ctypes.c_uint32()
    while name := library.fastclip_cuda_field(len(found), ctypes.byref(offset), ctypes.byref(size)):
        found[name.decode()] = (offset.value, size.value)
    return found


def test_structs_have_the_layout_of_the_library():
    """Name, offset and size of each field; and the library names all fields that interface.h has."""
    expected = library_layout(emulation.library.load())
    assert layout(cuda_interface.STRUCTS) == expected
    header = _code((ROOT / "cuda" / "interface.h").read_text())
    declared = {}
    for struct, body in re.findall(r"struct (\w+) \{(.*?)\};", header, re.S):
        declared[struct] = re.findall(r"(\w+)(?=[,;])", body)
    named = {name: [field.partition(".")[2] for field in expected if field.startswith(f"{name}.")] for name in declared}
    assert declared == named and len(declared) == len(cuda_interface.STRUCTS)


def test_a_struct_that_differs_would_be_found():
    class StepDecision(ctypes.Structure):  # two fields of the same size in the wrong order
        _fields_ = tuple(cuda_interface.StepDecision._fields_[i] for i in (1, 0, *range(2, 10)))

    others = [struct for struct in cuda_interface.STRUCTS if struct.__name__ != "StepDecision"]
    assert layout([*others, StepDecision]) != library_layout(emulation.library.load())


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_structs_of_the_cpu_kernels_have_the_layout_of_the_header(tmp_path):
    """As the compiler says: the library has no function for it."""
    fields = [(struct.__name__, name) for struct in cpu_interface.STRUCTS for name, *_ in struct._fields_]
    lines = [f'PRINT("{s.__name__}", 0, sizeof({s.__name__}))' for s in cpu_interface.STRUCTS]
    lines += [f'PRINT("{s}.{f}", offsetof({s}, {f}), sizeof({s}::{f}))' for s, f in fields]
    (tmp_path / "layout.cpp").write_text(
        f'#include "{ROOT / "cpu" / "launch.h"}"\n#include <cstddef>\n#include <cstdio>\n'
        '#define PRINT(name, offset, size) std::printf(name " %d %d\\n", int(offset), int(size));\n'
        f"using namespace fastclip::cpu;\nint main() {{ {' '.join(lines)} }}\n"
    )
    subprocess.run(["g++", "-std=c++17", tmp_path / "layout.cpp", "-o", tmp_path / "layout"], check=True)
    printed = subprocess.run([tmp_path / "layout"], capture_output=True, text=True, check=True).stdout
    assert layout(cpu_interface.STRUCTS) == {
        name: (int(offset), int(size)) for name, offset, size in map(str.split, printed.splitlines())
    }


HEADERS = {"cuda": (cuda_interface, "cuda/interface.h"), "cpu": (cpu_interface, "cpu/launch.h")}


@pytest.mark.parametrize("which", HEADERS)
def test_functions_are_declared_as_in_the_header(which):
    """Each function of a header, with its result and its arguments: a pointer, or a number of which size."""
    interface, file = HEADERS[which]
    kinds = {"double": "double", "int32_t": "int", "uint32_t": "uint", "int64_t": "long", "bool": "bool", "void": None}

    def kind(text):
        if text.replace("FASTCLIP_API ", "").startswith("const char"):
            return f"string{text.count('*')}"
        text = text.replace("const ", "").replace("FASTCLIP_API ", "").strip()
        return "pointer" if "*" in text else kinds[text]

    def python_kind(declared):
        pointer = declared is ctypes.c_void_p or hasattr(declared, "contents")
        names = {
            ctypes.c_char_p: "string1",
            ctypes.c_double: "double",
            ctypes.c_int32: "int",
            ctypes.c_uint32: "uint",
            ctypes.c_int64: "long",
            ctypes.c_bool: "bool",
            None: None,
        }
        return "pointer" if pointer else names[declared]

    header = _code((ROOT / file).read_text())
    expected = {}
    for result, name, arguments in re.findall(r"^([\w *]+?) ?(fastclip_\w+)\((.*?)\);", header, re.S | re.M):
        types = [re.sub(r"\w+$", "", argument.strip()) for argument in arguments.split(",") if argument.strip()]
        expected[name] = (kind(result), [kind(text) for text in types])
    ours = {
        name: (python_kind(result), [python_kind(argument) for argument in arguments])
        for name, (result, arguments) in interface.FUNCTIONS.items()
    }
    expected.pop("fastclip_cpu_measure", None)  # for C++ alone
    assert ours == expected


# ---- constants that Triton and Python have for themselves ----


def python_constants(name, folder=BACKENDS.parent):
    """The values of `name = value` and `name = tl.constexpr(value)`, several in a row or not, in all Python files."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Assign):
                continue
            names, values = node.targets[0], node.value
            several = isinstance(names, ast.Tuple) and isinstance(values, ast.Tuple)
            for target, value in zip(names.elts, values.elts) if several else [(names, values)]:
                if isinstance(target, ast.Name) and target.id == name:
                    wrapped = isinstance(value, ast.Call) and ast.unparse(value.func) == "tl.constexpr"
                    found.append(ast.literal_eval(value.args[0] if wrapped else value))
    return found


def backend_texts():
    return "".join(path.read_text() for path in sorted(BACKENDS.rglob("*.py")))


def cpp_constant(name):
    """Of elementwise.h, which the kernels on CPU and CUDA share; no other file of csrc/ has one of this name."""
    definitions = [
        (path.name, value)
        for path in sources("")
        for value in re.findall(rf"constexpr \w+ {name} = ([^;]+);", path.read_text())
    ]
    ((file, value),) = definitions
    assert file == "elementwise.h"
    return ast.literal_eval(value)


def test_the_same_limit_of_vanishing_squares():
    """Below it a power sum in float32 is taken again in float64."""
    assert cpp_constant("VANISHING") == 1e-24
    assert python_constants("VANISHING") == [1e-24]


def test_the_same_epsilon_of_the_clip_coefficient():
    """torch's, in C++ and CUDA, in the rules, and where the Triton kernel and plain torch decide by themselves."""
    assert cpp_constant("NORM_EPS") == 1e-6
    assert python_constants("EPS") == [1e-6]
    assert re.findall(r"limit / \(norm \+ ([^)]+)\)", backend_texts()) == ["1e-6"] * 2


def test_the_same_numbers_of_dtypes():
    """Dtype in C++, which CPU and CUDA share, and what the cuda backend sends."""
    (names,) = re.findall(r"enum class Dtype : int \{ ([^}]+) \};", (ROOT / "elementwise.h").read_text())
    names_of = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}
    assert names.split(", ") == [names_of[dtype] for dtype in sorted(cuda.DTYPES, key=cuda.DTYPES.get)]
    assert sorted(cuda.DTYPES.values()) == [0, 1, 2, 3]
    assert sum("enum class Dtype" in path.read_text() for path in sources("")) == 1


def test_the_same_norms():
    """Norm in C++ and L2, L1, MAX, POWER in Triton, whose kernels are chosen by number."""
    (names,) = re.findall(r"enum class Norm : int \{ ([^}]+) \};", (ROOT / "elementwise.h").read_text())
    assert names.upper().split(", ") == ["L2", "L1", "MAX", "POWER"]
    assert backend_texts().count("L2, L1, MAX, POWER = (tl.constexpr(i) for i in range(4))") == 1


def test_the_same_random_numbers():
    """For stochastic rounding: the multipliers, and how far apart the keys of tensors are."""
    multipliers = {"0x9E3779B9", "0x7FEB352D", "0x846CA68B"}
    assert set(re.findall(r"0x[0-9A-F]{8}(?=u)", (ROOT / "elementwise.h").read_text())) == multipliers
    bodies = [
        ast.unparse(node)
        for path in BACKENDS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and "random_bits" in node.name
    ]
    assert len(bodies) == 1
    assert {int(number) for number in re.findall(r"\* (\d+)", bodies[0])} == {int(m, 16) for m in multipliers}
    spaced = [path for path in sources("") for _ in re.findall(r"random_bits\([^;]*seed\) \* 8\b", path.read_text())]
    assert sorted(path.name for path in spaced) == ["launch.cpp", "step.cu"]
    assert len(re.findall(r"random_bits\(tensor\b.*\bseed\b.*\) \* 8\n", backend_texts())) == 1


def test_one_size_of_chunks_on_the_cpu():
    """The packer counts the chunks that the launchers walk."""
    definitions = [path.name for path in sources("") if re.search(r"constexpr int64_t CHUNK\b", path.read_text())]
    assert definitions == ["launch.h"]
    assert "next_segment(" in (ROOT / "torch" / "pack.cpp").read_text()  # which counts them


def _code(text):
    """Without comments."""
    return re.sub(r"//[^\n]*", "", text)
