"""Loads csrc/: compiled on first use, kept in a cache folder, shared by all processes of a user."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.machinery
import importlib.util
import os
import pathlib
import platform
import shutil
import sys
import sysconfig
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

NAME = "fastclip_native"
CFLAGS = ["-O3", "-ffp-contract=fast", "-Wno-psabi"]

_lock = threading.Lock()
_module: Any = None
_failure: str | None = None


def load() -> Any:
    """The compiled module, built if need be; None if that failed (:func:`failure` says why, a warning said so once)."""
    global _module, _failure
    if _module is not None or _failure is not None:
        return _module
    with _lock:
        if _module is None and _failure is None:
            try:
                _module = build()
            except Exception as error:  # noqa: BLE001 - whatever a compiler or a linker does, training goes on
                _failure = _reason(error)
                warnings.warn(
                    f"fastclip could not build its C++ backend and falls back to plain torch, which is slower: "
                    f"{_failure} `python -m fastclip build` shows the whole story.",
                    RuntimeWarning,
                    stacklevel=4,
                )
    return _module


def failure() -> str | None:
    """Why :func:`load` returned None, in one sentence."""
    return _failure


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


def library_path() -> pathlib.Path:
    """The file a build for this Python, this torch and these sources has."""
    key = hashlib.sha256()
    for part in (torch.__version__, sys.implementation.cache_tag, platform.machine(), os.environ.get("CXX"), *_flags()):
        key.update(f"{part}\n".encode())
    for source in sorted(source_folder().iterdir()):
        key.update(source.name.encode() + source.read_bytes())
    return cache_folder() / key.hexdigest()[:16] / (NAME + sysconfig.get_config_var("EXT_SUFFIX"))


def build(verbose: bool = False, force: bool = False) -> ModuleType:
    """Compile csrc/ unless the cache has it, and import it. Raises what the compiler or the linker raised."""
    library = library_path()
    if not library.is_file() or force:
        library.parent.mkdir(parents=True, exist_ok=True)
        with _between_processes(library.parent / "lock"):
            if not library.is_file() or force:
                _compile(library, verbose)
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(library))
    spec = importlib.util.spec_from_file_location(NAME, library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _flags() -> list[str]:
    # torch's own threads are OpenMP's on Linux; elsewhere at::parallel_for falls back to one thread.
    return [*CFLAGS, "-fopenmp"] if sys.platform == "linux" else CFLAGS


def _compile(library: pathlib.Path, verbose: bool) -> None:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise FileNotFoundError(f"there is no C++ compiler: {compiler!r} is not on the PATH.")
    print("fastclip: compiling its C++ backend (once for this torch; some 20 seconds) ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    from torch.utils import cpp_extension

    with tempfile.TemporaryDirectory(dir=library.parent) as folder, _ninja_on_path():
        # A Python module would be imported from here, so ask for a plain library; build() imports it from its place.
        cpp_extension.load(
            NAME,
            [str(source) for source in sorted(source_folder().glob("*.cpp"))],
            build_directory=folder,
            extra_cflags=_flags(),
            extra_ldflags=["-fopenmp"] if sys.platform == "linux" else [],
            is_python_module=False,
            verbose=verbose,
        )
        os.replace(next(pathlib.Path(folder).glob(f"{NAME}*.so")), library)
    print(f"fastclip: compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


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
