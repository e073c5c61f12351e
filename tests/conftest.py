"""Where there is no GPU, Triton's kernels are interpreted and CUDA's emulated, so every test can run through them."""

import importlib.util
import os

# Threads that wait for each other spin by default, and take the time from the tests of the other process.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import emulation
import pytest

import fastclip
from fastclip.backends import cuda, native

# Without a GPU, Triton's kernels and CUDA's run on CPU tensors; with one, the tests marked gpu cover them.
BACKENDS = ("reference", "foreach", "cpu")
if not torch.cuda.is_available():
    BACKENDS += ("triton", "cuda")

if not torch.cuda.is_available():
    cuda.DEVICE, native.cuda = "cpu", emulation.library


FRAMEWORKS = {  # which tests of integrations/ need what: `make test-integrations` has all
    "test_accelerate.py": ["accelerate"],
    "test_examples_of_frameworks.py": ["accelerate", "lightning", "sklearn", "tabulate", "transformers"],
    "test_frameworks.py": ["accelerate", "lightning", "peft", "timm", "transformers"],
    "test_launchers.py": ["accelerate"],
    "test_lightning.py": ["lightning"],
    "test_torchtitan.py": ["torchtitan"],
    "test_transformers.py": ["accelerate", "transformers"],
}
collect_ignore = [
    f"integrations/{name}"
    for name, packages in FRAMEWORKS.items()
    if any(importlib.util.find_spec(package) is None for package in packages)
]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "slow" not in item.keywords)  # first, so that none is waited for at the end
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU: run `make gpu` on a machine with one"))


@pytest.fixture(autouse=True)
def _two_threads():
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(2)


@pytest.fixture
def quiet_frameworks(monkeypatch):
    """Frameworks that print nothing and reach for no network, and torch as it was afterwards."""
    from trainings import quietly

    for name, value in {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DO_NOT_TRACK": "1"}.items():
        monkeypatch.setenv(name, value)
    with quietly():
        yield
    fastclip.unpatch_torch()


@pytest.fixture
def one_thread(_two_threads):
    """For small tensors: a second thread would only be waited for."""
    torch.set_num_threads(1)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each backend in turn, on CPU tensors."""
    with fastclip.use_backend(request.param):
        yield request.param
