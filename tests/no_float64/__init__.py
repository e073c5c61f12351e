"""A device without float64, like Apple's MPS, to run tests on where there is no such machine. See device.cpp.

:func:`register` names it for the whole process, for good: tests that use it run in a process of their own.
"""

import hashlib
import os
import tempfile
import types
from pathlib import Path

import torch
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("device.cpp")
CACHE = Path(__file__).parents[2] / "build" / "no_float64"
NAME = "mpslike"


def load():
    """Load the library, compiled once for each torch and each state of the source. It takes a quarter of a minute."""
    state = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = CACHE / f"{state}.so"
    if library.exists():
        torch.ops.load_library(library)
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:  # so that neither two at once nor one cut short do harm
        made = f"fastclip_{NAME}"
        cpp_extension.load(made, [str(SOURCE)], ["-O1"], build_directory=folder, is_python_module=False)
        os.replace(Path(folder) / f"{made}.so", library)


def sync_count():
    """How often the host has waited for the device."""
    return torch.ops.mpslike.sync_count()


def _device_module():
    """What torch looks for as ``torch.mpslike``."""
    module = types.ModuleType(f"torch.{NAME}")
    module.is_available = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module.synchronize = torch.ops.mpslike.synchronize
    return module


def register():
    """Make it ``torch.device("mpslike")``."""
    load()
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _device_module())
    torch.utils.generate_methods_for_privateuse1_backend()
