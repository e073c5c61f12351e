"""python -m fastclip run and what starts processes: spawn, torchrun, accelerate launch."""

import subprocess
import sys

import pytest
from test_run import BACKEND, RUN, TRAIN, report_of, started

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(TRAIN)
    return path


def test_a_script_and_what_it_spawns(script, tmp_path):
    command = (*RUN[:1], "-b", "-u", *RUN[1:], "--rule", "0.25", script.name, "spawn", "--lr", "1")
    done = started(*command, "fail", cwd=tmp_path, TMPDIR=str(tmp_path))
    assert done.returncode == 3
    assert report_of(done) == f"4 clips by {BACKEND}; in 4 processes"
    *clips, last = done.stdout.splitlines()
    assert clips == ["5.0 torch.float32 [0.150390625, 0.2001953125]"] * 4
    assert last == f"__main__ {script} ['spawn', '--lr', '1', 'fail'] 1 True"
    assert not list(tmp_path.glob("fastclip-run-*"))


@pytest.mark.parametrize("inside", [True, False])
def test_under_torchrun(inside, script, tmp_path):
    """`torchrun -m fastclip run train.py`, of which rank 0 reports, and `fastclip run -- torchrun train.py`."""
    if inside:
        done = started(*TORCHRUN, "-m", "fastclip", "run", script, "spawn", cwd=tmp_path)
        clips, processes = 4, 4
    else:
        done = started(*RUN, "--", *TORCHRUN, script, "spawn", cwd=tmp_path)
        clips, processes = 8, 8
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("torch.float32 [0.30078125, 0.400390625]") == 8 and "bfloat16" not in done.stdout
    assert report_of(done) == f"{clips} clips by {BACKEND}; in {processes} processes"


def test_under_accelerate_launch(tmp_path):
    """`accelerate launch -m fastclip run`, of a script that knows nothing of fastclip."""
    own = tmp_path / "own.py"
    own.write_text(
        "import torch\nfrom accelerate import Accelerator\naccelerator = Accelerator(cpu=True)\n"
        "model, weight = accelerator.prepare(torch.nn.Linear(2, 1)), torch.ones(4, 2)\n"
        "accelerator.backward(model(weight).sum())\n"
        "print(accelerator.clip_grad_norm_(model.parameters(), 1.0).dtype)\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    done = subprocess.run([*command, "-m", "fastclip", "run", own], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "fastclip: 1 clip by " in done.stderr and done.stdout.strip() == "torch.float32"
