"""What every rule must do."""

import copy
import math

import pytest
import torch
from cases import gradients, parameter

import fastclip
from fastclip.rules import Except, Only

SHAPES = ((6,), (3, 5), (), (40,))


def parameters(step, scale=1.0):
    """Named parameters with gradients that differ from step to step, every fifth time much larger."""
    generator = torch.Generator().manual_seed(step)
    loud = 50.0 if step % 5 == 4 else 1.0
    made = {}
    for i, shape in enumerate(SHAPES):
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        made[f"p{i}"] = parameter(torch.randn(shape, generator=generator, dtype=torch.float64) * (loud * scale), value)
    return made


def take(clipper, ps, step):
    """One step of a Clipper over `ps`, with the gradients and values of `step`."""
    for p, fresh in zip(ps.values(), parameters(step).values()):
        p.data.copy_(fresh.data)
        p.grad = fresh.grad
    clipper.clip_()
    return [g.clone() for g in gradients(ps.values())]


class RuleConformance:
    """Derive, and set `make` to a function without arguments that gives a new rule of the kind."""

    @staticmethod
    def make():
        raise NotImplementedError

    def clipper(self, ps, rule=None):
        return fastclip.Clipper(ps.items(), self.make() if rule is None else rule)

    def test_shrinks_or_zeroes_and_nothing_else(self, backend):
        """No gradient grows or turns round, and what is not finite stays so or becomes 0."""
        ps = parameters(0)
        clipper = self.clipper(ps)
        for step in range(8):
            before = [fresh.grad for fresh in parameters(step).values()]
            for old, new in zip(before, take(clipper, ps, step)):
                assert (new.abs() <= old.abs() * (1 + 1e-12)).all() and (new * old >= 0).all()

    def test_gradients_of_zeros_stay_zeros(self, backend):
        ps = parameters(0, scale=0.0)
        stats = self.clipper(ps).clip_()
        assert not any(g.any() for g in gradients(ps.values()))
        assert stats.total_norm == 0 and not stats.nonfinite.any()

    def test_says_what_it_did(self, backend):
        """``stats.clipped`` is whether a gradient changed, and coefficients that are not 1 changed theirs."""
        ps = parameters(0)
        clipper = self.clipper(ps)
        for step in range(8):
            for p, fresh in zip(ps.values(), parameters(step).values()):
                p.data.copy_(fresh.data)
                p.grad = fresh.grad
            before = [g.clone() for g in gradients(ps.values())]
            stats = clipper.clip_()
            changed = [not torch.equal(a, b) for a, b in zip(before, gradients(ps.values()))]
            assert bool(stats.clipped) == any(changed)
            if not clipper.rules[0].in_place:
                assert (stats.coef.expand(len(ps)) != 1).tolist() == changed

    def test_a_skipped_step_changes_and_teaches_nothing(self):
        ps, others = parameters(0), parameters(0)
        clipper, other = self.clipper(ps), self.clipper(others)
        optimizer = torch.optim.SGD(ps.values(), lr=0.0)
        for step in range(4):
            take(clipper, ps, step)
            before = [p.detach().clone() for p in ps.values()]
            clipper.step(optimizer, when=False)
            assert all(torch.equal(p, b) for p, b in zip(ps.values(), before))
            take(other, others, step)
        for a, b in zip(clipper.rules, other.rules):
            torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)

    def test_goes_on_from_a_saved_state(self):
        ps, others = parameters(0), parameters(0)
        straight, first, second = self.clipper(ps), self.clipper(others), self.clipper(others)
        for step in range(6):
            take(straight, ps, step)
            take(first, others, step)
        saved = copy.deepcopy(first.state_dict())
        second.load_state_dict(saved)
        for step in range(6, 12):
            for a, b in zip(take(straight, ps, step), take(second, others, step)):
                assert torch.equal(a, b)
        torch.testing.assert_close(first.state_dict(), saved, rtol=0, atol=0)  # which was a copy

    def test_a_state_that_is_not_its_own_is_refused(self):
        ps = parameters(0)
        clipper = self.clipper(ps)
        saved = clipper.state_dict()
        with pytest.raises(ValueError, match="state_dict"):
            clipper.load_state_dict({**saved, "rules": [{"nobody's": torch.ones(())}]})

    @pytest.mark.parametrize("wrapper", [Only, Except])
    def test_for_some_of_the_parameters(self, wrapper):
        """As if the others were not there; and they are left alone."""
        ps, alone = parameters(0), parameters(0)
        chosen = {name: p for name, p in alone.items() if (name in ("p0", "p2")) is (wrapper is Only)}
        clipper, other = self.clipper(ps, wrapper(self.make(), ["p0", "p2"])), self.clipper(chosen)
        for step in range(8):
            take(clipper, ps, step)
            for name, fresh in parameters(step).items():
                alone[name].data.copy_(fresh.data)
                alone[name].grad = fresh.grad
            other.clip_()
            for name, p in ps.items():
                torch.testing.assert_close(p.grad, alone[name].grad, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("optimizer", [torch.optim.SGD, fastclip.optim.SGD])
    def test_inside_an_optimizer_as_clip_then_step(self, optimizer):
        ps, others = parameters(0), parameters(0)
        clipper, other = self.clipper(ps), self.clipper(others)
        ours, theirs = optimizer(ps.values(), lr=0.5), torch.optim.SGD(others.values(), lr=0.5)
        for step in range(8):
            for side in (ps, others):
                for p, fresh in zip(side.values(), parameters(step).values()):
                    p.data.copy_(fresh.data)
                    p.grad = fresh.grad
            clipper.step(ours)
            other.clip_()
            theirs.step()
            for a, b in zip(ps.values(), others.values()):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    def test_what_it_needs_is_what_it_reads(self):
        """The norm type is one that a read gives, and `repr` makes a rule recognizable."""
        rule = self.make()
        assert isinstance(rule, fastclip.rules.Rule)
        assert rule.norm_type is None or rule.norm_type >= 0 or math.isinf(rule.norm_type)
        assert isinstance(rule.needs, fastclip.rules.Needs) and type(rule).__name__ in repr(rule)
