"""The libraries of csrc/, and how each is compiled where no wheel brought it: once, into a cache folder that all
processes of a user share.

``cpp`` is the packer with the CPU kernels, a Python module against torch's headers; ``kernels`` the CPU kernels alone,
``abi3`` a packer on stable interfaces and ``cuda`` the CUDA kernels, none of which needs torch to be built.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from . import build_cache, cpu_interface, cuda_interface
from .library import Library

NAME = "fastclip_native"
CFLAGS = ["-O3", "-ffp-contract=fast", "-Wno-psabi"]
LIBRARY_FLAGS = [*CFLAGS, "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden"]  # of those without torch
ISAS = ("portable", "neon", "avx2", "avx512")  # of csrc/cpu/, the least first
NVCC_FLAGS = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static"]


def source_folder() -> pathlib.Path:
    package = pathlib.Path(__file__).resolve().parent.parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "elementwise.h").is_file():
            return folder
    raise FileNotFoundError(f"csrc/ is neither in {package} nor beside it.")


def sources(*suffixes: str, folders: tuple[str, ...] = ()) -> list[pathlib.Path]:
    """The files of csrc/ that have one of these suffixes: all, or those of some folders and those in none."""
    root = source_folder()
    found = (path for path in root.rglob("*") if path.suffix in suffixes)
    return sorted(path for path in found if not folders or path.parent == root or path.parent.name in folders)


def _keyed(name: str, suffixes: tuple[str, ...], *parts: Any, folders: tuple[str, ...] = ()) -> pathlib.Path:
    """The file in the cache for a library of the present sources, this machine, its C library and `parts`."""
    key = hashlib.sha256()
    for part in (platform.machine(), *platform.libc_ver(), *parts):
        key.update(f"{part}\n".encode())
    for source in sources(*suffixes, folders=folders):
        key.update(source.relative_to(source_folder()).as_posix().encode() + source.read_bytes())
    return build_cache.path_of(name, key.hexdigest()[:16])


def _circumstances(compiler: list[str]) -> str:
    """The compiler, and where it looks for programs, headers and libraries."""
    names = ("PATH", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "LD_LIBRARY_PATH", "TMPDIR")
    return "\n".join([build_cache.program(compiler), *(os.environ.get(name, "") for name in names)])


# ---- C++ ----


def cxx() -> list[str]:
    """The command of the C++ compiler: $CXX, which may have arguments, as in "ccache g++"; else c++."""
    text = os.environ.get("CXX") or "c++"
    try:
        words = [text] if shutil.which(text) else shlex.split(text)  # a path may have spaces
    except ValueError:  # a quotation that does not end
        words = []
    return words or [text]


def _found_cxx() -> list[str]:
    compiler, *arguments = cxx()
    found = shutil.which(compiler)
    if found is None:
        raise FileNotFoundError(f"there is no C++ compiler: {compiler!r} is not on the PATH.")
    return [os.path.abspath(found), *arguments]


def _run(command: list[str], verbose: bool) -> None:
    if verbose:
        print(shlex.join(command), flush=True)
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stdout + result.stderr)


CPP_FOLDERS = ("cpu", "torch")


def _cpp_path() -> pathlib.Path:
    name = NAME + sysconfig.get_config_var("EXT_SUFFIX")
    compiler = (torch.__version__, sys.implementation.cache_tag, shlex.join(cxx()))
    return _keyed(name, (".cpp", ".h"), *compiler, *CFLAGS, folders=CPP_FOLDERS)


def _compile_cpp(library: pathlib.Path, verbose: bool) -> None:
    program, *arguments = _found_cxx()
    from torch.utils import cpp_extension

    folder = library.parent
    if arguments or shlex.quote(program) != program:  # torch takes $CXX for the name of one program
        program = str(folder / "c++")
        command = shlex.join(_found_cxx())
        pathlib.Path(program).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        os.chmod(program, 0o700)
    with _environment(CXX=program, PATH=_path_with_ninja()):
        # A Python module would be imported from here, so ask for a plain library: _open_module imports it in its place.
        cpp_extension.load(
            NAME,
            [str(source) for source in sources(".cpp", folders=CPP_FOLDERS)],
            build_directory=str(folder),
            extra_cflags=CFLAGS,
            is_python_module=False,
            verbose=verbose,
        )
    os.replace(next(folder.glob(f"{NAME}*.so")), library)


def _open_module(name: str, library: pathlib.Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    spec = importlib.util.spec_from_file_location(name, library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def check_isa() -> None:
    """ValueError if ``FASTCLIP_CPU_ISA`` names no instruction set."""
    asked = os.environ.get("FASTCLIP_CPU_ISA")
    if asked and asked not in ISAS:
        raise ValueError(f"FASTCLIP_CPU_ISA must be one of {', '.join(ISAS)}, got {asked!r}")


cpp = Library(
    *("C++", "a slower packer", _cpp_path, _compile_cpp, functools.partial(_open_module, NAME)),
    circumstances=lambda: _circumstances(cxx()),
    needs=_found_cxx,
    check=check_isa,
)


# ---- C++ without torch ----


def _kernels_path() -> pathlib.Path:
    return _keyed("libfastclip_cpu.so", (".cpp", ".h"), shlex.join(cxx()), *LIBRARY_FLAGS, folders=("cpu",))


def _compile_kernels(library: pathlib.Path, verbose: bool) -> None:
    _run([*_found_cxx(), *LIBRARY_FLAGS, *map(str, sources(".cpp", folders=("cpu",))), "-o", str(library)], verbose)


kernels = Library(
    *("C++ kernels", "plain torch", _kernels_path, _compile_kernels, cpu_interface.open_library),
    circumstances=lambda: _circumstances(cxx()),
    needs=_found_cxx,
    check=check_isa,
    prebuilt={"darwin": "libfastclip_cpu.dylib", "win32": "fastclip_cpu.dll"}.get(sys.platform, "libfastclip_cpu.so"),
)


def _abi3_path() -> pathlib.Path:
    return _keyed("packer.abi3.so", (".cpp", ".h"), shlex.join(cxx()), *LIBRARY_FLAGS, folders=("abi3", "cpu"))


def _compile_abi3(library: pathlib.Path, verbose: bool) -> None:
    flags = [*LIBRARY_FLAGS, "-I" + sysconfig.get_paths()["include"]]
    if sys.platform == "darwin":
        flags += ["-undefined", "dynamic_lookup"]  # Python's own symbols
    _run([*_found_cxx(), *flags, *map(str, sources(".cpp", folders=("abi3",))), "-o", str(library)], verbose)


abi3 = Library(
    *("abi3", "a slower packer", _abi3_path, _compile_abi3, functools.partial(_open_module, "fastclip.lib.packer")),
    circumstances=lambda: _circumstances(cxx()),
    needs=_found_cxx,
    prebuilt="packer.pyd" if sys.platform == "win32" else "packer.abi3.so",
)


# ---- CUDA ----


def nvcc() -> str:
    """The path of CUDA's compiler: from $CUDA_HOME or the PATH, as torch finds it."""
    from torch.utils import cpp_extension

    if home := cpp_extension.CUDA_HOME:
        path = pathlib.Path(home) / "bin" / "nvcc"
        if path.is_file():
            return str(path)
    if path_found := shutil.which("nvcc"):
        return path_found
    raise FileNotFoundError("there is no CUDA compiler: nvcc is neither in $CUDA_HOME/bin nor on the PATH.")


