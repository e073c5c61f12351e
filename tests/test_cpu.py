"""The C++ backend: instruction sets, threads, memory."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from cases import CASES, DTYPES, NORM_ERROR, gradients, parameter, rounding, tiny

import fastclip
from fastclip.backends import packers

PROGRAM = """
import json, sys
sys.path.insert(0, {tests!r})
import torch, fastclip
from cases import CASES, DTYPES, EXTREMES, gradients, parameter
from fastclip.backends import packers
out = {{"isa": packers.get().kernels.isa()}}
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
    best = packers.get().kernels.isa()
    here = [isa for isa in ("portable", "avx2", "avx512") if isa == "portable" or best == "avx512" or isa == best]
    results = [run_with(isa) for isa in here]
    assert [r.pop("isa") for r in results] == here
    for other in results[1:]:
        for key, expected in results[0].items():
            if key.startswith("special"):
                assert other[key] == expected, key
                continue
            dtype = getattr(torch, key.rpartition("torch.")[2])  # both may be off from float64, and not the same way
            tolerance = {"rel": 2 * (NORM_ERROR + rounding(dtype)), "abs": tiny(dtype)}
            assert list(flatten(other[key])) == pytest.approx(list(flatten(expected)), **tolerance), key


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


FORK = """
import os, torch, fastclip
from fastclip.backends import packers
torch.set_num_threads(2)
big = torch.nn.Parameter(torch.ones(3_000_000))
big.grad = torch.ones(3_000_000)
torch.ones(3_000_000).mul_(2)  # starts torch's threads
{before}
if os.fork() == 0:
    norm = fastclip.clip_norm_([big], 1.0).item()
    stats = fastclip.Clipper([big], 0.5).clip_()
    fastclip.clip_value_([big], 1e-5)
    fastclip.optim.SGD([big], lr=0.1, max_norm=1.0).step()
    print(abs(norm / 3_000_000**0.5 - 1) < 1e-6, abs(stats.total_norm.item() - 1) < 1e-5, flush=True)
    os._exit(0)
os.wait()
"""


@pytest.mark.parametrize("before", ["fastclip.total_norm([big])", ""], ids=["after a call", "before the first"])
def test_a_forked_child_can_clip(before):
    """OpenMP's threads do not survive os.fork(), which a DataLoader's worker comes from."""
    packers.get()
    command = [sys.executable, "-c", FORK.format(before=before)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.communicate(timeout=60)[0] == "True True\n"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the child too


def test_gradients_that_another_thread_takes_away_meanwhile():
    """A call works on the gradients that there were when it began, and keeps them alive."""
    p = parameter(torch.ones(20_000_000))
    calling, taken = [False], []
    interval = sys.getswitchinterval()

    def take():
        while not calling[0]:
            time.sleep(1e-4)
        p.grad = None
        taken.append(calling[0])

    for _ in range(20):
        gradient = p.grad = torch.ones(20_000_000)
        thread = threading.Thread(target=take)
        thread.start()
        sys.setswitchinterval(100)  # the thread gets the interpreter when it is let go of, not at any time
        try:
            calling[0] = True
            norm = fastclip.clip_norm_([p], 1.0)
            calling[0] = False
        finally:
            sys.setswitchinterval(interval)
            calling[0] = True
        thread.join()
        calling[0] = False
        assert norm.item() == pytest.approx(20_000_000**0.5, rel=1e-6)
        assert torch.equal(gradient, torch.full_like(gradient, gradient[0].item())) and gradient[0] < 1e-3
        if taken.pop():
            return
    pytest.fail("the other thread never ran during a call")
