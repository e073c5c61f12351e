"""Accelerate: losses as without fastclip, and the clip inside the optimizer's step."""

import gc
import math
import os
import sys
import weakref
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from cases import parameter
from torch import nn

import fastclip
from fastclip import rules
from fastclip.integrations.accelerate import attach

pytestmark = pytest.mark.usefixtures("quiet_frameworks")

OPTIMIZERS = {  # -> whether it takes the coefficient into its step
    "fused AdamW": (lambda ps: torch.optim.AdamW(ps, lr=0.01, fused=True), True),
    "fused SGD": (lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, fused=True), True),
    "fastclip AdamW": (lambda ps: fastclip.optim.AdamW(ps, lr=0.01), True),
    "foreach AdamW": (lambda ps: torch.optim.AdamW(ps, lr=0.01, foreach=True), False),
    "RMSprop": (lambda ps: torch.optim.RMSprop(ps, lr=0.01), False),
}


class Training:
    """A small network on random data; `watch` is called between the clip and the step."""

    def __init__(self, name="fused AdamW", accumulate=1, precision="no", frozen=False):
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        if frozen:  # as LoRA has it: the optimizer holds only what is trained
            model[0].requires_grad_(False)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.model, self.optimizer = self.accelerator.prepare(model, OPTIMIZERS[name][0](trained))
        self.generator = torch.Generator().manual_seed(1)
        self.step = 0

    def run(self, steps, limit=0.05, watch=lambda: None):
        losses, norms = [], []
        for _ in range(steps):
            x = torch.randn(4, 8, generator=self.generator) * (30 if self.step % 17 == 16 else 1)
            self.step += 1
            with self.accelerator.accumulate(self.model):
                loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients and limit is not None:
                    norms.append(self.accelerator.clip_grad_norm_(self.model.parameters(), limit).item())
                    watch()
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses, norms

    @property
    def gradients(self):
        return [p.grad.clone() for p in self.model.parameters() if p.grad is not None]


def norm_of(gradients):
    return math.sqrt(sum(g.double().square().sum().item() for g in gradients))


def close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_losses_and_norms_are_those_without(name, accumulate):
    expected = Training(name, accumulate).run(20)
    with fastclip.patch_torch():
        patched = Training(name, accumulate).run(20)
    training, seen = Training(name, accumulate), []
    monitor = fastclip.monitor.GradMonitor()
    attached = attach(training.accelerator, monitor=monitor)
    own = training.run(20, watch=lambda: seen.append(norm_of(training.gradients)))
    for found in (patched, own):
        for values, wanted in zip(found, expected):
            close(values, wanted, 5e-6 if name == "RMSprop" else 1e-6)
    clipped = all(norm <= 0.05 * (1 + 1e-5) for norm in seen)
    assert clipped is not OPTIMIZERS[name][1]  # not yet, where the step multiplies as it reads
    assert len(own[1]) == 20 // accumulate == monitor.history.spans[-1].last + 1
    assert attached.stats.names == ("0.weight", "0.bias", "2.weight", "2.bias")


def test_frozen_parameters_do_not_keep_the_clip_out_of_the_step():
    expected, training, seen = Training(frozen=True).run(20), Training(frozen=True), []
    attached = attach(training.accelerator)
    found = training.run(20, watch=lambda: seen.append(norm_of(training.gradients)))
    close(found[0], expected[0])
    assert max(seen) > 0.05 and attached.stats.names == ("2.weight", "2.bias")


def test_clipped_at_once_if_told_so():
    expected, training, seen = Training().run(20), Training(), []
    attach(training.accelerator, in_step=False)
    found = training.run(20, watch=lambda: seen.append(norm_of(training.gradients)))
    close(found[0], expected[0])
    assert max(seen) <= 0.05 * (1 + 1e-6)


@pytest.mark.parametrize("rule", [rules.ZClip(warmup=5), lambda limit: [rules.ZClip(warmup=5), limit]])
def test_a_rule_takes_the_limits_place(rule):
    training, plain = Training(), Training()
    attach(training.accelerator, rule)
    clipper = fastclip.Clipper(plain.model.parameters(), rule if isinstance(rule, rules.Rule) else rule(0.05))
    plain.accelerator.clip_grad_norm_ = lambda parameters, limit: clipper.clip_().total_norm
    close(training.run(60)[0], plain.run(60)[0], 1e-5)


EVERY_RULE = {
    "TensorNorm": lambda: rules.TensorNorm(0.02),
    "AdaGC": lambda: rules.AdaGC(warmup=3),
    "Mask": lambda: [rules.Mask(1e-3, freeze=True), rules.GlobalNorm(0.05)],
    "Value": lambda: [rules.Value(0.05), rules.TensorNorm(0.02)],
    "AGC": lambda: rules.AGC(0.01, exclude="2.*"),
    "Only": lambda: [rules.Only(rules.GlobalNorm(0.05), "0.*"), rules.Except(rules.BlockRMS(0.01), "0.*")],
}


