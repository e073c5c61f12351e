"""Loads csrc/: compiled on first use, kept in a cache folder, shared by all processes of a user.

Two libraries: the C++ one, a Python module against torch, and the CUDA one, which knows neither torch nor Python and is
called through ctypes.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.machinery
import importlib.util
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

NAME = "fastclip_native"
CFLAGS = ["-O3", "-ffp-contract=fast", "-Wno-psabi"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static"]


class Library:
    """One library of csrc/: built if the cache does not have it, opened, and from then on at hand.

    Args:
        name: in messages.
        instead: what happens without it, in messages.
        path: -> the file that a build of the present sources for this machine has.
        compile_to: (path, verbose) -> None, or raises what the compiler raised.
        open_at: (path) -> the library.
    """

    def __init__(
        self,
        name: str,
        instead: str,
        path: Callable[[], pathlib.Path],
        compile_to: Callable[[pathlib.Path, bool], None],
        open_at: Callable[[pathlib.Path], Any],
    ) -> None:
        self.name, self.path = name, path
        self._instead, self._compile_to, self._open_at = instead, compile_to, open_at
        self._lock = threading.Lock()
        self._opened: Any = None
        self._failure: str | None = None

    def load(self) -> Any:
        """The library, built if need be; None if that failed (`failure` says why, and a warning said so once)."""
        if self._opened is not None or self._failure is not None:
            return self._opened
        with self._lock:
            if self._opened is None and self._failure is None:
                try:
                    self._opened = self.build()
                except Exception as error:  # noqa: BLE001 - whatever a compiler or a linker does, training goes on
                    self._failure = _reason(error)
                    warnings.warn(
                        f"fastclip could not build its {self.name} backend and falls back to {self._instead}: "
                        f"{self._failure} `python -m fastclip build` shows the whole story.",
                        RuntimeWarning,
                        stacklevel=4,
                    )
        return self._opened

    def failure(self) -> str | None:
        """Why :meth:`load` returned None, in one sentence."""
        return self._failure

    def build(self, verbose: bool = False, force: bool = False) -> Any:
        """Compile the library unless the cache has it, and open it. Raises what the compiler or the linker raised."""
        path = self.path()
        if not path.is_file() or force:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _between_processes(path.parent / "lock"):
                if not path.is_file() or force:
                    print(f"fastclip: compiling its {self.name} backend (once) ...", file=sys.stderr, flush=True)
                    start = time.perf_counter()
                    self._compile_to(path, verbose)
                    print(f"fastclip: compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        return self._open_at(path)


def source_folder() -> pathlib.Path:
    package = pathlib.Path(__file__).resolve().parent.parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "bindings.cpp").is_file():
            return folder
    raise FileNotFoundError(f"csrc/ is neither in {package} nor beside it.")


def cache_folder() -> pathlib.Path:
    """Where builds are kept: $FASTCLIP_CACHE, else $XDG_CACHE_HOME/fastclip, else ~/.cache/fastclip."""
    if folder := os.environ.get("FASTCLIP_CACHE"):
        return pathlib.Path(folder)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastclip"


def _keyed(name: str, suffixes: tuple[str, ...], *parts: Any) -> pathlib.Path:
    """The file in the cache for a library of the present sources with `suffixes`, this machine and `parts`."""
    key = hashlib.sha256()
    for part in (platform.machine(), *parts):
        key.update(f"{part}\n".encode())
    for source in sorted(source_folder().iterdir()):
        if source.suffix in suffixes:
            key.update(source.name.encode() + source.read_bytes())
    return cache_folder() / key.hexdigest()[:16] / name


# ---- C++ ----


def _cpp_path() -> pathlib.Path:
    name = NAME + sysconfig.get_config_var("EXT_SUFFIX")
    compiler = (torch.__version__, sys.implementation.cache_tag, os.environ.get("CXX"))
    return _keyed(name, (".cpp", ".h"), *compiler, *_cpp_flags())


def _cpp_flags() -> list[str]:
    # torch's own threads are OpenMP's on Linux; elsewhere at::parallel_for falls back to one thread.
    return [*CFLAGS, "-fopenmp"] if sys.platform == "linux" else CFLAGS


def _compile_cpp(library: pathlib.Path, verbose: bool) -> None:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise FileNotFoundError(f"there is no C++ compiler: {compiler!r} is not on the PATH.")
    from torch.utils import cpp_extension

    with tempfile.TemporaryDirectory(dir=library.parent) as folder, _ninja_on_path():
        # A Python module would be imported from here, so ask for a plain library; _open_cpp imports it from its place.
        cpp_extension.load(
            NAME,
            [str(source) for source in sorted(source_folder().glob("*.cpp"))],
            build_directory=folder,
            extra_cflags=_cpp_flags(),
            extra_ldflags=["-fopenmp"] if sys.platform == "linux" else [],
            is_python_module=False,
            verbose=verbose,
        )
        os.replace(next(pathlib.Path(folder).glob(f"{NAME}*.so")), library)


def _open_cpp(library: pathlib.Path) -> Any:
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(library))
    spec = importlib.util.spec_from_file_location(NAME, library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


cpp = Library("C++", "plain torch, which is slower", _cpp_path, _compile_cpp, _open_cpp)


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
    sources = [str(source) for source in sorted(source_folder().glob("*.cu"))]
    return [nvcc(), *NVCC_FLAGS, *targets, *sources, "-o", str(library)]


def _cuda_path() -> pathlib.Path:
    return _keyed("libfastclip_cuda.so", (".cu", ".h"), *nvcc_command(pathlib.Path(), architectures()))


def _compile_cuda(library: pathlib.Path, verbose: bool) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = pathlib.Path(folder) / library.name
        command = nvcc_command(built, architectures())
        if verbose:
            print(" ".join(command), flush=True)
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(result.stdout + result.stderr)
        os.replace(built, library)


cuda = Library("CUDA", "the next best one", _cuda_path, _compile_cuda, lambda path: ctypes.CDLL(str(path)))


@contextlib.contextmanager
def _between_processes(path: pathlib.Path) -> Iterator[None]:
    """One process at a time. The system drops the lock of a process that dies, so a killed build blocks nobody."""
    with open(path, "w") as file:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """The ninja package's program is on the PATH only where its environment was activated."""
    path = os.environ.get("PATH", "")
    try:
        import ninja

        os.environ["PATH"] = os.pathsep.join((ninja.BIN_DIR, path))
    except ImportError:
        pass
    try:
        yield
    finally:
        os.environ["PATH"] = path


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line] or lines or [type(error).__name__]
    return telling[0].rstrip(".") + "."
