"""Where builds of csrc/ are kept, and what is kept beside each: its checksum, or why the last attempt failed.

A build is written to a folder of its own and then moved into place, so nobody sees half of one. One that does not have
its checksum (cut off by a full disk, say) is never opened: that would crash the process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator

REMEMBERED = 3600  # seconds that a failure counts


def path_of(name: str, key: str) -> pathlib.Path:
    """Where the library `name` with this key is, or is to be: in $FASTCLIP_CACHE, else in $XDG_CACHE_HOME/fastclip or
    ~/.cache/fastclip, or in a temporary folder of this user where neither can be written and no build is there yet."""
    if chosen := os.environ.get("FASTCLIP_CACHE"):
        return pathlib.Path(chosen) / key / name
    folder = _in_home()
    if folder is not None and (_can_be_written(folder) or checksum(folder / key / name)):
        return folder / key / name
    return temporary_folder() / key / name


def _in_home() -> pathlib.Path | None:
    """None where there is no home: no $HOME and no entry in the system's list of users, or "/"."""
    try:
        base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:
        return None
    return None if base == pathlib.Path("/.cache") else base / "fastclip"


def _can_be_written(folder: pathlib.Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def temporary_folder() -> pathlib.Path:
    """A folder that no other user can write to, since what lies there is executed.

    Raises:
        PermissionError: somebody else made it.
    """
    if not hasattr(os, "getuid"):  # Windows, where each user has a temporary folder
        return pathlib.Path(tempfile.gettempdir()) / "fastclip"
    user = os.getuid()
    folder = pathlib.Path(tempfile.gettempdir()) / f"fastclip-{user}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not (stat.S_ISDIR(found.st_mode) and found.st_uid == user and stat.S_IMODE(found.st_mode) & 0o077 == 0):
        raise PermissionError(
            f"{folder} is not a folder that only this user can use, so no build is kept there: remove it, or set "
            f"FASTCLIP_CACHE to another folder."
        )
    return folder


class Entry:
    """What the cache has at `path`: a library with its checksum, a failure, or nothing.

    Args:
        path: of the library.
        circumstances: what a failure depends on besides the sources, such as the compiler: it counts only in the same.
    """

    def __init__(self, path: pathlib.Path, circumstances: str) -> None:
        self.path = path
        self._circumstances = hashlib.sha256(circumstances.encode()).hexdigest()
        self._failure_file = path.with_name(path.name + ".failure")

    def put(self, make: Callable[[pathlib.Path], None]) -> None:
        """Put the library here that `make` writes to the path that it is given."""
        with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
            made = pathlib.Path(folder) / self.path.name
            make(made)
            beside = _checksum_file(made)
            beside.write_text(_digest(made) + "\n")
            os.replace(made, self.path)
            os.replace(beside, _checksum_file(self.path))
        self._failure_file.unlink(missing_ok=True)

    def failure(self) -> str | None:
        """Why the last attempt to build failed, if it would fail now."""
        try:
            found = json.loads(self._failure_file.read_text())
            recent = 0 <= time.time() - found["time"] < REMEMBERED
            return found["reason"] if recent and found["circumstances"] == self._circumstances else None
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None

    def remember_failure(self, reason: str) -> None:
        content = {"time": time.time(), "circumstances": self._circumstances, "reason": reason}
        with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
            written = pathlib.Path(folder) / self._failure_file.name
            written.write_text(json.dumps(content))
            os.replace(written, self._failure_file)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time. The system drops the lock of a process that dies, so a killed build blocks nobody."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.parent / "lock", "w") as file:
            if os.name == "posix":
                import fcntl

                with contextlib.suppress(OSError):  # a file system without locks: several may build, each as a whole
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield


def program(command: list[str]) -> str:
    """What runs as `command`, and when it was last changed."""
    path = os.path.realpath(shutil.which(command[0]) or command[0])
    try:
        return f"{command} {path} {os.stat(path).st_mtime_ns}"
    except OSError:
        return f"{command} is not there"


def checksum(library: pathlib.Path) -> str | None:
    """Of a library that is whole; None if it is not, or there is none."""
    try:
        found = _digest(library)
        return found if _checksum_file(library).read_text().strip() == found else None
    except (OSError, UnicodeDecodeError):
        return None


def _checksum_file(library: pathlib.Path) -> pathlib.Path:
    return library.with_name(library.name + ".sha256")


def _digest(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
