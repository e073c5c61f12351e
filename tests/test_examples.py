"""The examples, with few steps: that they do what they say, and that it works."""

import importlib.util
import math
import pathlib
import sys

import pytest
import torch

from fastclip.__main__ import main as fastclip_main

for module in ("matplotlib", "sklearn", "tabulate", "tqdm"):
    pytest.importorskip(module)

pytestmark = pytest.mark.usefixtures("one_thread")
FOLDER = pathlib.Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


amp_accumulate = load("amp_accumulate")
sys.modules["demo"] = load("demo")  # which its neighbour imports
steady_training = load("steady_training")
step_in_backward = load("step_in_backward")
threshold_training = load("threshold_training")
to_convergence = load("to_convergence")
watch_training = load("watch_training")


def copies(model):
    return [p.detach().clone() for p in model.parameters()]


def changed(model, before):
    return torch.tensor([not torch.equal(p, q) for p, q in zip(model.parameters(), before)])


def learner_with(threshold, mask=0.0, hold=False):
    rules = [threshold_training.Mask(mask, freeze=hold), threshold_training.TensorNorm(0.3)]
    return threshold_training.Learner(threshold, rules, 0, "cpu")


def batches():
    images, labels, _, _ = threshold_training.load(0, "cpu")
    return threshold_training.shuffled(images, labels)


def test_steps_only_above_the_threshold():
    learner = learner_with(threshold=0.5)
    skips = 0
    for _ in range(8):
        for batch in batches():
            before = copies(learner.model)
            done = learner.train([batch])
            skips += done.skipped.item()
            assert done.skipped.item() == (done.losses.item() <= 0.5)
            assert changed(learner.model, before).any() == (not done.skipped)
    assert 0 < skips < 8 * 15


@pytest.mark.parametrize("hold", [False, True])
def test_hold_keeps_masked_parameters(hold):
    learner = learner_with(threshold=0.0, mask=2e-2, hold=hold)
    masks = 0
    for batch in [*batches(), *batches()]:
        before = copies(learner.model)
        masked = learner.train([batch]).masked[0]
        masks += masked.sum().item()
        absmax = torch.tensor([p.grad.abs().max() for p in learner.model.parameters()])
        assert torch.equal(absmax == 0, masked)
        # Without hold, momentum and weight decay move a parameter whose gradient is zero.
        assert torch.equal(changed(learner.model, before), ~masked if hold else torch.ones_like(masked))
    assert masks > 0


def test_threshold_training(capsys):
    accuracies = threshold_training.main(["--epochs", "16", "--device", "cpu"])
    assert min(accuracies.values()) > 0.94
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("with thresholds: ") and lines[-1].endswith("240 steps of 240")


def test_steady_training(capsys):
    mean, ensemble = steady_training.main(["--epochs", "10", "--members", "3", "--device", "cpu"])
    # By Jensen's inequality, whatever the members are.
    assert ensemble.last_loss <= mean.last_loss and ensemble.averaged_loss <= mean.averaged_loss
    assert ensemble.averaged_accuracy >= max(mean.averaged_accuracy, 0.95)
    assert "ensemble" in capsys.readouterr().out


def test_member():
    images, labels, _, _ = steady_training.load(0, "cpu")
    with steady_training.tqdm(disable=True) as bar:
        first, again, other = (steady_training.train(images, labels, 2, seed, bar) for seed in (0, 0, 1))
    assert len(first.norms) == 2 * 15
    assert torch.equal(first.clipped, first.norms > steady_training.MAX_NORM) and first.clipped.any()
    assert torch.equal(first.norms, again.norms) and not torch.equal(first.norms, other.norms)
    # Of two epochs the second is averaged: one set of weights.
    assert not changed(first.averaged, copies(first.last)).any()


