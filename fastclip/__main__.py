"""python -m fastclip info | build | plot"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from . import __version__, backends
from .backends import native


def info() -> int:
    """Versions, devices, and each backend with the reason why it can or cannot run: what a bug report needs."""
    native.cpp.load()
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    rows = [
        ("fastclip", __version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda}, HIP {torch.version.hip}"),
        ("triton", _version("triton")),
        ("compiler", _lines([compiler, "--version"])[0] if compiler else "none found"),
        ("nvcc", _nvcc()),
        ("csrc", str(native.source_folder())),
        ("build", f"{native.cpp.path()} ({'there' if native.cpp.path().is_file() else 'could not be built'})"),
        ("choice", f"{backends.current()} (FASTCLIP_BACKEND or use_backend)"),
    ]
    devices = [torch.device("cpu")]
    for i in range(torch.cuda.device_count()):
        devices.append(torch.device("cuda", i))
        properties = torch.cuda.get_device_properties(i)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        rows.append((f"cuda:{i}", f"{properties.name}, {memory}, sm_{properties.major}{properties.minor}"))
    for key, value in rows:
        print(f"{key:10} {value}")
    for device in devices:
        automatic = backends.AUTO.get(device.type, ("reference",))
        runs = [name for name in automatic if backends.get(name).why_not(device) is None]
        print(f"\non {device}, auto takes {runs[0]}:")
        for name in backends.BACKENDS:
            backend = backends.get(name)
            reason = backend.why_not(device)
            print(f"  {name:10} {'no:  ' + reason if reason else 'yes: ' + backend.describe()}")
    return 0


def build(force: bool) -> int:
    """Compile csrc/ now, showing what the compilers say, instead of on first use; for CUDA too where there is a GPU, or
    TORCH_CUDA_ARCH_LIST names one."""
    try:
        module = native.cpp.build(verbose=True, force=force)
        print(f"{native.cpp.path()}\nCPU kernels: {module.isa()}")
        if torch.cuda.is_available() or os.environ.get("TORCH_CUDA_ARCH_LIST"):
            native.cuda.build(verbose=True, force=force)
            print(f"{native.cuda.path()}\nCUDA kernels: sm_{', sm_'.join(native.architectures())}")
        else:
            print("CUDA kernels: not built, there is no GPU to compile for; TORCH_CUDA_ARCH_LIST can name one")
    except Exception as error:  # noqa: BLE001 - a command reports what went wrong and fails
        print(error, file=sys.stderr)
        return 1
    return 0


def plot(record: Path, out: Path | None) -> int:
    """Draw the run that a GradMonitor wrote, also one that crashed or is still running."""
    from .monitor import load
    from .monitor.plot import draw

    try:
        out = out or record.with_suffix(".png")
        if out.exists() and record.exists() and out.samefile(record):
            raise ValueError(f"{out} is the record itself: name the picture with -o")
        draw(load(record), out, title=record.name)
    except (OSError, ValueError, ImportError) as error:
        print(*str(error).split(), file=sys.stderr)  # in one line
        return 1
    print(f"Picture: {out}")
    return 0


def _nvcc() -> str:
    try:
        return f"{native.nvcc()}, {_lines([native.nvcc(), '--version'])[-1]}"
    except FileNotFoundError:
        return "none found"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _lines(command: list[str]) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True).stdout.splitlines() or [""]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastclip")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help=info.__doc__)
    builder = commands.add_parser("build", help=build.__doc__)
    builder.add_argument("--force", action="store_true", help="even if there is a build already")
    plotter = commands.add_parser("plot", help=plot.__doc__)
    plotter.add_argument("record", type=Path, help="the JSON lines of a fastclip.monitor.GradMonitor")
    plotter.add_argument("-o", "--out", type=Path, help=".png, .pdf or .svg; the record's name with .png unless told")
    arguments = parser.parse_args(argv)
    if arguments.command == "plot":
        return plot(arguments.record, arguments.out)
    return info() if arguments.command == "info" else build(arguments.force)


if __name__ == "__main__":
    sys.exit(main())
