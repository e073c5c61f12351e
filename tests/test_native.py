"""Building and loading csrc/, and living without it."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastclip.native import libraries

ROOT = Path(__file__).resolve().parent.parent
CLIP = "import torch, fastclip; p = torch.nn.Parameter(torch.zeros(4)); p.grad = torch.ones(4); {}"


def run(*command, **environment):
    return subprocess.run(
        command, env={**os.environ, "FASTCLIP_PACKER": "", **environment}, cwd=ROOT, capture_output=True, text=True
    )


def test_without_a_compiler_it_works_and_warns_once(tmp_path):
    program = CLIP.format("[fastclip.clip_norm_([p], 1.0) for _ in range(3)]; print(p.grad.tolist())")
    result = run(sys.executable, "-c", program, CXX="/nowhere/c++", FASTCLIP_CACHE=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("[0.49")
    assert result.stderr.count("fastclip has no kernels for the CPU here and works by plain torch") == 1
    assert "there is no C++ compiler: '/nowhere/c++' is not on the PATH" in result.stderr
    assert "compiling" not in result.stderr and not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.slow
def test_where_the_packer_does_not_compile_the_kernels_may(tmp_path):
    """As without Python's headers. `info` says why; the clip itself does without a warning."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\ncase $1 in -MMD) echo 'x.cpp:1: error: out of luck' >&2; exit 1;; esac\nexec c++ \"$@\"\n"
    )
    compiler.chmod(0o755)
    program = CLIP.format("print(fastclip.clip_norm_([p], 1.0).item())")
    environment = {"CXX": str(compiler), "FASTCLIP_CACHE": str(tmp_path / "cache")}
    result = run(sys.executable, "-W", "error", "-c", program, **environment)
    assert result.returncode == 0 and result.stdout == "2.0\n", result.stderr
    assert result.stderr.count("compiling") == 2  # and of other ranks none: the failure is remembered
    assert not run(sys.executable, "-W", "error", "-c", program, **environment).stderr
    info = run(sys.executable, "-m", "fastclip", "info", **environment).stdout
    assert "not compiled: x.cpp:1: error: out of luck." in info and "on cpu, auto takes cpu" in info


def test_a_backend_asked_for_that_cannot_run_says_why(tmp_path):
    program = CLIP.format("fastclip.use_backend('cpu'); fastclip.clip_norm_([p], 1.0)")
    result = run(sys.executable, "-c", program, CXX="/nowhere/c++", FASTCLIP_CACHE=str(tmp_path))
    assert result.returncode != 0
    assert "RuntimeError: backend 'cpu' was asked for but cannot run on cpu: there is no C++ compiler" in result.stderr


def test_import_alone_neither_builds_nor_warns(tmp_path):
    result = run(
        sys.executable, "-W", "error", "-c", "import fastclip", CXX="/nowhere/c++", FASTCLIP_CACHE=str(tmp_path)
    )
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.slow
def test_eight_processes_at_once(tmp_path):
    """One builds, seven wait; and the lock of a build that was killed holds nobody up."""
    folder = tmp_path / libraries.cpp.path().parent.name
    folder.mkdir()
    (folder / "lock").write_text("left behind")
    program = CLIP.format("print(fastclip.clip_norm_([p], 1.0).item())")
    environment = {**os.environ, "FASTCLIP_CACHE": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", program], env=environment, cwd=ROOT, text=True, **pipes)
        for _ in range(8)
    ]
    results = [process.communicate(timeout=300) for process in processes]
    assert [out for out, _ in results] == ["2.0\n"] * 8, results
    assert sum("compiling its C++ backend" in err for _, err in results) == 1
    assert len(list(tmp_path.glob("*/*.so"))) == 1


def test_build_command_finds_the_build(tmp_path):
    result = run(sys.executable, "-m", "fastclip", "build")
    assert result.returncode == 0, result.stderr
    path, kernels, cuda = result.stdout.splitlines()[:3]
    assert Path(path).is_file() and kernels.startswith("CPU kernels: ")
    assert torch.cuda.is_available() or cuda.startswith("CUDA kernels: not built, there is no GPU")


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, CUDA's compiler")