@pytest.mark.parametrize("rule", EVERY_RULE)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_rule_in_every_optimizers_step(name, rule):
    attached, plain = Training(name), Training(name)
    attach(attached.accelerator, EVERY_RULE[rule]())
    clipper = fastclip.Clipper(plain.model.named_parameters(), EVERY_RULE[rule]())
    plain.optimizer.step = lambda: clipper.step(plain.optimizer.optimizer)
    close(attached.run(20)[0], plain.run(20, limit=None)[0], 2e-6 if name == "RMSprop" else 1e-6)


def test_a_run_that_goes_on_from_a_checkpoint(tmp_path):
    rule = rules.ZClip(warmup=5)
    whole, first, second = Training(), Training(), Training()
    for training in (whole, first, second):
        attach(training.accelerator, rule)
    losses = whole.run(60)[0]
    assert first.run(40)[0] == losses[:40]
    first.accelerator.save_state(tmp_path)
    second.accelerator.load_state(tmp_path)
    second.generator, second.step = first.generator, 40
    assert second.run(20)[0] == losses[40:]
    fresh = Training()
    attach(fresh.accelerator, rules.AutoClip())
    with pytest.raises(ValueError, match="saved by ZClip"):
        fresh.accelerator.load_state(tmp_path)


def test_a_monitor_goes_on_from_a_checkpoint(tmp_path):
    path = tmp_path / "run.jsonl"
    for part in range(2):
        training = Training()
        with fastclip.monitor.GradMonitor(path) as monitor:
            attach(training.accelerator, monitor=monitor)
            if part:
                training.accelerator.load_state(tmp_path / "saved")
            training.run(5)
            training.accelerator.save_state(tmp_path / "saved")
    assert [span.first for span in fastclip.monitor.load(path).spans] == list(range(10))


def test_a_call_that_only_measures():
    training = Training()
    attach(training.accelerator, 0.01)
    training.run(3, limit=None)
    loss = training.model(torch.ones(1, 8)).sum()
    training.accelerator.backward(loss)
    before = training.gradients
    norm = training.accelerator.clip_grad_norm_(training.model.parameters(), float("inf"))
    assert norm == pytest.approx(norm_of(before)) and all(map(torch.equal, before, training.gradients))
    assert training.accelerator.clip_grad_norm_([], 1.0) == 0


# ---- between the clip and the step ----


def ready(name="fused SGD", **options):
    """A training whose gradients are waiting to be clipped to 0.05 in the next step."""
    training = Training(name)
    attached = attach(training.accelerator, **options)
    training.run(1)
    training.accelerator.backward(training.model(torch.ones(1, 8)).sum())
    before = training.gradients
    training.accelerator.clip_grad_norm_(training.model.parameters(), 0.05)
    return training, attached, before


@pytest.mark.parametrize("why", ["another pass will follow", "no optimizer has them"])
def test_gradients_that_no_step_takes_are_clipped_at_once(why):
    training = Training(accumulate=2)
    attach(training.accelerator)
    if why == "no optimizer has them":
        training.accelerator._optimizers.clear()
    with training.accelerator.accumulate(training.model):
        assert not training.accelerator.sync_gradients
        training.accelerator.backward(training.model(torch.ones(4, 8)).square().mean())
    before = norm_of(training.gradients)
    training.accelerator.gradient_state._set_sync_gradients(why == "no optimizer has them")
    norm = training.accelerator.clip_grad_norm_(training.model.parameters(), before / 2)
    close([norm.item(), norm_of(training.gradients)], [before, before / 2])
    assert norm.dtype == torch.float32 and norm.device == training.gradients[0].device


def test_gradients_that_are_changed_before_the_step_are_an_error():
    for change in (
        lambda p: p.grad.add_(1),
        lambda p: setattr(p, "grad", p.grad * 2),
        lambda p: setattr(p, "grad", None),
    ):
        training, _, _ = ready()
        change(next(training.model.parameters()))
        with pytest.raises(RuntimeError, match="in_step=False"):
            training.optimizer.step()
        training.optimizer.zero_grad()
        training.run(2)  # and nothing is left of it


