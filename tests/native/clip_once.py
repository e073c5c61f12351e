"""One clip with an installed wheel: release.yml runs it on every machine that it builds a wheel for.

`clip_once.py cpu` wants the compiled kernels, too.
"""

import ctypes
import sys
from pathlib import Path

import torch

import fastclip

for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    q = torch.nn.Parameter(torch.zeros(1000, dtype=dtype))
    q.grad = torch.full((1000,), 2.0, dtype=dtype)
    norm = fastclip.clip_norm_([q], 1.0)
    assert abs(norm.item() - 4000**0.5) < 1e-4, norm
    assert torch.linalg.vector_norm(q.grad.double()).sub(1).abs() < 1e-2

libraries = sorted(Path(fastclip.__file__).parent.glob("lib/*"))
if "cpu" in sys.argv:
    (library,) = (path for path in libraries if "fastclip_cpu" in path.name)
    isa = ctypes.CDLL(str(library)).fastclip_cpu_isa
    isa.restype = ctypes.c_char_p
    print("CPU kernels:", isa().decode())
    assert fastclip.backends.choose(torch.device("cpu")).name == "cpu"
print(f"fastclip {fastclip.__version__} with torch {torch.__version__} clips;", [path.name for path in libraries])