@pytest.mark.long
@needs_nvcc
@pytest.mark.slow
def test_build_command_for_a_gpu_that_is_elsewhere(tmp_path):
    environment = {"TORCH_CUDA_ARCH_LIST": "9.0", "FASTCLIP_CACHE": str(tmp_path)}
    shutil.copytree(libraries.cpp.path().parent, tmp_path / libraries.cpp.path().parent.name)
    result = run(sys.executable, "-m", "fastclip", "build", **environment)
    assert result.returncode == 0, result.stderr
    *_, path, kernels = result.stdout.splitlines()
    assert kernels == "CUDA kernels: sm_90"
    library = ctypes.CDLL(path)  # opens without a GPU, and without torch
    assert library.fastclip_cuda_max_table() == 2700


def test_build_command_with_a_wrong_architecture(tmp_path):
    result = run(sys.executable, "-m", "fastclip", "build", TORCH_CUDA_ARCH_LIST="Hopper")
    assert result.returncode == 1
    assert "TORCH_CUDA_ARCH_LIST must list architectures such as 9.0, got ['Hopper'] in 'Hopper'" in result.stderr


def test_build_command_without_nvcc(tmp_path):
    """The reason stands in `info`, too, and in the error when the backend is asked for by name."""
    environment = {"TORCH_CUDA_ARCH_LIST": "9.0", "CUDA_HOME": str(tmp_path), "PATH": _path_without_nvcc(tmp_path)}
    result = run(sys.executable, "-m", "fastclip", "build", **environment)
    assert result.returncode == 1
    assert "there is no CUDA compiler: nvcc is neither in $CUDA_HOME/bin nor on the PATH" in result.stderr


