"""Lightning's Trainer with every precision, and Fabric: the clip inside the optimizer's step."""

import math

import lightning
import pytest
import torch
from trainings import STEPS, batches, lightning_module, lightning_trainer, loss_of, network

import fastclip
from fastclip import rules
from fastclip.integrations.lightning import ClipCallback

pytestmark = pytest.mark.usefixtures("quiet_frameworks")

OPTIMIZERS = {
    "fused AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.01, fused=True),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.01),
    "loop SGD": lambda ps: torch.optim.SGD(ps, lr=0.1, foreach=False),
    "fastclip AdamW": lambda ps: fastclip.optim.AdamW(ps, lr=0.01),
}


def data(steps=STEPS, loud=20):
    return torch.utils.data.DataLoader(batches(steps, loud), batch_size=None)


def trained(optimizer="fused AdamW", steps=STEPS, data=data, **options):
    module = lightning_module(OPTIMIZERS[optimizer])
    trainer = lightning_trainer(steps, **options)
    trainer.fit(module, data())
    return module, trainer


class Watch(lightning.Callback):
    """Norms before the step, and whether torch's fused step is given a divisor."""

    def __init__(self):
        self.norms = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.norms.append(torch.stack([p.grad.double().norm() for p in pl_module.parameters()]).norm().item())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_losses_are_those_of_the_trainers_own_clip(optimizer, accumulate, precision):
    options = {"precision": precision, "accumulate_grad_batches": accumulate}

    def data(steps=STEPS):
        rows = batches(steps * accumulate)
        return torch.utils.data.DataLoader(
            [x.bfloat16() if precision == "bf16-true" else x for x in rows], batch_size=None
        )

    same = "AdamW" if precision == "bf16-mixed" and "AdamW" in optimizer else optimizer  # Lightning clips no fused one
    plain, _ = trained(same, data=data, gradient_clip_val=0.05, **options)
    monitor = fastclip.monitor.GradMonitor()
    callback, watch = ClipCallback(0.05, monitor), Watch()
    module, trainer = trained(optimizer, data=data, callbacks=[watch, callback], **options)
    tolerance = {"32-true": 1e-6, "bf16-mixed": 1e-2, "bf16-true": 5e-2}[precision]  # torch rounds a norm of bfloat16
    torch.testing.assert_close(torch.tensor(module.losses), torch.tensor(plain.losses), rtol=tolerance, atol=0)
    assert trainer.global_step == STEPS == len(watch.norms) and min(watch.norms) > 0.05
    assert monitor.last["step"] == STEPS - 1 and monitor.last["clipped"]
    torch.testing.assert_close(monitor.last["loss"], module.losses[-1], rtol=1e-2, atol=0)
    assert callback.stats.names == ("body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias")
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        assert not getattr(trainer.optimizers[0], hooks)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_float16_with_a_grad_scaler(optimizer):
    """Fused optimizers too, of which Trainer(gradient_clip_val=...) says that they cannot be clipped."""

    def fitted(name, callbacks, broken=(), **options):
        from lightning.pytorch.plugins import MixedPrecision

        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
        module = lightning_module(OPTIMIZERS[name], lambda index: math.inf if index in broken else 1)
        plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
        trainer = lightning_trainer(callbacks=callbacks, plugins=plugins, **options)
        trainer.fit(module, data(loud=1))  # float16 holds no loss of 6,000 times a scale
        return module, scaler

    callback = ClipCallback(0.05)
    module, scaler = fitted(optimizer, [callback])
    plain, _ = fitted("AdamW" if "AdamW" in optimizer else optimizer, [], gradient_clip_val=0.05)
    torch.testing.assert_close(torch.tensor(module.losses), torch.tensor(plain.losses), rtol=1e-4, atol=0)
    assert callback.stats.total_norm > 0.05 and callback.stats.limit.item() == pytest.approx(0.05)
    module, scaler = fitted(optimizer, [callback], broken=(3, 4))
    assert scaler.get_scale() == 2.0**8 and all(p.isfinite().all() for p in module.parameters())
    if optimizer == "fused AdamW":
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            fitted(optimizer, [], gradient_clip_val=0.05)


def test_a_training_that_goes_on_from_a_checkpoint(tmp_path):
    """With a rule that remembers: to the last bit what it would have been without the stop."""

    def fitted(epochs, path=None):
        module, callback = lightning_module(OPTIMIZERS["fused AdamW"]), ClipCallback(rules.ZClip(warmup=4))
        trainer = lightning_trainer(-1, max_epochs=epochs, callbacks=[callback])
        trainer.fit(module, data(4), ckpt_path=path)
        return module, trainer, callback

    whole, _, expected = fitted(5)
    first, trainer, _ = fitted(3)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed, _, found = fitted(5, tmp_path / "last.ckpt")
    assert first.losses + resumed.losses == whole.losses
    assert str(found.state_dict()) == str(expected.state_dict())
    other = lightning_trainer(20, callbacks=[ClipCallback(rules.AutoClip())])
    other.callbacks[-1].load_state_dict({"clippers": []})
    with pytest.raises(ValueError, match="saved by ZClip"):
        other.callbacks[-1].load_state_dict(found.state_dict())


