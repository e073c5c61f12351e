"""csrc/cuda/ compiled for the CPU: the same library, whose kernels run on host memory, thread by thread."""

import functools
import os
import subprocess
from pathlib import Path

from fastclip.native import cuda_interface, libraries
from fastclip.native.library import Library

FOLDER = Path(__file__).parent
THREADS = 64  # of a block: two warps, so that tests see several, and small enough to run as real threads
MOST_PARAMETERS = 400  # tensors whose table is in the parameters; emulating 2,700 takes a while
SECOND_PARAMETERS = 360  # tensors that fit in the second of three sizes
MOST_STEP_PARAMETERS = 80  # the same of an optimizer's step
COMMON_FLAGS = ["-std=c++20", "-pthread", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
FLAGS = [
    *COMMON_FLAGS,
    *(f"-DFASTCLIP_THREADS={THREADS}", f"-DFASTCLIP_MAX_TABLE={MOST_PARAMETERS}"),
    f"-DFASTCLIP_MEDIUM_TABLE={SECOND_PARAMETERS}",
    f"-DFASTCLIP_MAX_STEP_TABLE={MOST_STEP_PARAMETERS}",
]


def _path(flags=FLAGS):
    headers = b"".join(header.read_bytes() for header in sorted(FOLDER.glob("*.h")))
    return libraries._keyed("libfastclip_cuda_emulated.so", (".cu", ".h"), headers, *flags)


def _compile(path, verbose, flags=FLAGS):
    unfinished = path.with_suffix(".part")  # the other workers look for the whole file
    command = ["g++", *flags, f"-I{FOLDER}", "-O2", "-shared", "-fPIC", "-o", str(unfinished)]
    command += ["-x", "c++", *map(str, libraries.sources(".cu"))]
    subprocess.run(command, check=True, capture_output=not verbose, text=True)
    os.replace(unfinished, path)


def _library(flags):
    path, compile_ = functools.partial(_path, flags), functools.partial(_compile, flags=flags)
    return Library("emulated CUDA", "nothing", path, compile_, cuda_interface.open_library)


library = _library(FLAGS)
full_size = _library(COMMON_FLAGS)  # with the tables of a GPU's: for host time, with launches that run nothing