@pytest.mark.parametrize("name", ["fused SGD", "fastclip AdamW"])
def test_gradients_that_come_after_the_clip_are_not_clipped(name):
    """One optimizer of two modules, of which one is clipped before the other's backward pass."""

    def stepped(clip):
        accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        a, b = nn.Linear(4, 1), nn.Linear(4, 1)
        optimizer = OPTIMIZERS[name][0]([*a.parameters(), *b.parameters()])
        a, b, optimizer = accelerator.prepare(a, b, optimizer)
        clip(accelerator)
        accelerator.backward(a(torch.ones(1, 4)).sum())
        accelerator.clip_grad_norm_(a.parameters(), 0.01)
        accelerator.backward(b(torch.ones(1, 4)).sum())
        optimizer.step()
        return [p.detach() for p in (*a.parameters(), *b.parameters())]

    for found, expected in zip(stepped(attach), stepped(lambda accelerator: None)):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_gradients_that_are_accumulated_onto_after_the_clip_are_an_error():
    training, _, _ = ready()
    training.accelerator.backward(training.model(torch.ones(1, 8)).sum())
    with pytest.raises(RuntimeError, match="in_step=False"):
        training.accelerator.clip_grad_norm_(training.model.parameters(), 0.05)
    training, _, _ = ready(in_step=False)
    training.accelerator.backward(training.model(torch.ones(1, 8)).sum())
    training.accelerator.clip_grad_norm_(training.model.parameters(), 0.05)
    assert norm_of(training.gradients) == pytest.approx(0.05, rel=1e-4)


def test_a_second_clip_before_the_step_sees_clipped_gradients():
    training, _, _ = ready()
    norm = training.accelerator.clip_grad_norm_(training.model.parameters(), 0.02)
    assert norm == pytest.approx(0.05, rel=1e-4)
    assert training.accelerator.clip_grad_norm_(training.model.parameters(), float("inf")) == pytest.approx(
        0.02, rel=1e-4
    )
    training.optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_clip_without_any_gradient(name):
    """Measures 0, and the step does what it does without it; gradients that come in between are not clipped."""
    training = Training(name)
    attach(training.accelerator, rules.ZClip(warmup=2))
    assert training.accelerator.clip_grad_norm_(training.model.parameters(), 0.05) == 0
    training.optimizer.step()
    assert training.accelerator.clip_grad_norm_(training.model.parameters(), 0.05) == 0
    training.accelerator.backward(training.model(torch.ones(1, 8)).sum())
    before = training.gradients
    training.optimizer.step()
    assert all(map(torch.equal, before, training.gradients))
    training.optimizer.zero_grad()
    training.run(3)


def test_a_clip_without_a_step_is_forgotten():
    training, _, _ = ready()
    training.optimizer.zero_grad()
    training.accelerator.backward(training.model(2 * torch.ones(1, 8)).sum())
    before = norm_of(training.gradients)
    assert training.accelerator.clip_grad_norm_(training.model.parameters(), 0.05) == pytest.approx(before)


def test_what_waits_keeps_no_gradient_alive_but_the_smallest():
    training, _, _ = ready()
    seen = [weakref.ref(p.grad) for p in training.model.parameters() if p.numel() > 1]
    training.optimizer.zero_grad()
    gc.collect()
    assert len(seen) == 3 and not any(reference() is not None for reference in seen)


def test_step_hooks_see_clipped_gradients():
    training, _, _ = ready()
    training.optimizer.zero_grad()
    norms = []
    inner = training.optimizer.optimizer
    inner.register_step_pre_hook(lambda *_: norms.append(norm_of(training.gradients)))
    training.run(3)
    assert norms and max(norms) <= 0.05 * (1 + 1e-6)


def test_detached():
    training, attached, _ = ready()
    attached.detach()
    assert norm_of(training.gradients) == pytest.approx(0.05, rel=1e-4)  # what waited is done
    assert "clip_grad_norm_" not in vars(training.accelerator)
    assert not training.optimizer.optimizer._optimizer_step_pre_hooks
    attached.detach()


def test_a_second_attach_takes_the_place_of_the_first():
    training = Training()
    first, second = attach(training.accelerator, 0.5), attach(training.accelerator, rules.ZClip())
    training.run(3)
    assert first.stats is None and second.stats is not None
    assert training.accelerator._custom_objects == [second]


def test_two_models_with_an_optimizer_each():
    accelerator = Accelerator(cpu=True)
    monitor = fastclip.monitor.GradMonitor()
    attached = attach(accelerator, rules.ZClip(warmup=3), monitor)
    models = [nn.Linear(4, 1), nn.Linear(6, 1)]
    pairs = [accelerator.prepare(m, torch.optim.SGD(m.parameters(), lr=0.1, fused=True)) for m in models]
    for _ in range(6):
        for model, _ in pairs:
            accelerator.backward(model(torch.randn(3, model.in_features)).sum())
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        for _, optimizer in pairs:  # after both clips: each has its own
            optimizer.step()
            optimizer.zero_grad()
    one, other = attached.state_dict()["sets"]
    assert monitor.last["step"] == 5  # of the first
    assert one["rules"][0]["mean"] != other["rules"][0]["mean"]


