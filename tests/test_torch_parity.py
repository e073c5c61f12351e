"""torch's behaviour, row by row: equal where torch is right, float64 where it is not."""

import math

import pytest
import torch
from cases import (
    NORM_ERROR,
    assert_agrees,
    assert_scaled,
    clip_factor,
    clipping,
    gradients,
    parameter,
    rounding,
    tensor_norm,
    total_norm,
    wide,
)

import fastclip

pytestmark = pytest.mark.isa
torch_clip = torch.nn.utils.clip_grad_norm_
inf, nan = math.inf, math.nan


def assert_clipped_as_by_torch(ours, limit):
    """The norm and the gradients are torch's, to our error and torch's own, which torch in float64 tells."""
    theirs, exact = [parameter(p.grad.clone()) for p in ours], list(map(parameter, wide(gradients(ours))))
    norms = [fastclip.clip_norm_(ours, limit), torch_clip(theirs, limit), torch_clip(exact, limit)]
    assert norms[0].dtype == norms[1].dtype
    assert_agrees(*norms, NORM_ERROR)
    for p, q, e in zip(ours, theirs, exact):
        assert_agrees(p.grad, q.grad, e.grad, clipping(p.grad.dtype))


@pytest.mark.parametrize(
    ("values", "limit"),
    [
        (([0.0, 0.0], [0.0]), 1.0),  # all zero
        (([3.0, 4.0],), 5.0),  # norm == max_norm: 1e-6 still shrinks it
        (([3.0, 4.0],), 0.0),  # max_norm 0 zeroes
        (([3.0, 4.0], [12.0]), 1.0),
        (([3.0, 4.0], [12.0]), 100.0),
        (([3.0, 4.0, inf], [1.0, -2.0]), 1.0),  # one inf: that element NaN, the others 0
        (([3.0, -inf], [1.0]), 1.0),
        (([3.0, nan], [1.0, 2.0]), 1.0),  # one NaN: all NaN
        (([nan, inf], [1.0, 2.0]), 1.0),
        (([3.0, 4.0, 1.0],), inf),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_as_torch(backend, values, limit, dtype):
    assert_clipped_as_by_torch([parameter(torch.tensor(v, dtype=dtype)) for v in values], limit)


def test_norm_equal_to_the_limit_still_shrinks(backend):
    p = parameter(torch.full((4,), 0.5))
    fastclip.clip_norm_([p], 1.0)
    assert_scaled([p.grad], [torch.full((4,), 0.5)], [1 / (1 + 1e-6)], relative=rounding(torch.float32))
    assert (p.grad < 0.5).all()


@pytest.mark.parametrize("value", [inf, nan])
def test_infinite_limit_touches_nothing(backend, value):
    p = parameter(torch.tensor([1.0, value]))
    norm = fastclip.clip_norm_([p], inf)
    assert torch.equal(p.grad[:1], torch.ones(1)) and not norm.isfinite()
    torch.testing.assert_close(p.grad[1].item(), value, equal_nan=True)


@pytest.mark.parametrize("limit", [-1.0, nan, -inf])
def test_torch_accepts_nonsense_limits_fastclip_does_not(backend, limit):
    p = parameter(torch.ones(3))
    with pytest.raises(ValueError, match="max_norm must be >= 0"):
        fastclip.clip_norm_([p], limit)
    assert torch.equal(p.grad, torch.ones(3))


@pytest.mark.parametrize("value", [inf, nan])
def test_error_if_nonfinite(backend, value):
    ours, theirs = ([parameter(torch.tensor(v)) for v in ([1.0, value], [2.0])] for _ in range(2))
    with pytest.raises(RuntimeError, match="nothing was changed"):
        fastclip.clip_norm_(ours, 1.0, error_if_nonfinite=True)
    with pytest.raises(RuntimeError):
        torch_clip(theirs, 1.0, error_if_nonfinite=True)
    torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=0, atol=0, equal_nan=True)
    with pytest.raises(RuntimeError):
        fastclip.total_norm(gradients(ours), error_if_nonfinite=True)
    assert fastclip.clip_norm_([parameter(torch.tensor([1.0]))], 2.0, error_if_nonfinite=True).item() == 1


def test_finite_gradients_whose_squares_overflow(backend):
    p = parameter(torch.full((4,), 1e20))
    assert torch_clip([parameter(torch.full((4,), 1e20))], 1.0).isinf()
    assert fastclip.clip_norm_([p], 1.0).item() == pytest.approx(2e20, rel=1e-6)
    assert_scaled([p.grad], [torch.full((4,), 0.5)], [1.0], torch.float32)


@pytest.mark.parametrize(("shape", "value"), [((300,), 60_000.0), ((300, 70_000), 100.0)])
def test_float16_norm_beyond_float16(backend, shape, value):
    """Where the norm is beyond 65504 torch returns inf and zeroes every gradient."""
    p, twin = (parameter(torch.full(shape, value, dtype=torch.float16)) for _ in range(2))
    assert torch_clip([twin], 1000.0).isinf()
    assert not twin.grad.any()
    before = wide([p.grad])
    expected = before[0].flatten()[0].item() * math.sqrt(p.numel())
    assert fastclip.clip_norm_([p], 1000.0).item() == pytest.approx(expected, rel=1e-6)
    assert_scaled([p.grad], before, [clip_factor(expected, 1000.0)], torch.float16)


def test_norm_beyond_float32_still_clips_right(backend):
    p = parameter(torch.full((9,), 3e38))
    assert fastclip.clip_norm_([p], 3.0).isinf()  # float32 cannot hold 9e38 ...
    assert_scaled([p.grad], [torch.ones(9)], [1.0], torch.float32)  # ... but the coefficient is right


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_norm_is_not_rounded(backend, dtype):
    p = parameter(torch.randn(200_000).to(dtype))
    norm = fastclip.clip_norm_([p], 1e9)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(total_norm(wide([p.grad])), rel=1e-6)


def test_no_gradients(backend):
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    assert torch.equal(fastclip.clip_norm_([p], 1.0), torch.tensor(0.0))
    assert torch.equal(fastclip.clip_norm_([], 1.0), torch.tensor(0.0))
    assert torch.equal(fastclip.total_norm([]), torch.tensor(0.0))
    assert fastclip.clip_tensor_norm_([p], 1.0).shape == (0,)
    assert fastclip.mask_small_([p], 1.0).shape == (0,)
    frozen = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
    assert fastclip.clip_norm_([frozen], 1.0).item() == 0


def test_exhausted_generator_warns_as_torch_does(backend):
    """In its words and its category, by which people filter; and it points at the caller."""
    generator = (p for p in ())
    calls = {
        "clip_norm_": lambda: fastclip.clip_norm_(generator, 1.0),
        "clip_value_": lambda: fastclip.clip_value_(generator, 1.0),
        "clip_tensor_norm_": lambda: fastclip.clip_tensor_norm_(generator, 1.0),
        "mask_small_": lambda: fastclip.mask_small_(generator, 1.0),
        "clip_with_norm_": lambda: fastclip.clip_with_norm_(generator, 1.0, torch.tensor(1.0)),
        "Clipper": lambda: fastclip.Clipper(generator, 1.0),
    }
    with pytest.warns(UserWarning, match="empty generator") as torchs:
        torch.nn.utils.clip_grad_norm_(generator, 1.0)
    for name, call in calls.items():
        with pytest.warns(UserWarning, match="empty generator") as warned:
            call()
        assert [str(w.message) for w in warned] == [str(torchs[0].message)], name
        assert [w.category for w in warned] == [torchs[0].category], name
        assert [w.filename for w in warned] == [__file__], name
    with pytest.warns(UserWarning, match="is an empty generator, no gradient clipping will occur") as warned:
        fastclip.clip_value_([{"params": generator}], 1.0)
    assert warned[0].filename == __file__


def test_nothing_to_clip_by_value(backend):
    assert fastclip.clip_value_([], 1.0) is None


def test_gradients_in_place_of_parameters(backend):
    gradient = torch.ones(3)
    for call in (
        lambda: fastclip.clip_with_norm_([gradient], 1.0, torch.tensor(2.0)),
        lambda: fastclip.clip_norm_([gradient], 1.0),
        lambda: fastclip.clip_value_([gradient], 0.5),
    ):
        with pytest.raises(TypeError, match=r"parameters must be parameters, whose \.grad is clipped"):
            call()
    assert torch.equal(gradient, torch.ones(3))


@pytest.mark.parametrize("p", [2.0, inf, 1.0, 0.0])
def test_empty_tensor(backend, p):
    assert fastclip.total_norm([torch.empty(0)], p).item() == 0
    assert fastclip.total_norm([torch.empty(0), torch.tensor([3.0])], p).item() == (1 if p == 0 else 3)


def test_tied_weights_count_once(backend):
    a, b = parameter(torch.full((4,), 3.0)), parameter(torch.full((4,), 4.0))
    assert fastclip.clip_norm_([a, b, a], 5.0).item() == pytest.approx(10)
    assert_scaled([a.grad], [torch.full((4,), 3.0)], [5 / (10 + 1e-6)], torch.float32)
    c = parameter(a.grad)  # another parameter, the same gradient
    assert fastclip.total_norm([a.grad, c.grad, b.grad]).item() == pytest.approx(5)
    assert fastclip.clip_tensor_norm_([a, c], 1e9).shape == (1,)


def test_overlapping_views(backend):
    whole = torch.arange(10.0)
    parameters = [parameter(whole[:6]), parameter(whole[4:])]
    with pytest.raises(RuntimeError, match="overlap"):
        fastclip.clip_norm_(parameters, 1.0)
    assert torch.equal(whole, torch.arange(10.0))
    assert fastclip.total_norm([whole[:6], whole[4:]]).item() == pytest.approx(math.sqrt(55 + 271))
    disjoint = [parameter(whole[:5]), parameter(whole[5:])]
    assert fastclip.clip_norm_(disjoint, 1.0).item() == pytest.approx(math.sqrt(285))


@pytest.mark.parametrize(
    "pair",
    [lambda w: (w, w[4:]), lambda w: (w[4:], w), lambda w: (w, w[:5]), lambda w: (w, w.view(2, 5)[:, 1:]),
     lambda w: (w, w.view(torch.bfloat16)), lambda w: (w[2:5], w.view(torch.bfloat16)[8:20])],
    ids=["whole, tail", "tail, whole", "whole, head", "whole, gaps", "whole, other dtype", "other dtype"],
)  # fmt: skip
def test_overlap_with_the_whole(backend, pair):
    whole = torch.arange(10.0)
    with pytest.raises(RuntimeError, match="overlap"):
        fastclip.clip_norm_([parameter(g) for g in pair(whole)], 1.0)
    assert torch.equal(whole, torch.arange(10.0))


def test_neighbours_in_one_storage(backend):
    """A flat buffer cut into gradients, as data-parallel wrappers do: no overlap, however small the pieces."""
    flat = torch.randn(60)
    parameters = [parameter(piece) for piece in flat.split([1, 2, 1, 1, 30, 3, 22])]
    before = wide([flat])
    assert fastclip.clip_norm_(parameters, 0.5).item() == pytest.approx(total_norm(before), rel=1e-6)
    assert_scaled([flat], before, [0.5 / (total_norm(before) + 1e-6)], torch.float32)


@pytest.mark.parametrize("left", [0, 16])
def test_freed_storage(backend, left):
    p = parameter(torch.ones(8))
    p.grad.untyped_storage().resize_(left)
    with pytest.raises(RuntimeError, match=r"the gradient of parameters\[0\] has no memory"):
        fastclip.clip_norm_([p], 1.0)


def test_overlap_through_gaps(backend):
    whole = torch.arange(12.0).reshape(3, 4)
    with pytest.raises(RuntimeError, match="overlap"):
        fastclip.clip_norm_([parameter(whole[:, :3]), parameter(whole[:, 2:])], 1.0)
    assert torch.equal(whole, torch.arange(12.0).reshape(3, 4))


def test_expanded_gradient(backend):
    p = torch.nn.Parameter(torch.zeros(3, 4))
    p.grad = torch.ones(1).expand(3, 4)
    with pytest.raises(RuntimeError, match=r"the gradient of parameters\[1\] is expanded"):
        fastclip.clip_norm_([parameter(torch.ones(2)), p], 1.0)
    assert fastclip.total_norm([p.grad]).item() == pytest.approx(math.sqrt(12))


def test_version_counter(backend):
    p = parameter(torch.full((4,), 3.0))
    before = p.grad._version
    fastclip.clip_norm_([p], 1.0)
    assert p.grad._version > before
    before = p.grad._version
    fastclip.clip_value_([p], 0.1)
    assert p.grad._version > before


def test_gradient_with_history(backend):
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    (g,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
    x.grad = g
    assert fastclip.clip_norm_([x], 1.0).item() == pytest.approx(math.hypot(12, 27))
    norm = math.hypot(12, 27)
    assert tensor_norm(x.grad) == pytest.approx(norm / (norm + 1e-6), rel=clipping(torch.float32))


@pytest.mark.slow
def test_a_billion_elements():
    ones = torch.ones(2**30)
    assert fastclip.total_norm([ones]).item() == pytest.approx(32768, rel=1e-6)


def test_random_models_against_torch(backend):
    for seed in range(5):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 5)
        )
        model(torch.randn(4, 3, 8, 8)).square().sum().backward()
        assert_clipped_as_by_torch(list(model.parameters()), 0.5)
