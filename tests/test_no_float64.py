"""fastclip on a device without float64 whose addresses are none, as MPS has it: see no_float64/device.cpp.

The device belongs to a process for good, so each file of no_float64/ that uses it has a process of its own.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "no_float64"


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("cases", sorted(path.name for path in FOLDER.glob("*_cases.py")))
def test_on_the_device(cases):
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(FOLDER / cases)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2_000:]
