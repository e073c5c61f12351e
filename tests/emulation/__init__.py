"""csrc/cuda/ compiled for the CPU: the same library, whose kernels run on host memory, thread by thread."""

import os
import subprocess
from pathlib import Path

from fastclip.backends import cuda_interface, native
from fastclip.backends.library import Library

FOLDER = Path(__file__).parent
THREADS = 64  # of a block: two warps, so that tests see several, and small enough to run as real threads
MOST_PARAMETERS = 400  # tensors whose table is in the parameters; emulating 2,700 takes a while
MOST_STEP_PARAMETERS = 80  # the same of an optimizer's step
FLAGS = [
    *("-std=c++20", "-pthread", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    *(f"-DFASTCLIP_THREADS={THREADS}", f"-DFASTCLIP_MAX_TABLE={MOST_PARAMETERS}"),
    f"-DFASTCLIP_MAX_STEP_TABLE={MOST_STEP_PARAMETERS}",
]


def _path():
    headers = b"".join(header.read_bytes() for header in sorted(FOLDER.glob("*.h")))
    return native._keyed("libfastclip_cuda_emulated.so", (".cu", ".h"), headers, *FLAGS)


def _compile(path, verbose):
    unfinished = path.with_suffix(".part")  # the other workers look for the whole file
    command = ["g++", *FLAGS, f"-I{FOLDER}", "-O2", "-shared", "-fPIC", "-o", str(unfinished)]
    command += ["-x", "c++", *map(str, native.sources(".cu"))]
    subprocess.run(command, check=True, capture_output=not verbose, text=True)
    os.replace(unfinished, path)


library = Library("emulated CUDA", "nothing", _path, _compile, cuda_interface.open_library)