def test_a_second_fit_goes_on_with_what_the_rule_remembers():
    callback = ClipCallback(rules.ZClip())
    for _ in range(2):
        lightning_trainer(5, callbacks=[callback]).fit(lightning_module(), data())
    assert callback.state_dict()["clippers"][0]["steps"] == 10


class TwoOptimizers(lightning.LightningModule):
    """Manual optimization, as a GAN has it."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.one, self.other = network(), network()

    def configure_optimizers(self):
        return [torch.optim.SGD(m.parameters(), lr=0.01, fused=True) for m in (self.one, self.other)]

    def training_step(self, x, index):
        for model, optimizer in zip((self.one, self.other), self.optimizers()):
            optimizer.zero_grad()
            self.manual_backward((1 if model is self.one else 3) * loss_of(model, x))
            optimizer.step()


def test_several_optimizers_in_manual_optimization():
    monitors = [fastclip.monitor.GradMonitor(), fastclip.monitor.GradMonitor()]
    callback = ClipCallback(rules.ZClip(warmup=3), monitors)
    trainer = lightning_trainer(12, callbacks=[callback])
    module = TwoOptimizers()
    trainer.fit(module, data())
    one, other = callback.state_dict()["clippers"]
    assert one["steps"] == other["steps"] == 6
    assert one["rules"][0]["mean"] != other["rules"][0]["mean"]
    assert monitors[0].last["step"] == monitors[1].last["step"] == 5
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    clipper = fastclip.Clipper(model.parameters(), rules.ZClip(warmup=3))
    for x in batches(6):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        clipper.step(optimizer)
    for p, q in zip(module.one.parameters(), model.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_parameters_that_are_added_while_training():
    class Unfreeze(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:
                trainer.optimizers[0].add_param_group({"params": list(pl_module.body[2].parameters())})

    module = lightning_module()
    module.configure_optimizers = lambda: torch.optim.SGD(module.body[0].parameters(), lr=0.01, fused=True)
    callback = ClipCallback(0.05)
    lightning_trainer(6, callbacks=[Unfreeze(), callback]).fit(module, data())
    assert callback.stats.names == ("body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias")


def test_a_step_that_fails_leaves_nothing_behind():
    module = lightning_module(factor=lambda index: 1 / (2 - index))
    callback = ClipCallback(0.05)
    trainer = lightning_trainer(6, callbacks=[callback])
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, data())
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


def test_bad_arguments():
    with pytest.raises(TypeError, match="rule"):
        ClipCallback("ZClip")
    with pytest.raises(TypeError, match="monitor must be"):
        ClipCallback(1.0, "run.jsonl")
    with pytest.raises(ValueError, match="nonfinite must be"):
        ClipCallback(1.0, nonfinite="ignore")
    with pytest.raises(ValueError, match="gradient_clip_val must be left out"):
        trained(callbacks=[ClipCallback(1.0)], gradient_clip_val=1.0)
    with pytest.raises(ValueError, match="2 monitors, and 1 optimizers"):
        trained(callbacks=[ClipCallback(1.0, [fastclip.monitor.GradMonitor() for _ in range(2)])])
    OPTIMIZERS["clips"] = lambda ps: fastclip.optim.SGD(ps, lr=0.1, max_norm=1.0)
    OPTIMIZERS["LBFGS"] = torch.optim.LBFGS
    try:
        with pytest.raises(ValueError, match="clipped twice"):
            trained("clips", callbacks=[ClipCallback(1.0)])
        with pytest.raises(TypeError, match="closure"):
            trained("LBFGS", callbacks=[ClipCallback(1.0)])
    finally:
        del OPTIMIZERS["clips"], OPTIMIZERS["LBFGS"]


def test_the_monitor_logs_to_the_trainers_logger(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    monitor = fastclip.monitor.GradMonitor(log=logger, log_every=1)
    trained(callbacks=[ClipCallback(0.05, monitor)], logger=logger)
    monitor.close()
    logger.save()
    (metrics,) = tmp_path.rglob("metrics.csv")
    header, *rows = metrics.read_text().splitlines()
    assert {"grad/norm", "grad/coef", "loss", "step"} <= set(header.split(",")) and len(rows) == STEPS


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fabric(name, precision):
    from lightning.fabric import Fabric
    from lightning.fabric.plugins import MixedPrecision

    def losses(name, clips_by_fabric):
        scaled = precision == "16-mixed"
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if scaled else []
        fabric = Fabric(accelerator="cpu", devices=1, plugins=plugins)
        model = network()
        model, optimizer = fabric.setup(model, OPTIMIZERS[name](model.parameters()))
        clipper = fastclip.Clipper(model.named_parameters(), 0.05)
        found = []
        for x in batches(loud=1 if scaled else 20):
            loss = loss_of(model, x)
            fabric.backward(loss)
            if clips_by_fabric:
                fabric.clip_gradients(model, optimizer, max_norm=0.05)
                optimizer.step()
            else:
                stats = clipper.step(optimizer)
                assert stats.clipped and stats.total_norm > 0.05
            optimizer.zero_grad()
            found.append(loss.item())
        return torch.tensor(found)

    same = "AdamW" if precision == "16-mixed" and "AdamW" in name else name  # Fabric clips no fused one then
    tolerance = 1e-6 if precision == "32-true" else 1e-4
    torch.testing.assert_close(losses(name, False), losses(same, True), rtol=tolerance, atol=0)
