"""Builds are written as a whole, verified before they are opened, and not tried again and again."""

import os
import pwd
import stat
import tempfile
import time
import warnings
from pathlib import Path

import pytest

from fastclip.backends import build_cache, library, native

WHOLE = b"a library" * 100


class Rank:
    """A process, as far as a library is concerned: a `Library` of its own over a cache that others use, too."""

    def __init__(self, path, content=WHOLE, opens=True, setting="", during=None):
        self.compiled = self.opened = 0
        self.content, self.opens, self.during = content, opens, during
        self.library = library.Library("test", "nothing", lambda: path, self.compile, self.open, lambda: setting)

    def compile(self, path, verbose):
        self.compiled += 1
        path.write_bytes((self.content or WHOLE)[: 450 if self.content is None else None])
        if self.during:
            self.during()
        if self.content is None:
            raise RuntimeError("x.cpp:1: error: out of luck")

    def open(self, path):
        self.opened += 1
        if not self.opens:
            raise ImportError("undefined symbol: luck")
        return path.read_bytes()

    def load(self):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = self.library.load()
        assert [str(w.message).startswith("fastclip could not build its test backend") for w in caught] == (
            [] if found else [True]
        )
        return found


@pytest.fixture
def path(tmp_path):
    return tmp_path / "key" / "library.so"


def test_a_build_is_kept_for_the_next_process(path):
    first, second = Rank(path), Rank(path)
    assert first.load() == second.load() == WHOLE
    assert (first.compiled, second.compiled) == (1, 0)
    assert sorted(p.name for p in path.parent.iterdir()) == ["library.so", "library.so.sha256", "lock"]


