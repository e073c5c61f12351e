"""What is published: wheels with compiled libraries, one without, and sources whose tests run.

The libraries are held to `native/check_cpu.cpp`: for this machine, for each of its instruction sets, and for 64-bit ARM
under an emulator where there is one.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from fastclip.native import libraries

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = {"darwin": "libfastclip_cpu.dylib", "win32": "fastclip_cpu.dll"}.get(sys.platform, "libfastclip_cpu.so")
PURE = {"wheel.cmake": "false", "wheel.py-api": "py3"}


def run(*command, cwd=ROOT, **environment):
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, "FASTCLIP_PACKER": "", **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build(kind, tree, folder, settings=None, **environment):
    """The file that the build backend makes of a tree: `kind` is wheel or sdist."""
    pytest.importorskip("scikit_build_core")
    pytest.importorskip("hatch_fancy_pypi_readme")
    program = f"import scikit_build_core.build as b; b.build_{kind}({str(folder)!r}, {settings or {}!r})"
    folder.mkdir(exist_ok=True)
    run(sys.executable, "-c", program, cwd=tree, **environment)
    (made,) = folder.iterdir()
    return made


def copy_of_the_tree(folder):
    """With what tests and builds leave behind, and with a module and a source that no list names."""
    left_behind = shutil.ignore_patterns("__pycache__", ".*_cache", ".hypothesis")
    for name in ("fastclip", "csrc", "cmake", "bench", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=left_behind)
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "constraints.txt", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    for name in ("fastclip/new/__init__.py", "csrc/new/deep/new.h", ".venv/bin/python", "build/x.o", "dist/x.whl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def names_in(wheel):
    with zipfile.ZipFile(wheel) as file:
        return set(file.namelist())


def installed(wheel, folder):
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


def assert_has_the_package(wheel, tree):
    """Every module and every source, and nothing from beside them."""
    names = names_in(wheel)
    for source in (path for path in (tree / "csrc").rglob("*") if path.is_file()):
        assert f"fastclip/csrc/{source.relative_to(tree / 'csrc').as_posix()}" in names
    for module in (tree / "fastclip").rglob("*.py"):
        assert module.relative_to(tree).as_posix() in names
    assert {"fastclip/py.typed", "fastclip/integrations/startup/sitecustomize.py", "fastclip/new/__init__.py"} <= names
    assert all(name.startswith(("fastclip/", "torch_fastclip-")) for name in names)


CLIP = """
import torch, fastclip
from fastclip.native import libraries
p = torch.nn.Parameter(torch.zeros(4)); p.grad = torch.ones(4)
print(fastclip.__file__, libraries.source_folder(), fastclip.clip_norm_([p], 1.0).item(), sep="\\n")"""


def assert_clips(site, tmp_path):
    """Without a compiler, from outside the repository."""
    environment = {"PYTHONPATH": str(site), "CXX": "/nowhere/c++", "FASTCLIP_CACHE": str(tmp_path / "cache")}
    file, sources, norm = run(sys.executable, "-c", CLIP, cwd=tmp_path, **environment).splitlines()
    assert Path(file).parent == site / "fastclip" and Path(sources) == site / "fastclip" / "csrc"
    assert float(norm) == 2


# ---- what the files say of each other ----


def pyproject():
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_links_of_the_readme_lead_somewhere_from_elsewhere():
    """The page on an index has no files beside it."""
    text = (ROOT / "README.md").read_text()
    for rule in pyproject()["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    assert_links_are_absolute(text)
    assert "](https://raw.githubusercontent.com/fastclip/fastclip/main/docs/demo.png)" in text
    assert "](https://github.com/fastclip/fastclip/blob/main/CONTRIBUTING.md)" in text
    assert "](#in-your-trainer)" in text


def assert_links_are_absolute(text):
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert len(links) > 30 and all(re.match(r"https://|#", link) for link in links), links
    own = re.compile(r"https://(?:github|raw.githubusercontent).com/fastclip/fastclip/(?:blob/)?main/([^#]*)")
    for path in filter(None, map(own.match, links)):
        assert (ROOT / path[1]).exists(), path[0]
    assert not re.search(r"""<(?:img|a)\b[^>]*(?:src|href)=["'](?!https:|#)""", text)


def test_the_flags_of_a_build_on_first_use_and_of_a_wheel_are_the_same():
    cmake = (ROOT / "CMakeLists.txt").read_text()
    assert " ".join(libraries.CFLAGS) in cmake
    assert " ".join(libraries.NVCC_FLAGS) in cmake


def test_the_constraints_name_what_the_extras_bring():
    """The pin of Triton would do nothing if no extra asked for it."""
    extras = pyproject()["project"]["optional-dependencies"]
    names = {re.match(r"[\w-]+", requirement)[0] for extra in extras.values() for requirement in extra}
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.M))
    assert pinned - names - {"torch", "spmd_types"} == set()


# ---- wheels ----


