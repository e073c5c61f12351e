"""What every backend must do, over the cases that all tests share."""

import math

import pytest
import torch
from cases import CASES, DTYPES, assert_scaled, assert_within, compute_dtype, parameter, rounding, tensor_norm, wide

from fastclip.backends.base import GradGroup
from fastclip.gradients.pack import pack

NORMS = (2.0, 1.0, math.inf, 3.0, 0.0)
LAYOUTS = [name for name in CASES if name not in ("gaps", "columns")]  # which go to the reference backend


class BackendConformance:
    """Derive, and set `backend` to the module; `layouts` to fewer cases, where a backend is slow without its device."""

    backend = None
    layouts = LAYOUTS

    def groups(self, tensors):
        """Groups of `tensors` as the pipeline makes them, for this backend."""
        table = pack([parameter(t) for t in tensors], gradients=False, write=True)
        return [GradGroup(self.backend, g.positions, g.tensors, g.native) for g in table.groups]

    def all_groups(self, dtype):
        """Those of each case in turn."""
        for case in self.layouts:
            yield from self.groups([p.grad for p in CASES[case](dtype=dtype, device="cpu")])

    def test_says_where_it_runs(self):
        assert self.backend.why_not(torch.device("cpu")) is None
        assert "meta" in (self.backend.why_not(torch.device("meta")) or "meta")
        assert isinstance(self.backend.describe(), str) and isinstance(self.backend.name, str)

    @pytest.mark.parametrize("p", NORMS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_measure(self, dtype, p):
        """Power sums to 2e-6 (the norm's promised 1e-6), maxima exactly."""
        for group in self.all_groups(dtype):
            measured = self.backend.measure(group, p)
            assert measured.power.dtype == measured.absmax.dtype == torch.float64
            exact = wide(group.tensors)
            maxima = torch.tensor([tensor_norm(t, math.inf) for t in exact], dtype=torch.float64)
            assert torch.equal(measured.absmax, maxima)
            if not math.isinf(p):
                powers = torch.tensor([tensor_norm(t, p) ** (p or 1) for t in exact], dtype=torch.float64)
                assert_within(measured.power, powers, powers * max(2.0, p) * 1e-6)
            if measured.norm32 is not None:
                assert torch.equal(measured.norm32, measured.norm.float())
            again = self.backend.measure(group, p)
            assert torch.equal(again.power, measured.power) and torch.equal(again.absmax, measured.absmax)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_measure_tells_what_is_not_finite(self, dtype):
        (group,) = self.groups([torch.tensor(v).to(dtype) for v in ([1.0, -math.inf], [math.nan, 2.0], [3.0, 4.0])])
        measured = self.backend.measure(group, 2.0)
        assert measured.power[0] == math.inf and measured.power[1].isnan() and measured.power[2] == 25
        assert measured.absmax[0] == math.inf and measured.absmax[1].isnan() and measured.absmax[2] == 4

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_apply(self, dtype):
        for each in (False, True):
            for group in self.all_groups(dtype):
                before = wide(group.tensors)
                coefs = (
                    torch.linspace(0.1, 0.9, len(group), dtype=torch.float64) if each else torch.tensor(0.3).double()
                )
                self.backend.apply_(group, coefs)
                assert_scaled(group.tensors, before, coefs.expand(len(group)).tolist(), dtype, rounding(dtype))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_apply_knows_three_coefficients(self, dtype):
        """1 writes nothing, +0 writes zeros whatever is there, -0 multiplies."""
        values = torch.tensor([1.0, math.inf, math.nan]).to(dtype)
        (group,) = self.groups([values.clone() for _ in range(3)])
        versions = [t._version for t in group.tensors]
        self.backend.apply_(group, torch.tensor([1.0, 0.0, -0.0], dtype=torch.float64))
        kept, zeros, product = group.tensors
        assert torch.equal(kept.nan_to_num(7.0), values.nan_to_num(7.0)) and versions[0] <= kept._version
        assert not zeros.any() and product[0] == 0 and product[1:].isnan().all()

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_clamp(self, dtype):
        for group in self.all_groups(dtype):
            before = wide(group.tensors)
            low, high = torch.tensor([-0.5, 0.25], dtype=compute_dtype(dtype)).tolist()
            changed = self.backend.clamp_(group, low, high)
            expected = [t.clamp(low, high) for t in before]
            assert bool(changed) == any(not torch.equal(a, b) for a, b in zip(before, expected))
            assert all(torch.equal(t, e) for t, e in zip(wide(group.tensors), expected))
            assert not self.backend.clamp_(group, low, high)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_repair(self, dtype):
        bad = torch.tensor([1.0, math.nan, 2.0, -math.inf, math.inf]).to(dtype)
        (group,) = self.groups([bad.clone(), torch.full((3,), 3.0).to(dtype)])
        measured, counts = self.backend.repair_(group, self.backend.measure(group, 2.0), 2.0)
        assert counts.tolist() == [3, 0] and group.tensors[0].tolist() == [1, 0, 2, 0, 0]
        assert measured.power.tolist() == pytest.approx([5, 27], rel=2**-22)  # by way of a float32 norm, maybe
        assert measured.absmax.tolist() == [2, 3]
