"""Loads csrc/: compiled on first use, kept in a cache folder, shared by all processes of a user.

Two libraries: the C++ one, a Python module against torch, and the CUDA one, which knows neither torch nor Python and is
called through ctypes.
"""

from __future__ import annotations

import contextlib
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
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor

from . import build_cache, cuda_interface
from .base import FusedBackend, NativeGroup, NativeStepGroup

NAME = "fastclip_native"
PROCESS = os.getpid()  # that imported this; another one later is a fork of it
CFLAGS = ["-O3", "-ffp-contract=fast", "-Wno-psabi"]
ISAS = ("portable", "avx2", "avx512")  # of csrc/cpu/, the least first
NVCC_FLAGS = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static"]


class CppLibrary(FusedBackend, Protocol):
    """The functions of csrc/torch/bindings.cpp, which says what each does."""

    def pack(self, items: list[Any], gradients_of: bool, /) -> list[NativeGroup] | None: ...
    def pack_step(
        self, params: list[Tensor], grads: list[Tensor], states: list[list[Tensor]], steps: list[Tensor], /
    ) -> NativeStepGroup | None: ...
    def unwrap(
        self, items: list[Any], gradients_of: bool, specs: list[Any] | None, gradient_specs: list[Any] | None, /
    ) -> tuple[list[Any] | None, list[Tensor], list[Any] | None, list[Tensor], list[int] | None] | None: ...
    def bump_versions(self, tensors: list[Tensor], /) -> None: ...
    def same_items(self, a: list[Any], b: list[Any], /) -> bool: ...
    def measure(
        self, group: NativeGroup, p: float, max_norm: float | None, before: Tensor | None, /
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]: ...
    def apply_(self, group: NativeGroup, coef: Tensor, /) -> None: ...
    def clamp_(self, group: NativeGroup, low: float, high: float, /) -> bool: ...
    def adamw_(
        self, step: NativeStepGroup, coef: Tensor, frozen: Tensor | None, lr: float, beta1: float, beta2: float,
        eps: float, weight_decay: float, maximize: bool, zero_grad: bool, seed: int | None, /,
    ) -> None: ...  # fmt: skip
    def sgd_(
        self, step: NativeStepGroup, coef: Tensor, frozen: Tensor | None, lr: float, momentum: float,
        one_minus_dampening: float, weight_decay: float, nesterov: bool, maximize: bool, zero_grad: bool,
        seed: int | None, /,
    ) -> None: ...  # fmt: skip
    def isa(self) -> str: ...
    def work_alone(self) -> None: ...


Opened = TypeVar("Opened")