@pytest.mark.slow
def test_the_wheel_without_libraries(tmp_path):
    """For machines that no other wheel is for."""
    tree = copy_of_the_tree(tmp_path / "tree")
    wheel = build("wheel", tree, tmp_path / "dist", PURE)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert_has_the_package(wheel, tree)
    assert not any(name.startswith("fastclip/lib/") for name in names_in(wheel))
    with zipfile.ZipFile(wheel) as file:
        (metadata,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        assert_links_are_absolute(file.read(metadata).decode())
    assert_clips(installed(wheel, tmp_path / "site"), tmp_path)


@pytest.mark.slow
def test_without_a_compiler_the_sources_install_as_the_wheel_without_libraries(tmp_path):
    """Except where a release is built."""
    wheel = build("wheel", copy_of_the_tree(tmp_path / "tree"), tmp_path / "dist", CXX="/nowhere/c++")
    assert wheel.name.endswith("-py3-none-any.whl")
    with pytest.raises(AssertionError, match="CMake configuration failed"):
        build("wheel", tmp_path / "tree", tmp_path / "no", CXX="/nowhere/c++", FASTCLIP_MUST_COMPILE="1")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if shutil.which("cmake") is None:
        pytest.importorskip("cmake")
    folder = tmp_path_factory.mktemp("wheel")
    settings = {"cmake.define.FASTCLIP_CUDA": "OFF"}
    return build("wheel", copy_of_the_tree(folder / "tree"), folder / "dist", settings, FASTCLIP_MUST_COMPILE="1")


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    return installed(wheel, tmp_path_factory.mktemp("site"))


@pytest.mark.long
@pytest.mark.slow
def test_the_wheel_of_this_machine(wheel, site, tmp_path):
    assert "-cp310-abi3-" in wheel.name
    assert_has_the_package(wheel, wheel.parent.parent / "tree")
    assert f"fastclip/lib/{LIBRARY}" in names_in(wheel)
    packer = any((ROOT / "csrc").glob("abi3/*.cpp"))
    assert packer == any(name.startswith("fastclip/lib/packer.") for name in names_in(wheel))
    # In a process of its own, which has neither torch nor fastclip.
    program = f"""
import ctypes, json, sys
library = ctypes.CDLL({str(site / "fastclip" / "lib" / LIBRARY)!r})
library.fastclip_cpu_isa.restype = ctypes.c_char_p
print(json.dumps([library.fastclip_cpu_isa().decode(), "torch" in sys.modules]))"""
    isa, torch_is_there = json.loads(run(sys.executable, "-c", program, FASTCLIP_CPU_ISA=""))
    assert isa in ("portable", "neon", "avx2", "avx512") and not torch_is_there
    assert_clips(site, tmp_path)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_libraries_need_nothing_of_the_machine_that_built_them(site):
    """Nothing but the C library, as systems from 2018 on have it; and nothing but the interface goes out."""
    library = site / "fastclip" / "lib" / "libfastclip_cpu.so"
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-dW", library))
    assert set(needed) <= {"libm.so.6", "libc.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    symbols = run("readelf", "--dyn-syms", "-W", library)
    versions = {tuple(map(int, version.split("."))) for version in re.findall(r"@GLIBC_([\d.]+)", symbols)}
    assert max(versions) <= (2, 28), max(versions)
    exported = [line.split()[-1] for line in symbols.splitlines() if " GLOBAL " in line and " UND " not in line]
    header = (ROOT / "csrc" / "cpu" / "launch.h").read_text()
    assert sorted(exported) == sorted(re.findall(r"^FASTCLIP_API [\w *]*?(\w+)\(", header, re.M))
    assert library.stat().st_size < 2_000_000
    for module in (site / "fastclip" / "lib").glob("packer.*"):
        needed = re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-dW", module))
        assert not any(re.match(r"libgomp|libpython|libtorch|libc10", name) for name in needed), needed


# ---- the launchers by themselves ----

CHECK = ROOT / "tests" / "native" / "check_cpu.cpp"
ISAS = ("portable", "avx2", "avx512")


def isa_of(output):
    """The instruction set that a check of all dtypes reports."""
    found = re.findall(r"^(\w+) on (\w+): (\d+) checks, 0 failed$", output, re.M)
    assert [dtype for dtype, *_ in found] == ["float32", "float64", "bfloat16", "float16"], output
    assert all(int(checks) > 1_000_000 for *_, checks in found)
    return {isa for _, isa, _ in found}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None or sys.platform == "win32", reason="needs c++")
def test_the_library_computes_what_its_header_says(site, tmp_path):
    folder = site / "fastclip" / "lib"
    program = tmp_path / "check"
    options = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-pthread")
    run("c++", *options, CHECK, folder / LIBRARY, f"-Wl,-rpath,{folder}", "-o", program)
    (best,) = isa_of(run(program, FASTCLIP_CPU_ISA=""))
    for isa in ISAS if best in ISAS[1:] else ():
        assert isa_of(run(program, FASTCLIP_CPU_ISA=isa)) == {min(isa, best, key=ISAS.index)}


ARM = "aarch64-linux-gnu-g++"


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(shutil.which(ARM) is None, reason=f"needs {ARM} (Debian: g++-aarch64-linux-gnu)")
@pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="needs qemu-aarch64 (Debian: qemu-user)")
def test_on_64_bit_arm(tmp_path):
    program = tmp_path / "check"
    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    run(ARM, "-std=c++17", *libraries.CFLAGS, "-static", "-pthread", CHECK, *sources, "-o", program)
    assert isa_of(run("qemu-aarch64", program)) == {"neon"}


# ---- sources ----


@pytest.mark.long
@pytest.mark.slow
def test_the_tests_run_from_the_published_sources(tmp_path):
    archive = build("sdist", ROOT, tmp_path / "dist")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path)
    folder = tmp_path / archive.name.removesuffix(".tar.gz")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert not [name for name in names if re.search(r"__pycache__|^\.venv|^build/|^dist/|\.so$|\.git/", name)]
    assert {"Makefile", "constraints.txt", "CMakeLists.txt", "cmake/old_glibc.h", ".ci/run", "docs/demo.png"} <= names
    quick = ("tests/test_house.py", "tests/test_csrc.py")
    options = ("-q", "-x", "-m", "not slow and not long", "-p", "no:cacheprovider")
    run(sys.executable, "-m", "pytest", *options, *quick, cwd=folder)
