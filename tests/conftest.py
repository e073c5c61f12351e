"""Where there is no GPU, Triton's kernels are interpreted, so every test can run through them."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import pytest

import fastclip

# Triton runs on CPU tensors only when it is interpreted; with a GPU, the tests marked gpu cover it.
BACKENDS = ("reference", "cpu") if torch.cuda.is_available() else ("reference", "cpu", "triton")


def pytest_collection_modifyitems(items):
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


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each backend in turn, on CPU tensors."""
    with fastclip.use_backend(request.param):
        yield request.param
