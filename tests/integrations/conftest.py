"""Tests with the frameworks, in an environment of their own: ``make test-integrations``."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", DO_NOT_TRACK="1")
sys.path.insert(0, str(Path(__file__).parent))

NEEDED = {
    "test_accelerate.py": ["accelerate"],
    "test_transformers.py": ["transformers", "accelerate"],
    "test_lightning.py": ["lightning"],
    "test_torchtitan.py": ["torchtitan"],
    "test_frameworks.py": ["accelerate", "lightning", "peft", "timm", "transformers"],
}
collect_ignore = [
    name for name, packages in NEEDED.items() if any(importlib.util.find_spec(package) is None for package in packages)
]


@pytest.fixture(autouse=True)
def as_it_was():
    from trainings import quietly

    import fastclip

    with quietly():
        yield
    fastclip.unpatch_torch()
