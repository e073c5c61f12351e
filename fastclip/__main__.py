"""python -m fastclip info | build | plot | run"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import backends, packers
from .backends.choice import checked
from .integrations import launch
from .native import libraries
from .version import __version__


def info() -> int:
    """Versions, devices, and each backend with the reason why it can or cannot run: what a bug report needs."""
    rows: list[tuple[str, Callable[[], Any]]] = [
        ("fastclip", lambda: f"{__version__} (distribution torch-fastclip)"),
        ("python", lambda: f"{platform.python_version()} on {platform.platform()}"),
        ("torch", lambda: f"{torch.__version__}, CUDA {torch.version.cuda}, HIP {torch.version.hip}"),
        ("triton", lambda: _version("triton")),
        ("compiler", _compiler),
        ("nvcc", _nvcc),
        ("csrc", libraries.source_folder),
        ("packer", _packer),
        ("built", _built),
        ("choice", lambda: f"{checked(backends.current(), 'FASTCLIP_BACKEND')} (FASTCLIP_BACKEND or use_backend)"),
    ]
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    rows += [(str(device), functools.partial(_gpu, device)) for device in gpus]
    others = [torch.device(name) for name in ("xpu", "mps") if getattr(torch, name).is_available()]
    devices = [torch.device("cpu"), *gpus, *others]
    for key, value in rows:
        print(f"{key:10} {_told(value)}")
    for device in devices:
        print(f"\non {device}, auto takes {_told(functools.partial(_automatic, device), 'none: ')}:")
        for name in backends.BACKENDS:
            print(f"  {name:10} {_told(functools.partial(_verdict, name, device), 'no:  ')}")
    return 0


def build(force: bool) -> int:
    """Compile csrc/ now, showing what the compilers say, instead of on first use; for CUDA too where there is a GPU, or
    TORCH_CUDA_ARCH_LIST names one."""
    asked = os.environ.get("FASTCLIP_PACKER") or ""
    try:
        module = libraries.cpp.build(verbose=True, force=force)
        print(f"{libraries.cpp.path()}\nCPU kernels: {module.isa()}")
        if asked in ("abi3", "python"):
            libraries.kernels.build(verbose=True, force=force)
        if asked == "abi3":
            libraries.abi3.build(verbose=True, force=force)
        if torch.cuda.is_available() or os.environ.get("TORCH_CUDA_ARCH_LIST"):
            libraries.cuda.build(verbose=True, force=force)
            print(f"{libraries.cuda.path()}\nCUDA kernels: sm_{', sm_'.join(libraries.architectures())}")
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


def _told(tell: Callable[[], Any], otherwise: str = "") -> Any:
    """What `tell` says, or what went wrong with it: the report is wanted most where something is odd."""
    try:
        return tell()
    except Exception as error:  # noqa: BLE001
        return f"{otherwise}{str(error) or type(error).__name__}"


def _compiler() -> str:
    command = libraries.cxx()
    return _lines([*command, "--version"])[0] if shutil.which(command[0]) else f"none found: {shlex.join(command)}"


def _nvcc() -> str:
    try:
        return f"{libraries.nvcc()}, {_lines([libraries.nvcc(), '--version'])[-1]}"
    except FileNotFoundError:
        return "none found"


def _packer() -> str:
    """The one that runs, and why no better one does."""
    chosen = packers.get()
    files = [libraries.cpp.file] if chosen.name == "compiled" else [libraries.abi3.file, libraries.kernels.file]
    where = ", ".join(str(file) for file in files if file) or "plain torch instead of kernels"
    reasons = []
    if chosen.name != "compiled" and (failure := libraries.cpp.failure()):
        reasons.append(f"compiled: {failure}")
    if chosen.name == "python" and packers.torch_library() is None:
        reasons.append("abi3: needs torch 2.14")
    elif chosen.name == "python":
        reasons.append("abi3: not in this installation")
    return f"{chosen.name} ({where})" + "".join(f"; not {reason}" for reason in reasons)


def _built() -> str:
    path = libraries.cpp.path()
    return f"{path} ({'there' if path.is_file() else 'not there'}; python -m fastclip build makes it)"


def _gpu(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"


def _automatic(device: torch.device) -> str:
    automatic = backends.AUTO.get(device.type, backends.ELSEWHERE)
    return next(name for name in automatic if backends.get(name).why_not(device) is None)


def _verdict(name: str, device: torch.device) -> str:
    backend = backends.get(name)
    reason = backend.why_not(device)
    return f"no:  {reason}" if reason else f"yes: {backend.describe()}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _lines(command: list[str]) -> list[str]:
    """What a command prints, line by line; at least one."""
    return subprocess.run(command, capture_output=True, text=True, errors="replace").stdout.splitlines() or [""]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastclip")
    commands = parser.add_subparsers(dest="verb", required=True)
    commands.add_parser("info", help=info.__doc__)
    builder = commands.add_parser("build", help=build.__doc__)
    builder.add_argument("--force", action="store_true", help="even if there is a build already")
    plotter = commands.add_parser("plot", help=plot.__doc__)
    plotter.add_argument("record", type=Path, help="the JSON lines of a fastclip.monitor.GradMonitor")
    plotter.add_argument("-o", "--out", type=Path, help=".png, .pdf or .svg; the record's name with .png unless told")
    launch.add_arguments(commands.add_parser("run", help=launch.run.__doc__))
    arguments = parser.parse_args(argv)
    if arguments.verb == "run":
        return launch.run(arguments)
    if arguments.verb == "plot":
        return plot(arguments.record, arguments.out)
    if arguments.verb == "build":
        return build(arguments.force)
    try:
        return info()
    except BrokenPipeError:  # whoever was reading has seen enough: `head`, a pager
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        return 0


if __name__ == "__main__":
    sys.exit(main())
