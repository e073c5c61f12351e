"""The C++ backend: instruction sets, threads, memory."""

import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from cases import CASES, DTYPES, gradients, parameter

import fastclip
from fastclip.backends import native

PROGRAM = """
import json, sys
sys.path.insert(0, {tests!r})
import torch, fastclip
from cases import CASES, DTYPES, EXTREMES, gradients, parameter
from fastclip.backends import native
out = {{"isa": native.cpp.load().isa()}}
for case in CASES:
    for dtype in DTYPES:
        torch.manual_seed(0)
        parameters = CASES[case](dtype=dtype, device="cpu")
        norms = [fastclip.total_norm(gradients(parameters), p).item() for p in (2, 1, float("inf"), 3)]
        fastclip.clip_norm_(parameters, 0.7)
        fastclip.clip_value_(parameters, 0.05)
        masked = fastclip.mask_small_(parameters, 0.01).tolist()
        values = [g.double().flatten().tolist()[:200] for g in gradients(parameters)]
        out[f"{{case}} {{dtype}}"] = [norms, masked, values]
special = [0.0, -0.0, 1e-8, 6e-8, 5e-5, 1.0, 65504.0, float("inf"), float("-inf"), float("nan"), 1e-40, 0.1, -3.3]
for dtype in DTYPES:
    p = parameter(torch.tensor(special * 9).to(dtype))
    fastclip.clip_with_norm_([p], 1.0, torch.tensor(3.0))
    out[f"special {{dtype}}"] = [str(x) for x in p.grad.tolist()]
print(json.dumps(out))
"""


def run_with(isa):
    environment = {**os.environ, "FASTCLIP_CPU_ISA": isa, "FASTCLIP_BACKEND": "cpu"}
    program = PROGRAM.format(tests=os.path.dirname(__file__))
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(result.stdout)


def flatten(value):
    if isinstance(value, list):
        for v in value:
            yield from flatten(v)
    else:
        yield value


def test_instruction_sets_agree():
    """Each instruction set this machine has gives what the portable code gives (which the other tests compare with
    float64 where it is the best there is)."""
    best = native.cpp.load().isa()
    here = [isa for isa in ("portable", "avx2", "avx512") if isa == "portable" or best == "avx512" or isa == best]
    results = [run_with(isa) for isa in here]
    assert [r.pop("isa") for r in results] == here
    for other in results[1:]:
        for key, expected in results[0].items():
            tolerance = 1e-2 if "float16" in key else 1e-6  # a norm's last bit may flip a rounding
            if key.startswith("special"):
                assert other[key] == expected, key
            else:
                assert list(flatten(other[key])) == pytest.approx(list(flatten(expected)), rel=tolerance, abs=1e-6), key


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_repeatable(dtype):
    """The norm and the gradients do not depend on the number of threads, nor on the run."""
    seen = set()
    for threads in (1, 2, 3, 1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        parameters = CASES["many chunks"](dtype=dtype, device="cpu") + CASES["odd sizes"](dtype=dtype, device="cpu")
        parameters += [parameter(torch.randn(300_000).to(dtype))]
        norm = fastclip.clip_norm_(parameters, 0.5)
        stats = fastclip.Clipper(parameters, 0.1).clip_()
        digest = [norm.item().hex(), stats.total_norm.item().hex(), *[n.hex() for n in stats.tensor_norms.tolist()]]
        seen.add((tuple(digest), b"".join(g.double().numpy().tobytes() for g in gradients(parameters))))
    assert len(seen) == 1


def test_extra_memory_stays_below_a_mebibyte():
    """124M elements, clipped: peak memory of the process grows by less than 1 MiB."""
    parameters = [parameter(torch.full((1_000_000,), 1e-3)) for _ in range(124)]
    fastclip.clip_norm_(parameters[:1], 1e-3)
    clipper = fastclip.Clipper(parameters, 1e-3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fastclip.clip_norm_(parameters, 1e-3)
    clipper.clip_()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024  # KiB


def test_other_python_threads_run_meanwhile():
    """A long pass lets go of the interpreter, with the gradients kept alive."""
    import threading

    p = parameter(torch.ones(60_000_000))
    steps, stop = [0], threading.Event()

    def count():
        while not stop.is_set():
            steps[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    try:
        start = steps[0]
        for _ in range(5):
            fastclip.total_norm([p.grad])
        assert steps[0] > start
    finally:
        stop.set()
        thread.join()


def test_forked_worker_can_clip():
    """A DataLoader's worker is a fork: the library must work there too."""
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        ok = fastclip.total_norm([torch.ones(16)]).item() == 4
        os._exit(0 if ok else 1)
    assert os.waitpid(pid, 0)[1] == 0
