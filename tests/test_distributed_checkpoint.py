"""torch.distributed.checkpoint: what a rule remembers travels with the optimizer, and making states is no step."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import fastclip
from fastclip import rules
from fastclip.optim import SGD, AdamW

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process is meant here

RULES = {
    "AutoClip": lambda: rules.AutoClip(window=5),
    "ZClip": lambda: rules.ZClip(warmup=3),
    "AdaGC": lambda: rules.AdaGC(warmup=3),
    "a list": lambda: [rules.Except(rules.AdaGC(warmup=2), "0.*"), rules.ZClip(warmup=2)],
    "a limit that warms up": lambda: rules.GlobalNorm(lambda step: 0.1 * (step + 1)),
    "a limit": lambda: rules.GlobalNorm(0.3),
}
OPTIMIZERS = {
    "AdamW": lambda model, rule: AdamW(model.named_parameters(), lr=1e-2, max_norm=rule, nonfinite="skip"),
    "SGD": lambda model, rule: SGD(model.named_parameters(), lr=1e-1, max_norm=rule, nonfinite="skip"),
    "SGD, momentum": lambda model, rule: SGD(model.named_parameters(), lr=1e-1, momentum=0.9, max_norm=rule),
}


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        scale = 5.0 if step % 4 == 3 else 1.0
        (model(torch.randn(8, 5, generator=generator)).square().mean() * scale).backward()
        optimizer.step()


def all_of(model, optimizer):
    saved = optimizer.state_dict()
    states = {key: state for key, state in saved["state"].items() if state}  # flattened, those of SGD come back as {}
    return copy.deepcopy([list(model.parameters()), states, saved["param_groups"][0]["clipper"]])


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_saved_and_loaded_run_goes_on_the_same(kind, rule, flatten, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, other = net(), net()
    optimizer, loaded = OPTIMIZERS[kind](model, RULES[rule]()), OPTIMIZERS[kind](other, RULES[rule]())
    train(model, optimizer, range(7))
    optimizer.zero_grad()
    state = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.save(state, checkpoint_id=tmp_path / "saved", no_dist=True)

    into = {"model": other.state_dict(), "optim": get_optimizer_state_dict(other, loaded, options=options)}
    dcp.load(into, checkpoint_id=tmp_path / "saved", no_dist=True)
    other.load_state_dict(into["model"])
    set_optimizer_state_dict(other, loaded, into["optim"], options=options)
    torch.testing.assert_close(all_of(other, loaded), all_of(model, optimizer), rtol=0, atol=0)
    train(model, optimizer, range(7, 12))
    train(other, loaded, range(7, 12))
    torch.testing.assert_close(all_of(other, loaded), all_of(model, optimizer), rtol=0, atol=0)
    assert loaded.clipper.steps == 12


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_step_that_makes_states_does_not_count(kind, rule):
    """get_optimizer_state_dict steps a fresh optimizer with gradients of zeros and lr 0."""
    model, other = net(), net()
    optimizer, plain = OPTIMIZERS[kind](model, RULES[rule]()), OPTIMIZERS[kind](other, RULES[rule]())
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.clipper.steps == 0 and optimizer.stats is None
    assert all(lr == group["lr"] for lr, group in zip([plain.defaults["lr"]], optimizer.param_groups))
    train(model, optimizer, range(6))
    train(other, plain, range(6))
    torch.testing.assert_close(all_of(model, optimizer), all_of(other, plain), rtol=0, atol=0)


def test_a_first_step_with_lr_0_and_gradients_counts():
    """A schedule that warms up from 0 is no checkpoint being made."""
    model = net()
    optimizer = AdamW(model.parameters(), lr=0.0, max_norm=rules.ZClip())
    train(model, optimizer, range(2))
    assert optimizer.clipper.steps == 2 and optimizer.clipper.rules[0].state["count"] == 2


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_init_state_makes_what_a_step_would(kind):
    model, other = net(), net()
    optimizer, stepped = OPTIMIZERS[kind](model, rules.AdaGC()), OPTIMIZERS[kind](other, rules.AdaGC())
    optimizer.init_state()
    train(other, stepped, range(1))

    def shapes(state):
        return {k: shapes(v) if isinstance(v, dict) else getattr(v, "shape", None) for k, v in state.items()}

    assert shapes(optimizer.state_dict()["state"]) == shapes(stepped.state_dict()["state"])
    ours, theirs = (o.state_dict()["param_groups"][0]["clipper"]["rules"][0] for o in (optimizer, stepped))
    assert shapes(ours) == shapes(theirs)
    assert not any(state.any() for states in optimizer.state.values() for state in states.values())


def test_torch_optim_carries_the_rules_memory():
    """Through torch.optim.AdamW and back, extra entries of a parameter group survive."""
    model = net()
    optimizer = AdamW(model.parameters(), max_norm=rules.ZClip())
    train(model, optimizer, range(3))
    theirs = torch.optim.AdamW(model.parameters())
    theirs.load_state_dict(optimizer.state_dict())
    back = AdamW(model.parameters(), max_norm=rules.ZClip())
    back.load_state_dict(theirs.state_dict())
    assert back.clipper.steps == 3
    torch.testing.assert_close(all_of(model, back), all_of(model, optimizer), rtol=0, atol=0)
    plain = AdamW(model.parameters())
    plain.load_state_dict(optimizer.state_dict())  # without a max_norm there is nobody to remember
    plain.step()


def test_a_state_of_another_rule_changes_nothing():
    model = net()
    optimizer = AdamW(model.parameters(), max_norm=rules.ZClip())
    train(model, optimizer, range(2))
    other = AdamW(model.parameters(), max_norm=rules.AutoClip())
    before = all_of(model, other)
    with pytest.raises(ValueError, match="AutoClip"):
        other.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(all_of(model, other), before, rtol=0, atol=0)


def test_counts_of_a_clipper_are_saved_as_numbers():
    p = torch.nn.Parameter(torch.zeros(3))
    clipper = fastclip.Clipper([p], 1.0, nonfinite="skip")
    p.grad = torch.full((3,), torch.nan)
    clipper.clip_()
    saved = clipper.state_dict()
    assert saved == {"steps": 1, "skips": 1, "zeroed": 0, "rules": [{}]}
    fresh = fastclip.Clipper([p], 1.0, nonfinite="skip")
    fresh.load_state_dict(saved)
    fresh.clip_()
    assert fresh.skips == 2 and fresh.skips.dtype == torch.int64 and fresh.zeroed is None
