"""Every rule and every backend, and those written from CONTRIBUTING's templates: one line each."""

import importlib
import re
import types
from pathlib import Path

import pytest
from conformance import BackendConformance, RuleConformance
from conftest import BACKENDS

from fastclip.rules import AGC, AdaGC, AutoClip, BlockRMS, Except, GlobalNorm, Mask, Only, TensorNorm, Value, ZClip

pytestmark = pytest.mark.usefixtures("one_thread")

TEMPLATES = re.findall(
    r"^```python\n(.*?)^```", (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE
)


def template(marker):
    """The template with `marker` in it, as a module."""
    (source,) = (text for text in TEMPLATES if marker in text)
    module = types.ModuleType("template")
    exec(source, module.__dict__)
    return module


RULES = {
    "GlobalNorm": lambda: GlobalNorm(1.0),
    "GlobalNorm of the step": lambda: GlobalNorm(lambda step: 0.5 + step),
    "TensorNorm": lambda: TensorNorm(0.5),
    "BlockRMS": lambda: BlockRMS(0.3),
    "Mask": lambda: Mask(0.7),
    "Value": lambda: Value(0.4),
    "AGC": lambda: AGC(0.1),
    "AutoClip": lambda: AutoClip(20, window=5),
    "ZClip": lambda: ZClip(warmup=3),
    "AdaGC": lambda: AdaGC(warmup=3),
    "Only": lambda: Only(GlobalNorm(0.5), "p[12]"),
    "Except": lambda: Except(TensorNorm(0.5), "p[01]"),
    "the template": lambda: template("class MedianNorm").MedianNorm(1.5),
}


@pytest.mark.parametrize("rule", RULES)
class TestRules(RuleConformance):
    @pytest.fixture(autouse=True)
    def _make(self, rule):
        self.make = RULES[rule]


def module(name):
    return (
        template('name = "plain"') if name == "the template" else importlib.import_module(f"fastclip.backends.{name}")
    )


@pytest.mark.parametrize("name", [*BACKENDS, "the template"])
class TestBackends(BackendConformance):
    @pytest.fixture(autouse=True)
    def _backend(self, name, monkeypatch):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")  # what the emulated one says that it is compiled for
        self.backend = module(name)
        if name in ("triton", "cuda"):  # interpreted and emulated here; tests/test_table.py has them do every case
            self.layouts = ["one element", "sixteen", "with empty", "misaligned", "transposed"]
