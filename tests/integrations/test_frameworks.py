"""The same training with and without fastclip, in each framework and by each way in: the losses are the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trainings
from trainings import LIMIT, TRAININGS

import fastclip
import fastclip.integrations.accelerate
import fastclip.integrations.lightning
import fastclip.integrations.transformers

pytestmark = pytest.mark.usefixtures("quiet_frameworks")

SCRIPT = Path(trainings.__file__)


@pytest.fixture(scope="module")
def expected():
    with trainings.quietly():
        return {name: train() for name, train in TRAININGS.items()}


def close(found, expected):
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", TRAININGS)
def test_by_the_patch(name, expected):
    with fastclip.patch_torch() as patch:
        close(TRAININGS[name](), expected[name])
    counts = patch.counts()
    assert sum(counts["fastclip"].values()) == trainings.STEPS and not counts["torch"]


def test_by_the_command(expected):
    """One run of all, through a script that knows nothing of fastclip."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fastclip", "run", SCRIPT, *TRAININGS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, losses in json.loads(done.stdout.splitlines()[-1]).items():
        close(losses, expected[name])
    assert f"fastclip: {len(TRAININGS) * trainings.STEPS} clips by " in done.stderr


INTEGRATIONS = {
    "accelerate": lambda: fastclip.integrations.accelerate.attach,
    "trainer": lambda: fastclip.integrations.transformers.attach,
    "peft": lambda: fastclip.integrations.transformers.attach,
    "lightning": lambda: fastclip.integrations.lightning.ClipCallback(LIMIT),
    "fabric": lambda: lambda model: fastclip.Clipper(model.parameters(), LIMIT),
    "timm": lambda: fastclip.clip_norm_,
}


@pytest.mark.parametrize("name", TRAININGS)
def test_by_the_integration(name, expected):
    close(TRAININGS[name](INTEGRATIONS[name]()), expected[name])