def architectures() -> list[str]:
    """What to compile for, "90" and the like: $TORCH_CUDA_ARCH_LIST if set, else the GPUs that are here."""
    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        names = listed.replace(";", " ").split()
        found = {name.removesuffix("+PTX").replace(".", "") for name in names}
        if odd := [name for name in found if not name.rstrip("abcdef").isdigit()]:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST must list architectures such as 9.0, got {odd} in {listed!r}.")
    else:
        count = torch.cuda.device_count()
        found = {"{}{}".format(*torch.cuda.get_device_capability(i)) for i in range(count)}
    if not found:
        raise RuntimeError("there is no GPU to compile for; TORCH_CUDA_ARCH_LIST can name one.")
    return sorted(found)


def nvcc_command(library: pathlib.Path, archs: list[str]) -> list[str]:
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [nvcc(), *NVCC_FLAGS, *targets, *map(str, sources(".cu")), "-o", str(library)]


def _cuda_path() -> pathlib.Path:
    return _keyed("libfastclip_cuda.so", (".cu", ".h"), *nvcc_command(pathlib.Path(), architectures()))


def _compile_cuda(library: pathlib.Path, verbose: bool) -> None:
    _run(nvcc_command(library, architectures()), verbose)


cuda = Library(
    *("CUDA", "the next best one", _cuda_path, _compile_cuda, cuda_interface.open_library),
    circumstances=lambda: _circumstances([nvcc()]),
    needs=nvcc,
    prebuilt="fastclip_cuda.dll" if sys.platform == "win32" else "libfastclip_cuda.so",
)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _path_with_ninja() -> str:
    """The ninja package's program is on the PATH only where its environment was activated."""
    path = os.environ.get("PATH", "")
    try:
        import ninja

        return os.pathsep.join((ninja.BIN_DIR, path))
    except ImportError:
        return path
