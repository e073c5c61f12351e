"""Tests with the frameworks, in an environment of their own: ``make test-integrations``."""

import importlib.util
import os

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", DO_NOT_TRACK="1")

NEEDED = {
    "test_accelerate.py": "accelerate",
    "test_transformers.py": "transformers",
    "test_lightning.py": "lightning",
    "test_timm.py": "timm",
}
collect_ignore = [name for name, package in NEEDED.items() if importlib.util.find_spec(package) is None]