def _path_without_nvcc(folder):
    """A PATH with what a C++ build needs and nothing else."""
    tools = folder / "tools"
    tools.mkdir()
    for tool in ("c++", "g++", "gcc", "as", "ld", "which", "uname", "ninja"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    return str(tools)


def test_build_command_without_a_compiler(tmp_path):
    result = run(sys.executable, "-m", "fastclip", "build", CXX="/nowhere/c++", FASTCLIP_CACHE=str(tmp_path))
    assert result.returncode == 1 and "there is no C++ compiler" in result.stderr


def test_info_stops_when_nobody_reads_on():
    command = [sys.executable, "-u", "-m", "fastclip", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("fastclip")
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_info_command():
    result = run(sys.executable, "-m", "fastclip", "info")
    assert result.returncode == 0, result.stderr
    for word in (
        "fastclip",
        "python",
        "torch",
        "triton",
        "compiler",
        "nvcc",
        "csrc",
        "packer",
        "built",
        "on cpu, auto takes cpu",
    ):
        assert word in result.stdout
    for name in ("triton", "cuda", "cpu", "foreach", "reference"):
        assert f"\n  {name:10} yes: " in result.stdout or f"\n  {name:10} no:  " in result.stdout


def test_info_says_why_a_backend_cannot_run(tmp_path):
    environment = {"CXX": "/nowhere/c++", "FASTCLIP_CACHE": str(tmp_path), "TRITON_INTERPRET": "0"}
    result = run(sys.executable, "-m", "fastclip", "info", **environment)
    assert "on cpu, auto takes foreach" in result.stdout
    assert "cpu        no:  there is no C++ compiler" in result.stdout
    assert "triton     no:  its kernels run on GPUs, not on cpu" in result.stdout
    assert "cuda       no:  it runs on NVIDIA GPUs, not on cpu" in result.stdout


def test_environment_variable_chooses(tmp_path):
    result = run(sys.executable, "-c", CLIP.format("fastclip.clip_norm_([p], 1.0)"), FASTCLIP_BACKEND="cuda9")
    assert "ValueError: FASTCLIP_BACKEND must be one of" in result.stderr and "got 'cuda9'" in result.stderr
    program = "import fastclip.backends as b; print(b.current())"
    assert run(sys.executable, "-c", program, FASTCLIP_BACKEND="reference").stdout == "reference\n"
    assert run(sys.executable, "-c", program, FASTCLIP_BACKEND="").stdout == "auto\n"


def test_an_unknown_instruction_set_is_an_error():
    """With and without a compiler, every time, and before anything is written."""
    program = CLIP.format(
        """
for call in (lambda: fastclip.clip_norm_([p], 1.0), lambda: fastclip.Clipper([p], 1.0).clip_()) * 2:
    try:
        call()
    except ValueError as error:
        print(error, p.grad.sum().item())"""
    )
    for environment in ({}, {"CXX": "/nowhere/c++"}):
        result = run(sys.executable, "-W", "error", "-c", program, FASTCLIP_CPU_ISA="avx3", **environment)
        assert result.stdout == "FASTCLIP_CPU_ISA must be one of portable, neon, avx2, avx512, got 'avx3' 4.0\n" * 4, (
            result
        )
    program = "from fastclip.native import libraries; print(libraries.cpp.load().isa())"
    assert run(sys.executable, "-c", program, FASTCLIP_CPU_ISA="").stdout == f"{_best_isa()}\n"


def _best_isa():
    program = "from fastclip.native import libraries; print(libraries.cpp.load().isa())"
    environment = {name: value for name, value in os.environ.items() if name != "FASTCLIP_CPU_ISA"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip()


def test_a_build_that_was_cut_off_does_not_crash(tmp_path):
    """It is not even opened; and as there is no compiler to build it again, plain torch clips."""
    environment = {"CXX": "/nowhere/c++", "FASTCLIP_CACHE": str(tmp_path)}
    program = "from fastclip.native import libraries; print(libraries.cpp.path())"
    broken = Path(run(sys.executable, "-c", program, **environment).stdout.strip())
    broken.parent.mkdir()
    broken.write_bytes(libraries.cpp.path().read_bytes()[:100_000])
    shutil.copy(f"{libraries.cpp.path()}.sha256", f"{broken}.sha256")
    result = run(sys.executable, "-c", CLIP.format("print(fastclip.clip_norm_([p], 1.0).item())"), **environment)
    assert (result.returncode, result.stdout) == (0, "2.0\n"), result.stderr
    assert "there is no C++ compiler" in result.stderr


def test_info_and_build_never_end_in_a_traceback(tmp_path):
    """Whatever is odd, it is told."""
    program = tmp_path / "g++"
    program.write_bytes(b"\x7fELF and no more")
    program.chmod(0o755)
    odd = {
        "FASTCLIP_BACKEND": "cuda9",
        "FASTCLIP_CACHE": "/dev/null/cache",
        "CXX": str(program),
        "TORCH_CUDA_ARCH_LIST": "Hopper",
    }
    for setting, message in (({}, "Not a directory: '/dev/null/cache"), ({"FASTCLIP_CPU_ISA": "avx3"}, "got 'avx3'")):
        info = run(sys.executable, "-m", "fastclip", "info", **odd, **setting)
        assert info.returncode == 0 and "Traceback" not in info.stderr, info.stderr
        assert "Exec format error" in info.stdout and "got 'cuda9'" in info.stdout and message in info.stdout
        build = run(sys.executable, "-m", "fastclip", "build", **odd, **setting)
        assert build.returncode == 1 and "Traceback" not in build.stderr and message in build.stderr


def test_info_without_a_home(tmp_path):
    """In a container whose user has no entry in the system's list: the cache is a temporary folder of this user."""
    program = """
import pwd, runpy, sys
def nobody(_): raise KeyError("uid not found")
pwd.getpwuid = nobody
sys.argv[1:] = ["info"]
runpy.run_module("fastclip", run_name="__main__")
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME", "FASTCLIP_CACHE")}
    environment |= {"TMPDIR": str(tmp_path), "CXX": "/nowhere/c++"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"built      {tmp_path}/fastclip-{os.getuid()}/" in result.stdout
    assert "compiler   none found: /nowhere/c++" in result.stdout