def test_best_weights_are_restored(monkeypatch):
    monkeypatch.setattr(to_convergence, "STOP_AFTER", 1)  # so that the last epoch is not the best
    training, validation, _ = to_convergence.load(0, "cpu")
    model = to_convergence.Network()
    history = to_convergence.train(model, training, validation, max_norm=1.0, max_epochs=100)
    losses = [epoch.validation for epoch in history]
    assert len(losses) < 100 and losses[-1] > min(losses)
    assert to_convergence.evaluate(model, validation)[0] == pytest.approx(min(losses), rel=1e-5)


def test_rate_falls_on_a_plateau(monkeypatch):
    monkeypatch.setattr(to_convergence, "PATIENCE", 0)
    training, validation, _ = to_convergence.load(0, "cpu")
    history = to_convergence.train(to_convergence.Network(), training, validation, max_norm=1.0, max_epochs=12)
    for i in range(1, len(history)):
        best = min(epoch.validation for epoch in history[:i])
        assert (history[i].lr < history[i - 1].lr) == (history[i - 1].validation > best)


def test_to_convergence(tmp_path, capsys):
    picture = tmp_path / "picture.png"
    assert to_convergence.main(["--max-epochs", "6", "--output", str(picture), "--device", "cpu"]) > 0.9
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.splitlines()[-1] == f"Picture: {picture}"


def test_same_losses_as_whole_batches(capsys):
    half, single, whole = amp_accumulate.main(["--steps", "60", "--device", "cpu"]).values()
    assert amp_accumulate.difference(single, whole) < 1e-3
    assert amp_accumulate.difference(half, whole) < 2e-2
    assert whole.losses[-10:].mean() < 0.6 * whole.losses[0]
    # The scale grew until something overflowed; the other runs left the same steps out.
    assert max(half.scales) > 2**16 and half.skipped.any()
    assert torch.equal(half.skipped, ~half.norms.isfinite())
    assert torch.equal(half.skipped, single.skipped) and torch.equal(half.skipped, whole.skipped)
    assert single.norms.isfinite().all() and whole.clipped.any()
    assert "float16, 4 parts" in capsys.readouterr().out


def test_step_in_backward(tmp_path, capsys):
    path = tmp_path / "out.png"
    after, within = step_in_backward.main(["--steps", "12", "--device", "cpu", "--out", str(path)]).values()
    assert after.losses[0] == within.losses[0] and after.losses[-1] == pytest.approx(within.losses[-1], rel=0.02)
    assert max(within.gradient_bytes) < 0.1 * max(after.gradient_bytes) and within.gradient_bytes[-1] == 0
    assert path.stat().st_size > 10_000 and "step in backward" in capsys.readouterr().out


def test_refuses_unequal_parts(capsys):
    with pytest.raises(SystemExit):
        amp_accumulate.main(["--parts", "3"])
    assert "--parts must divide 32" in capsys.readouterr().err


def test_a_bad_day_under_two_rules(tmp_path, capsys):
    arguments = ["--steps", "150", "--spike", "120", "--nan", "140", "--rules", "unclipped", "ZClip", "--device", "cpu"]
    runs = watch_training.main([*arguments, "--folder", str(tmp_path)])
    unclipped, zclip = runs["unclipped"], runs["ZClip"]
    assert unclipped.norms[120] > 20 * max(unclipped.norms[:120]) and math.isnan(unclipped.validation[-1])
    assert max(zclip.clipped[120:140]) < 10 and math.isnan(zclip.clipped[140]) and zclip.skips == 1
    assert zclip.validation[-1] < 1 and zclip.accuracy > 0.75 > 0.2 > unclipped.accuracy
    assert any("step 120" in said and "times its recent median" in said for said in zclip.warnings)
    said = capsys.readouterr().out
    assert "unclipped, step 140: 6 of 6 gradients were not finite" in said
    assert (tmp_path / "watch.png").read_bytes().startswith(b"\x89PNG")
    assert fastclip_main(["plot", str(tmp_path / "ZClip.jsonl")]) == 0
    assert (tmp_path / "ZClip.png").stat().st_size > 20_000