BREAKAGES = {
    "cut off": lambda path: path.write_bytes(WHOLE[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "another byte": lambda path: path.write_bytes(b"b" + WHOLE[1:]),
    "no checksum": lambda path: path.with_name("library.so.sha256").unlink(),
    "a binary checksum": lambda path: path.with_name("library.so.sha256").write_bytes(b"\xff\xfe"),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_build_is_not_opened_but_built_again_once(path, breakage):
    Rank(path).load()
    BREAKAGES[breakage](path)
    second, third = Rank(path), Rank(path)
    assert second.load() == third.load() == WHOLE
    assert (second.compiled, second.opened) == (1, 1) and third.compiled == 0


def test_a_build_that_does_not_open_here_is_built_again(path):
    """As one from another machine with the same home."""
    Rank(path, b"built elsewhere").load()
    here = Rank(path)
    opens = here.open
    here.library._open_at = lambda p: opens(p) if p.read_bytes() == WHOLE else Rank(path, opens=False).open(p)
    assert here.load() == WHOLE and here.compiled == 1


def test_one_that_never_opens_is_built_once_and_no_more(path):
    ranks = [Rank(path, opens=False) for _ in range(3)]
    assert [rank.load() for rank in ranks] == [None] * 3
    assert [rank.compiled for rank in ranks] == [1, 0, 0]
    assert ranks[2].library.failure() == "undefined symbol: luck."


def test_half_a_build_is_never_seen(path):
    seen = []
    failing = Rank(path, None, during=lambda: seen.append(path.exists()))
    assert failing.load() is None
    assert seen == [False] and sorted(p.name for p in path.parent.iterdir()) == ["library.so.failure", "lock"]
    Rank(path).library.build()
    again = Rank(path, b"another", during=lambda: seen.append(path.read_bytes() == WHOLE))
    assert again.library.build(force=True) == b"another" and seen == [False, True]


def test_a_failure_is_not_tried_again_by_every_rank(path):
    ranks = [Rank(path, None) for _ in range(4)]
    assert [rank.load() for rank in ranks] == [None] * 4
    assert [rank.compiled for rank in ranks] == [1, 0, 0, 0]
    assert {rank.library.failure() for rank in ranks} == {"x.cpp:1: error: out of luck."}


def test_a_failure_counts_in_the_same_circumstances_only(path):
    Rank(path, None, setting="an old compiler").load()
    other = Rank(path, setting="a new compiler")
    assert other.load() == WHOLE and other.compiled == 1


def test_a_failure_expires(path, monkeypatch):
    Rank(path, None).load()
    now = time.time()
    for later, tries in ((build_cache.REMEMBERED - 60, 0), (build_cache.REMEMBERED + 60, 1), (-60, 1)):
        monkeypatch.setattr(time, "time", lambda at=now + later: at)
        rank = Rank(path, None)
        rank.load()
        assert rank.compiled == tries, later
        monkeypatch.undo()


def test_the_build_command_tries_anew_and_forgets_the_failure(path):
    Rank(path, None).load()
    command = Rank(path, None)
    with pytest.raises(RuntimeError, match="out of luck"):
        command.library.build()
    assert command.compiled == 1
    assert Rank(path).library.build() == WHOLE
    assert not path.with_name("library.so.failure").exists()


@pytest.mark.parametrize("record", [b"", b"[]", b"{}", b'{"time": "now"}', b"\xff", b"[" * 100_000])
def test_a_record_that_cannot_be_read_counts_for_nothing(path, record):
    path.parent.mkdir()
    path.with_name("library.so.failure").write_bytes(record)
    assert Rank(path).load() == WHOLE


def test_without_file_locks_it_is_built_all_the_same(path, monkeypatch):
    import fcntl

    def refuse(*_):
        raise OSError("No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert Rank(path).load() == WHOLE


def test_a_wrong_setting_is_no_failed_build(path):
    def check():
        raise ValueError("wrong")

    rank = Rank(path)
    rank.library._check = check
    for call in (rank.library.load, rank.library.load, rank.library.build):
        with pytest.raises(ValueError, match="wrong"):
            call()
    assert rank.compiled == 0 and rank.library.failure() is None


# ---- where it is kept ----


@pytest.fixture
def place(tmp_path, monkeypatch):
    """build_cache.path_of where nothing says where to keep things, and no user has a home."""

    def nobody(_):
        raise KeyError("uid not found")

    for name in ("FASTCLIP_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return lambda: build_cache.path_of("library.so", "key")


def temporary(tmp_path):
    return tmp_path / f"fastclip-{os.getuid()}"


@pytest.mark.parametrize("home", [None, "/", "/dev/null", "/proc/nowhere"])
def test_without_a_home_there_is_a_folder_of_this_user(place, tmp_path, monkeypatch, home):
    if home:
        monkeypatch.setenv("HOME", home)
    for _ in range(2):
        assert place() == temporary(tmp_path) / "key" / "library.so"
        assert stat.S_IMODE(temporary(tmp_path).stat().st_mode) == 0o700


def test_a_home_that_cannot_be_written_is_read(place, tmp_path, monkeypatch):
    """An image made by somebody else may have the build already."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    at_home = tmp_path / "home" / ".cache" / "fastclip" / "key" / "library.so"
    assert place() == at_home
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert place() == temporary(tmp_path) / "key" / "library.so"
    Rank(at_home).load()
    assert place() == at_home
    at_home.write_bytes(b"cut")
    assert place() == temporary(tmp_path) / "key" / "library.so"


@pytest.mark.parametrize("variable", ["FASTCLIP_CACHE", "XDG_CACHE_HOME"])
def test_a_folder_that_was_chosen_is_taken(place, tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, str(tmp_path / "mine"))
    between = [] if variable == "FASTCLIP_CACHE" else ["fastclip"]
    assert place() == tmp_path.joinpath("mine", *between, "key", "library.so")


def test_a_temporary_folder_of_somebody_else_is_refused(place, tmp_path, monkeypatch):
    folder = temporary(tmp_path)
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="is not a folder that only this user can use"):
        place()
    folder.rmdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    folder.symlink_to(elsewhere)
    with pytest.raises(PermissionError, match="remove it, or set FASTCLIP_CACHE"):
        place()
    folder.unlink()
    place()
    another = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: another)
    temporary(tmp_path).mkdir(mode=0o700)  # as this user, where another one's is wanted
    with pytest.raises(PermissionError, match="is not a folder"):
        place()


# ---- the compiler ----


@pytest.fixture
def script(tmp_path):
    """A program in a folder with a space in its name, that runs its arguments."""
    path = tmp_path / "my tools" / "ccache"
    path.parent.mkdir()
    path.write_text('#!/bin/sh\nexec "$@"\n')
    path.chmod(0o755)
    return path


def test_forms_of_cxx(monkeypatch, script):
    forms = {
        "": ["c++"],
        "g++": ["g++"],
        "g++ -m64": ["g++", "-m64"],
        "ccache  g++": ["ccache", "g++"],
        str(script): [str(script)],
        f"'{script}' g++ \"-DX=a b\"": [str(script), "g++", "-DX=a b"],
        '"g++': ['"g++'],
        " ": [" "],
    }
    for text, command in forms.items():
        monkeypatch.setenv("CXX", text)
        assert native.cxx() == command
    monkeypatch.delenv("CXX")
    default = native.cpp.path()
    monkeypatch.setenv("CXX", "c++ ")
    assert native.cpp.path() == default  # the same command, the same build
    monkeypatch.setenv("CXX", "c++ -m64")
    assert native.cpp.path() != default


@pytest.mark.parametrize("form", ["c++", "c++ -DLUCK=1", "'{}' c++ '-DLUCK=\"a b\"'"])
def test_torch_is_given_one_program(monkeypatch, tmp_path, script, form):
    """It takes $CXX for the name of a program, without arguments."""
    from torch.utils import cpp_extension

    source = tmp_path / "luck.cpp"
    source.write_text("#ifndef LUCK\n#define LUCK 0\n#endif\nconst auto luck = LUCK;\n")
    given = []

    def load(name, *_, build_directory, **__):
        given.append(os.environ["CXX"])
        assert cpp_extension.check_compiler_ok_for_platform(os.environ["CXX"])
        command = [os.environ["CXX"], "-c", str(source), "-o", f"{build_directory}/{name}.so"]
        native.subprocess.run(command, check=True)

    monkeypatch.setattr(cpp_extension, "load", load)
    text = form.format(script)
    monkeypatch.setenv("CXX", text)
    library = tmp_path / "build" / "library.so"
    library.parent.mkdir()
    native._compile_cpp(library, False)
    assert library.is_file() and Path(given[0]).is_absolute() and os.environ["CXX"] == text