class Library(Generic[Opened]):
    """One library of csrc/: built if the cache does not have it, opened, and from then on at hand.

    Args:
        name: in messages.
        instead: what happens without it, in messages.
        path: -> the file that a build of the present sources for this machine has.
        compile_to: (path, verbose) -> None, or raises what the compiler raised. Nothing else is in the path's folder.
        open_at: (path) -> the library.
        circumstances: -> what else decides whether a build fails.
        check: raises ValueError for a setting that is wrong, whether or not there is a compiler.
    """

    def __init__(
        self,
        name: str,
        instead: str,
        path: Callable[[], pathlib.Path],
        compile_to: Callable[[pathlib.Path, bool], None],
        open_at: Callable[[pathlib.Path], Opened],
        circumstances: Callable[[], str] = str,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.name, self.path = name, path
        self._instead, self._compile_to, self._open_at = instead, compile_to, open_at
        self._circumstances, self._check = circumstances, check
        self._lock = threading.Lock()
        self.opened: Opened | None = None  # as the last load() left it
        self._failure: str | None = None

    def load(self) -> Opened | None:
        """The library, built if need be; None if that failed (`failure` says why, and a warning said so once)."""
        if self.opened is not None or self._failure is not None:
            return self.opened
        with self._lock:
            if self.opened is None and self._failure is None:
                self._check()
                try:
                    self.opened = self._build()
                except Exception as error:  # noqa: BLE001 - whatever a compiler or a linker does, training goes on
                    self._failure = _reason(error)
                    warnings.warn(
                        f"fastclip could not build its {self.name} backend and falls back to {self._instead}: "
                        f"{self._failure} `python -m fastclip build` tries again and shows the whole story.",
                        RuntimeWarning,
                        stacklevel=4,
                    )
        return self.opened

    def get(self) -> Opened:
        """The library, where it can be had: whoever asks knows that from :meth:`load`, or is told why not."""
        library = self.opened if self.opened is not None else self.load()
        if library is None:
            raise RuntimeError(f"the {self.name} backend could not be built: {self._failure}")
        return library

    def failure(self) -> str | None:
        """Why :meth:`load` returned None, in one sentence."""
        return self._failure

    def build(self, verbose: bool = False, force: bool = False) -> Opened:
        """Compile the library unless the cache has it, and open it. Raises what the compiler or the linker raised."""
        self._check()
        return self._build(verbose, force, retry=True)

    def _build(self, verbose: bool = False, force: bool = False, retry: bool = False) -> Opened:
        """`retry`: also if another process has failed a short while ago, and would again."""
        entry = build_cache.Entry(self.path(), self._circumstances())
        unusable = None if force else build_cache.checksum(entry.path)
        if unusable is not None:
            try:
                return self._open_at(entry.path)
            except (ImportError, OSError):
                pass  # whole, but built on a machine with other system libraries, say
        with entry.locked():
            if not retry and (reason := entry.failure()):
                raise RuntimeError(reason)
            try:
                if force or build_cache.checksum(entry.path) in (None, unusable):
                    print(f"fastclip: compiling its {self.name} backend (once) ...", file=sys.stderr, flush=True)
                    start = time.perf_counter()
                    entry.put(lambda path: self._compile_to(path, verbose))
                    print(f"fastclip: compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
                return self._open_at(entry.path)
            except Exception as error:
                entry.remember_failure(_reason(error))
                raise


def source_folder() -> pathlib.Path:
    package = pathlib.Path(__file__).resolve().parent.parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "elementwise.h").is_file():
            return folder
    raise FileNotFoundError(f"csrc/ is neither in {package} nor beside it.")


def sources(*suffixes: str) -> list[pathlib.Path]:
    """The files of csrc/ and its folders that have one of these suffixes."""
    return sorted(path for path in source_folder().rglob("*") if path.suffix in suffixes)


def _keyed(name: str, suffixes: tuple[str, ...], *parts: Any) -> pathlib.Path:
    """The file in the cache for a library of the present sources with `suffixes`, this machine and `parts`."""
    key = hashlib.sha256()
    for part in (platform.machine(), *parts):
        key.update(f"{part}\n".encode())
    for source in sources(*suffixes):
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


def _cpp_path() -> pathlib.Path:
    name = NAME + sysconfig.get_config_var("EXT_SUFFIX")
    compiler = (torch.__version__, sys.implementation.cache_tag, shlex.join(cxx()))
    return _keyed(name, (".cpp", ".h"), *compiler, *_cpp_flags())


def _cpp_flags() -> list[str]:
    # torch's own threads are OpenMP's on Linux; elsewhere at::parallel_for falls back to one thread.
    return [*CFLAGS, "-fopenmp"] if sys.platform == "linux" else CFLAGS


def _compile_cpp(library: pathlib.Path, verbose: bool) -> None:
    compiler, *arguments = cxx()
    found = shutil.which(compiler)
    if found is None:
        raise FileNotFoundError(f"there is no C++ compiler: {compiler!r} is not on the PATH.")
    from torch.utils import cpp_extension

    folder = library.parent
    program = os.path.abspath(found)
    if arguments or shlex.quote(program) != program:  # torch takes $CXX for the name of one program
        program = str(folder / "c++")
        command = shlex.join([os.path.abspath(found), *arguments])
        pathlib.Path(program).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        os.chmod(program, 0o700)
    with _environment(CXX=program, PATH=_path_with_ninja()):
        # A Python module would be imported from here, so ask for a plain library; _open_cpp imports it from its place.
        cpp_extension.load(
            NAME,
            [str(source) for source in sources(".cpp")],
            build_directory=str(folder),
            extra_cflags=_cpp_flags(),
            extra_ldflags=["-fopenmp"] if sys.platform == "linux" else [],
            is_python_module=False,
            verbose=verbose,
        )
    os.replace(next(folder.glob(f"{NAME}*.so")), library)


def _open_cpp(library: pathlib.Path) -> CppLibrary:
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(library))
    spec = importlib.util.spec_from_file_location(NAME, library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    if os.getpid() != PROCESS:
        module.work_alone()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=module.work_alone)
    return cast(CppLibrary, module)


def _check_isa() -> None:
    asked = os.environ.get("FASTCLIP_CPU_ISA")
    if asked and asked not in ISAS:
        raise ValueError(f"FASTCLIP_CPU_ISA must be one of {', '.join(ISAS)}, got {asked!r}")


cpp = Library(
    *("C++", "plain torch, which is slower", _cpp_path, _compile_cpp, _open_cpp),
    circumstances=lambda: _circumstances(cxx()),
    check=_check_isa,
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
    command = nvcc_command(library, architectures())
    if verbose:
        print(" ".join(command), flush=True)
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stdout + result.stderr)


cuda = Library(
    *("CUDA", "the next best one", _cuda_path, _compile_cuda, cuda_interface.open_library),
    circumstances=lambda: _circumstances([nvcc()]),
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


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line] or lines or [type(error).__name__]
    return telling[0].rstrip(".") + "."