# ---- a GradScaler ----


class Scaled(Training):
    """float16 as Accelerate has it on a GPU: an AcceleratedOptimizer with the accelerator's scaler."""

    def __init__(self, name):
        super().__init__(name)
        accelerator = self.accelerator
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        self.optimizer = AcceleratedOptimizer(
            self.optimizer.optimizer, device_placement=False, scaler=accelerator.scaler
        )
        accelerator._optimizers[:] = [self.optimizer]


@pytest.fixture
def fp16():
    yield
    Accelerator(cpu=True).state._mixed_precision = "no"


@pytest.mark.usefixtures("fp16")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_grad_scaler(name):
    plain, scaled = Training(name), Scaled(name)
    attach(scaled.accelerator)
    expected = plain.run(10)
    found = scaled.run(10)
    close(found[0], expected[0], 1e-4)
    close(found[1], expected[1], 1e-4)
    scale = scaled.accelerator.scaler.get_scale()
    # an inf: the step is skipped, the scale halves, and training goes on, also where nothing is clipped next
    before = [p.detach().clone() for p in scaled.model.parameters()]
    scaled.accelerator.backward(scaled.model(torch.ones(1, 8)).sum())
    next(scaled.model.parameters()).grad.fill_(math.inf)
    scaled.accelerator.clip_grad_norm_(scaled.model.parameters(), 0.05)
    scaled.optimizer.step()
    assert scaled.accelerator.scaler.get_scale() == scale / 2
    assert all(map(torch.equal, before, scaled.model.parameters()))
    scaled.optimizer.zero_grad()
    scaled.run(1, limit=None)
    assert not any(map(torch.equal, before, scaled.model.parameters()))
    scaled.run(2)


# ---- what cannot be attached to ----


def test_bad_arguments():
    accelerator = Accelerator(cpu=True)
    with pytest.raises(TypeError, match="accelerator must be"):
        attach(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="rule"):
        attach(accelerator, "ZClip")
    with pytest.raises(TypeError, match="monitor must be"):
        attach(accelerator, monitor="run.jsonl")
    assert "clip_grad_norm_" not in vars(accelerator)


def test_an_optimizer_that_clips_by_itself_is_not_clipped_twice():
    accelerator = Accelerator(cpu=True)
    attach(accelerator)
    p = parameter(torch.ones(2))
    accelerator.prepare(fastclip.optim.SGD([p], lr=0.1, max_norm=1.0))
    with pytest.raises(ValueError, match="clipped twice"):
        accelerator.clip_grad_norm_([p], 1.0)


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM", "XLA", "FSDP"])
def test_engines_that_clip_by_themselves(kind, monkeypatch):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(type(accelerator), "distributed_type", DistributedType(kind))
    monkeypatch.setattr(type(accelerator), "is_fsdp2", False)
    with pytest.raises(ValueError, match="clips by itself"):
        attach(accelerator)


# ---- around it ----


def test_a_monitor_logs_to_an_accelerators_trackers():
    from accelerate.tracking import GeneralTracker

    class Tracker(GeneralTracker):
        name, requires_logging_directory, main_process_only = "mine", False, False

        def __init__(self):
            super().__init__()
            self.logged = []

        tracker = property(lambda self: self.logged)

        def store_init_configuration(self, values):
            pass

        def log(self, values, step, **kwargs):
            self.logged.append((step, values["grad/norm"]))

    tracker = Tracker()
    training = Training()
    training.accelerator.log_with = [tracker]
    training.accelerator.init_trackers("run")
    with fastclip.monitor.GradMonitor(log=training.accelerator, log_every=1) as monitor:
        attach(training.accelerator, monitor=monitor)
        _, norms = training.run(4)
    assert [step for step, _ in tracker.logged] == [0, 1, 2, 3]
    close([norm for _, norm in tracker.logged], norms)


def _over_ranks():
    """Two ranks with other batches: DDP's gradients, clipped by the framework and in the step."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # asked for, though the group is there
    results = []
    for name in ("fused AdamW", "fastclip AdamW"):
        for clip in (lambda accelerator: None, attach):
            training = Training(name)
            training.generator.manual_seed(torch.distributed.get_rank())
            clip(training.accelerator)
            results.append(training.run(5)[1])
    return results


def test_over_ranks():
    sys.path.insert(0, str(Path(__file__).parent.parent / "distributed"))
    import worlds

    one, other = worlds.run(2, _over_ranks)
    assert one == other
    for plain, attached in zip(one[::2], one[1::2]):
        close(attached, plain)
