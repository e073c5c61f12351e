"""A library of csrc/: from the cache of builds, from the wheel, or built now."""

from __future__ import annotations

import ctypes
import pathlib
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from . import build_cache

PREBUILT = pathlib.Path(__file__).resolve().parent.parent / "lib"  # what a wheel brings; see CMakeLists.txt

Opened = TypeVar("Opened")


class Library(Generic[Opened]):
    """One library of csrc/: built if the cache does not have it, opened, and from then on at hand.

    Args:
        name: in messages.
        instead: what happens without it, in messages.
        path: -> the file that a build of the present sources for this machine has.
        compile_to: (path, verbose) -> None, or raises what the compiler raised. Nothing else is in the path's folder.
        open_at: (path) -> the library.
        circumstances: -> a text that changes where a build that failed may succeed: which compiler, where it looks.
        check: raises ValueError for a setting that is wrong, whether or not there is a compiler.
        prebuilt: the name of the file that a wheel has instead.
        needs: raises FileNotFoundError where there is no compiler.
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
        prebuilt: str | None = None,
        needs: Callable[[], object] = lambda: None,
    ) -> None:
        self.name, self.path = name, path
        self._instead, self._compile_to, self._open_at = instead, compile_to, open_at
        self._circumstances, self._check, self._needs = circumstances, check, needs
        self._prebuilt = None if prebuilt is None else PREBUILT / prebuilt
        self._lock = threading.Lock()
        self.opened: Opened | None = None  # as the last load() left it
        self.file: pathlib.Path | None = None  # of what is opened
        self._failure: str | None = None

    def load(self, warn: bool = True) -> Opened | None:
        """The library: from the cache, else from the wheel, else built now. None if that failed; `failure` says why.
        `warn`: whether a failure gives a RuntimeWarning, once."""
        if self.opened is not None or self._failure is not None:
            return self.opened
        with self._lock:
            if self.opened is None and self._failure is None:
                self._check()
                try:
                    if self.load_built() is None and self.load_prebuilt() is None:
                        self._opens(self._build())
                except Exception as error:  # noqa: BLE001 - whatever a compiler or a linker does, training goes on
                    self._failure = _reason(error)
                    if warn:
                        warnings.warn(
                            f"fastclip could not build its {self.name} backend and falls back to {self._instead}: "
                            f"{self._failure} `python -m fastclip build` tries again and shows the whole story.",
                            RuntimeWarning,
                            stacklevel=4,
                        )
        return self.opened

    def load_built(self) -> Opened | None:
        """The library if the cache has it; None, and no failure, if not."""
        try:
            path = self.path()
            return self._opens((self._open_at(path), path)) if build_cache.checksum(path) else None
        except Exception:  # noqa: BLE001 - without a compiler there may be no path; or it is of another machine
            return None

    def load_prebuilt(self) -> Opened | None:
        """The library that came with the wheel; None, and no failure, if none did, or it does not open here."""
        if self._prebuilt is None or not self._prebuilt.is_file():
            return None
        try:
            return self._opens((self._open_at(self._prebuilt), self._prebuilt))
        except (ImportError, OSError, AttributeError):
            return None

    def is_prebuilt(self) -> bool:
        """Whether what is opened came with the wheel."""
        return self.file is not None and self.file == self._prebuilt

    def _opens(self, opened_at: tuple[Opened, pathlib.Path]) -> Opened:
        self.opened, self.file = opened_at
        return self.opened

    def get(self) -> Opened:
        """The library, where it can be had: whoever asks knows that from :meth:`load`, or is told why not."""
        library = self.opened if self.opened is not None else self.load(warn=False)
        if library is None:
            raise RuntimeError(f"the {self.name} backend could not be built: {self._failure}")
        return library

    def failure(self) -> str | None:
        """Why :meth:`load` returned None, in one sentence."""
        return self._failure

    def build(self, verbose: bool = False, force: bool = False) -> Opened:
        """Compile the library unless the cache has it, and open it. Raises what the compiler or the linker raised."""
        self._check()
        return self._build(verbose, force, retry=True)[0]

    def _build(self, verbose: bool = False, force: bool = False, retry: bool = False) -> tuple[Opened, pathlib.Path]:
        """`retry`: also if another process has failed a short while ago, and would again."""
        entry = build_cache.Entry(self.path(), self._circumstances())
        unusable = None if force else build_cache.checksum(entry.path)
        if unusable is not None:
            try:
                return self._open_at(entry.path), entry.path
            except (ImportError, OSError):
                pass  # whole, but built on a machine with other system libraries, say
        self._needs()
        with entry.locked():
            if not retry and (reason := entry.failure()):
                raise RuntimeError(reason)
            try:
                if force or build_cache.checksum(entry.path) in (None, unusable):
                    print(f"fastclip: compiling its {self.name} backend (once) ...", file=sys.stderr, flush=True)
                    start = time.perf_counter()
                    entry.put(lambda path: self._compile_to(path, verbose))
                    print(f"fastclip: compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
                return self._open_at(entry.path), entry.path
            except Exception as error:
                entry.remember_failure(_reason(error))
                raise


def declared(path: pathlib.Path, functions: dict[str, tuple[Any, tuple[Any, ...]]]) -> ctypes.CDLL:
    """The C library at `path`; `functions`: name -> its result and arguments."""
    library = ctypes.CDLL(str(path))
    for name, (result, arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line] or lines or [type(error).__name__]
    return telling[0].rstrip(".") + "."
