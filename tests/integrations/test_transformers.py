"""Hugging Face's Trainer: checkpoints, logs, and the clip inside its default optimizer's step."""

import json
from pathlib import Path

import pytest
import torch
from trainings import hf_losses, hf_trainer
from transformers import TrainerCallback

import fastclip
from fastclip import rules
from fastclip.integrations.transformers import ClipCallback, attach

pytestmark = pytest.mark.usefixtures("quiet_frameworks")


class Reporter(TrainerCallback):
    """As those that report to TensorBoard and the like: takes the logs as they are in its turn."""

    def __init__(self):
        self.logs, self.norms = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())


def test_the_default_optimizer_takes_the_clip_into_its_step(tmp_path):
    plain, trainer = hf_trainer(tmp_path), hf_trainer(tmp_path)
    assert trainer.args.optim == "adamw_torch_fused"
    seen = Reporter()
    trainer.add_callback(seen)
    attach(trainer)
    plain.train()
    trainer.train()
    torch.testing.assert_close(torch.tensor(hf_losses(trainer)), torch.tensor(hf_losses(plain)), rtol=1e-6, atol=0)
    norms = [[line["grad_norm"] for line in t.state.log_history if "grad_norm" in line] for t in (trainer, plain)]
    torch.testing.assert_close(*map(torch.tensor, norms), rtol=1e-6, atol=0)
    assert min(seen.norms) > trainer.args.max_grad_norm  # not clipped before the step


@pytest.mark.parametrize("watched", [True, False])
def test_numbers_come_into_the_logs_before_reporters_run(tmp_path, watched):
    reporter = Reporter()
    trainer = hf_trainer(tmp_path, callbacks=[reporter])
    monitor = fastclip.monitor.GradMonitor(tmp_path / "run.jsonl") if watched else None
    attach(trainer, monitor=monitor)
    trainer.train()
    steps = [logs for logs in reporter.logs if "loss" in logs]
    assert len(steps) == 12
    for logs in steps:
        assert logs["grad/limit"] == pytest.approx(0.05) and 0 < logs["grad/coef"] < 1
        assert ("grad/clip_rate" in logs) is watched
        if watched:
            assert logs["grad/clip_rate"] == 1 and logs["grad/skips"] == 0
    assert not any("grad/coef" in logs for logs in reporter.logs if "loss" not in logs)
    if watched:
        monitor.close()
        names = json.loads((tmp_path / "run.jsonl").read_text().splitlines()[0])["rows"]
        assert "body.0.weight" in names


@pytest.mark.parametrize("restore", [False, True])
def test_a_training_that_goes_on_from_a_checkpoint(tmp_path, restore):
    """With a rule that remembers: to the last bit what it would have been without the stop."""
    options = {"save_steps": 8, "restore_callback_states_from_checkpoint": restore}

    def trained(folder, steps, **resume):
        trainer = hf_trainer(folder, steps=steps, **options)
        trainer.args.save_strategy = "steps"
        attached = attach(trainer, rule=[rules.ZClip(warmup=4), 0.5])
        trainer.train(**resume)
        assert isinstance(trainer.callback_handler.callbacks[0], ClipCallback)
        assert sum(isinstance(each, ClipCallback) for each in trainer.callback_handler.callbacks) == 1
        return trainer, attached

    whole, expected = trained(tmp_path / "whole", 14)
    trained(tmp_path / "parts", 8)
    resumed, found = trained(tmp_path / "parts", 14, resume_from_checkpoint=True)
    assert hf_losses(resumed) == hf_losses(whole)
    assert str(found.state_dict()) == str(expected.state_dict())
    saved = json.loads(Path(tmp_path / "parts" / "checkpoint-8" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["ClipCallback"]["attributes"]["memory"]["sets"][0]["steps"] == 8


def test_only_measured_where_the_trainer_does_not_clip(tmp_path):
    trainer = hf_trainer(tmp_path)
    trainer.args.max_grad_norm = 0
    attached = attach(trainer, rule=1e-9)
    trainer.train()
    assert attached.stats is None and hf_losses(trainer)[3] > 0


def test_an_accelerator_that_is_made_anew(tmp_path):
    """As where batches are made smaller until they fit."""
    trainer = hf_trainer(tmp_path)
    attached = attach(trainer)
    trainer.create_accelerator_and_postprocess()
    trainer.train()
    assert attached.accelerator is trainer.accelerator and attached.stats is not None


def test_gradients_on_several_meshes(tmp_path):
    """For which the Trainer does not ask its Accelerator."""
    trainer = hf_trainer(tmp_path)
    trainer._has_mixed_mesh_grads = lambda model: True
    attached = attach(trainer, rule=0.01)
    trainer.train()
    assert attached.stats.limit == pytest.approx(0.01)
    attached.detach()
    assert "_mixed_mesh_grad_norm" not in vars(trainer)


def test_a_rule_may_change_where_nothing_was_remembered(tmp_path):
    trainer = hf_trainer(tmp_path, steps=4)
    trainer.args.save_strategy, trainer.args.save_steps, trainer.state.save_steps = "steps", 4, 4
    attach(trainer)
    trainer.train()
    resumed = hf_trainer(tmp_path, steps=8)
    attached = attach(resumed, rule=lambda limit: [rules.ZClip(), limit])
    resumed.train(resume_from_checkpoint=True)
    assert attached.state_dict()["sets"][0]["steps"] == 8


def test_attached_twice(tmp_path):
    trainer = hf_trainer(tmp_path)
    first, second = attach(trainer, 1.0), attach(trainer, 0.5)
    trainer.train()
    assert first.stats is None and second.stats.limit == 0.5
    assert sum(isinstance(each, ClipCallback) for each in trainer.callback_handler.callbacks) == 1


def test_bad_arguments(tmp_path):
    with pytest.raises(TypeError, match="trainer must be"):
        attach(None)
    trainer = hf_trainer(tmp_path, callbacks=[ClipCallback()])
    with pytest.raises(RuntimeError, match="nothing is attached"):
        trainer.train()
