"""What the package uses of torch that is not public: all of it is named here, and is in this torch.

A new torch that lacks one fails here first, by name. What has a fallback is taken away, and the answer stays.
"""

import ast
import operator
from pathlib import Path

import pytest
import torch
from torch.optim import optimizer

import fastclip
from fastclip import torch_internals

PACKAGE = Path(fastclip.__file__).parent

# fastclip/torch_internals.py has a fallback for each
WITH_FALLBACK = {
    "dispatch_keys": "_C._dispatch_keys",
    "dispatch_key": "_C.DispatchKey",
    "functorch_wrapped": "_C._functorch.is_functorch_wrapped_tensor",
    "internal_overlap": "_debug_has_internal_overlap",
    "dense": "ops.aten.is_non_overlapping_and_dense.default",
    "modes_on_stack": "_C._len_torch_dispatch_stack",
    "function_mode": "_C._is_torch_function_mode_enabled",
    "functions_disabled": "_C.DisableTorchFunction",
    "key_included": "_C._dispatch_tls_is_dispatch_key_included",
    "mode_of": "_C._get_dispatch_mode",
    "mode_key": "_C._TorchDispatchModeKey",
    "modes_disabled": "utils._python_dispatch._disable_current_modes",
    "graph_task": "_C._current_graph_task_id",
}

# ATen operators, which torch.optim and torch.nn.utils call by these names, too
OPERATORS = {
    "_foreach_add", "_foreach_copy_", "_foreach_mul_", "_foreach_norm", "_foreach_sub_", "_foreach_zero_",
    "_fused_adamw_", "_fused_sgd_", "_neg_view",
}  # fmt: skip

# Attributes of torch's objects: (object, attribute) -> what needs it
ATTRIBUTES = {
    (torch.amp.GradScaler, "_per_optimizer_states"): "clipper.step(optimizer, scaler=)",
    (torch.amp.GradScaler, "_scale"): "clipper.step(optimizer, scaler=)",
    (torch.amp.GradScaler, "_unscale_grads_"): "measure_in_backward, with subclasses",
    (torch.nn.Parameter, "_cdata"): "hooks of tensors that torch.utils.swap_tensors has exchanged",
    (torch.nn.Parameter, "_post_accumulate_grad_hooks"): "the same, and two optimizers that step in backward",
    (
        torch.optim.SGD,
        "_optimizer_step_pre_hooks",
    ): "clipper.step(optimizer), before others' hooks",
    (torch._C._distributed_c10d.Reducer, "_set_optimizer_in_backward"): "step_in_backward=model, with DDP",
    (torch.optim.SGD, "_optimizer_step_post_hooks"): "the same, after the step",
    (optimizer, "_global_optimizer_pre_hooks"): "the same, for all optimizers",
    (optimizer, "_global_optimizer_post_hooks"): "the same, after the step",
}


def names_in_the_package():
    """Private names below torch, as in torch._x, in all files; of what is imported from one, its whole path."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("torch"):
                paths = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from (path.removeprefix("torch.") for path in paths if "._" in path)
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch" and is_private(node.attr):
                yield node.attr


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def test_every_private_name_is_listed():
    assert set(names_in_the_package()) == OPERATORS
    text = (PACKAGE / "torch_internals.py").read_text()
    for name, path in WITH_FALLBACK.items():
        assert f'{name} = found("{path}")' in text
    assert text.count(" = found(") == len(WITH_FALLBACK)


@pytest.mark.parametrize("path", [*WITH_FALLBACK.values(), *sorted(OPERATORS)])
def test_this_torch_has_it(path):
    operator.attrgetter(path)(torch)


@pytest.mark.parametrize(("owner", "name"), ATTRIBUTES, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_this_torch_has_the_attribute(owner, name):
    made = owner
    if owner is torch.amp.GradScaler:
        made = torch.amp.GradScaler("cpu")
    elif owner is torch.optim.SGD:
        made = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    assert hasattr(made, name), f"{name} is needed by {ATTRIBUTES[owner, name]}"


def parameter(gradient):
    p = torch.nn.Parameter(torch.zeros(gradient.shape))
    p.grad = gradient
    return p


@pytest.mark.parametrize("name", WITH_FALLBACK)
def test_without_it_gradients_are_clipped_and_refused_all_the_same(name, monkeypatch):
    monkeypatch.setattr(torch_internals, name, None)
    gradients = [
        torch.ones(2, 3),
        torch.ones(3, 2, 4, 5).to(memory_format=torch.channels_last),
        torch.ones(3, 8)[:, ::2],
    ]
    assert fastclip.clip_norm_([parameter(g) for g in gradients], 1.0).item() == pytest.approx((6 + 120 + 12) ** 0.5)
    assert sum(g.square().sum() for g in gradients).item() == pytest.approx(1)
    with pytest.raises(RuntimeError, match="expanded"):
        fastclip.clip_norm_([parameter(torch.ones(1).expand(3)), parameter(torch.ones(2, 3).t()[:, ::2])], 1.0)
    flat = torch.ones(10)
    with pytest.raises(RuntimeError, match="overlap"):
        fastclip.clip_norm_([parameter(flat[:6]), parameter(flat[5:])], 1.0)
    with pytest.raises(NotImplementedError, match="supported"):
        fastclip.clip_norm_([parameter(torch.ones(3).as_subclass(Wrapped))], 1.0)
    if name not in ("modes_on_stack", "mode_of", "mode_key"):
        with torch._subclasses.FakeTensorMode(), pytest.raises(NotImplementedError, match="FakeTensorMode"):
            fastclip.Clipper([torch.nn.Parameter(torch.ones(2))], 1.0).clip_()


class Wrapped(torch.Tensor):
    """A subclass with operations of its own."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return NotImplemented
