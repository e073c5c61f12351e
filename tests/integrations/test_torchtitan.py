"""torchtitan: its clip and its container of optimizers, against its own functions."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import fastclip
from fastclip.integrations.torchtitan import OptimizersContainer, clip_grad_norm_, fast_adamw

sys.path.insert(0, str(Path(__file__).parent.parent / "distributed"))
import worlds

pytestmark = pytest.mark.usefixtures("quiet_frameworks")


def _gradients(sharded, mesh):
    """Of a model of which each rank has a shard, or another stage."""
    torch.manual_seed(0 if sharded else dist.get_rank())
    parameters = []
    for shape in ((8, 3), (6,), (4, 4)):
        value, gradient = torch.zeros(shape), torch.randn(shape)
        if sharded:
            value, gradient = (distribute_tensor(t, mesh, [Shard(0)]) for t in (value, gradient))
        parameters.append(nn.Parameter(value))
        parameters[-1].grad = gradient
    return parameters


def _both(name, norm_type):
    import torchtitan.distributed.utils as titan

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(name,))
    found = []
    for clip in (titan.clip_grad_norm_, clip_grad_norm_):
        parameters = _gradients(name == "fsdp", mesh)
        pp_mesh = mesh if name == "pp" else None
        norm = clip(iter(parameters), 0.5, norm_type, foreach=True, pp_mesh=pp_mesh)
        grads = [p.grad.full_tensor() if name == "fsdp" else p.grad for p in parameters]
        found.append((norm.item(), [g.tolist() for g in grads]))
    return found


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("name", ["fsdp", "pp"])
def test_the_clip_is_torchtitans_own(name, norm_type):
    norms = set()
    for (norm, grads), (our_norm, our_grads) in worlds.run(2, _both, name, norm_type):
        assert our_norm == pytest.approx(norm, rel=1e-6)
        for a, b in zip(grads, our_grads):
            torch.testing.assert_close(torch.tensor(b), torch.tensor(a), rtol=1e-6, atol=1e-7)
        norms.add(our_norm)
    assert len(norms) == 1


def models():
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))]


def built(config, parts):
    return config.build(model_parts=parts)


def trained(config, clip, steps=10):
    parts = models()
    optimizers = built(config, parts)
    generator = torch.Generator().manual_seed(1)
    parameters = [p for part in parts for p in part.parameters()]
    for _ in range(steps):
        parts[0](torch.randn(3, 4, generator=generator)).square().mean().backward()
        clip(optimizers, parameters)
        optimizers.zero_grad()
    return [p.detach() for p in parameters], optimizers


def clip_and_step(optimizers, parameters):
    clip_grad_norm_(parameters, 0.1, foreach=True)
    optimizers.step()


def test_fast_adamw_in_the_container():
    import torchtitan.components.optimizer as titan
    from torchtitan.distributed.utils import clip_grad_norm_ as theirs

    def their_clip(optimizers, parameters):
        theirs(parameters, 0.1, foreach=True)
        optimizers.step()

    expected, _ = trained(titan.default_adamw(lr=0.01), their_clip)
    found, optimizers = trained(fast_adamw(lr=0.01), clip_and_step)
    assert type(optimizers) is OptimizersContainer and type(optimizers.optimizers[0]) is fastclip.optim.AdamW
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_checkpoints_of_the_container():
    """Flat and keyed by names, as torchtitan saves them; also into a container that has taken no step."""
    _, trained_container = trained(fast_adamw(lr=0.01), clip_and_step)
    saved = trained_container.state_dict()
    fresh = built(fast_adamw(lr=0.01), models())
    fresh.load_state_dict({key: value.clone() if torch.is_tensor(value) else value for key, value in saved.items()})
    again = fresh.state_dict()
    assert saved.keys() == again.keys() and "state.0.weight.exp_avg" in saved
    for key, value in saved.items():
        assert torch.equal(value, again[key]) if torch.is_tensor(value) else value == again[key], key


def test_torchtitans_own_optimizers_are_known_too():
    import torchtitan.components.optimizer as titan

    group = titan.ParamGroupConfig(pattern=r"\.bias$", optimizer_name="AdamW", optimizer_kwargs={"lr": 0.1})
    rest = titan.ParamGroupConfig(pattern=".*", optimizer_name="FastSGD", optimizer_kwargs={"lr": 0.1, "momentum": 0.9})
    container = built(OptimizersContainer.Config(param_groups=[group, rest]), models())
    assert [type(each) for each in container] == [torch.optim.AdamW, fastclip.optim.SGD]
    with pytest.raises(NotImplementedError, match="Adadelta"):
        OptimizersContainer._resolve_optimizer_factory("Adadelta")


@pytest.mark.parametrize("parts", [1, 2])
def test_a_container_is_stepped_by_a_clipper(parts):
    """Inside the step of its one optimizer; with several, in place before their steps."""

    def made():
        all_parts = [models()[0] for _ in range(parts)]
        for number, part in enumerate(all_parts):
            for p in part.parameters():
                p.grad = torch.full_like(p, 1.0 + number)
        return all_parts, built(fast_adamw(lr=0.01, weight_decay=0.0), all_parts)

    one, plain = made()
    other, container = made()
    fastclip.clip_norm_([p for part in one for p in part.parameters()], 1e-9)
    plain.step()
    parameters = [p for part in other for p in part.parameters()]
    stats = fastclip.Clipper(parameters, 1e-9).step(container)
    assert stats.clipped
    clipped = [p.grad.norm().item() < 1e-8 for p in parameters]
    assert not any(clipped) if parts == 1 else all(clipped)
    for a, b in zip(parameters, [p for part in one for p in part.parameters()]):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_container_that_clips_by_itself_is_not_clipped_twice():
    config = fast_adamw(lr=0.01)
    config.optimizer_factory_kwargs_by_name = {"FastAdamW": {"max_norm": 1.0}}
    for count in (1, 2):
        parts = [models()[0] for _ in range(count)]
        container = built(config, parts)
        with pytest.raises(ValueError, match="clipped twice"):
            fastclip.Clipper([p for part in parts for p in part.parameters()], 1.0).step(container)
