"""The examples of several ranks end with the losses of one process, to rounding."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import worlds

pytest.importorskip("sklearn")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent


def _example(name):
    sys.path.insert(0, str(ROOT))
    return importlib.import_module(f"examples.{name}").main(["--steps", "8"])


@pytest.mark.parametrize(
    ("name", "sizes"), [("fsdp2", (2, 4)), ("tensor_parallel", (2, 4)), ("pipeline", (2,)), ("experts", (2, 4))]
)
def test_the_losses_are_those_of_one_process(name, sizes):
    (alone,) = worlds.run(1, _example, name)
    assert len(alone) == 8 and alone[-1] < alone[0]
    for size in sizes:
        for losses in worlds.run(size, _example, name):
            # Rounding of float32, which eight steps of training make some times larger.
            torch.testing.assert_close(torch.tensor(losses), torch.tensor(alone), rtol=1e-4, atol=1e-5)


def test_under_torchrun():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "examples/fsdp2.py", "--steps", "4"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 rank(s): loss ")
