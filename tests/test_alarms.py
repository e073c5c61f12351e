"""Every warning of the monitor's: when it is heard, when not, and what it says."""

import math
import warnings

import pytest
import torch
from watching import INF, NAN, Model, late, lines, steps_of, watch

import fastclip
from fastclip.monitor import GradientWarning, GradMonitor, alarms, load


def noisy(count, scale=1.0, spread=0.3):
    torch.manual_seed(7)
    return [(scale * math.exp(spread * x),) for x in torch.randn(count).tolist()]


def test_a_quiet_run_warns_of_nothing():
    assert watch(GradMonitor(), noisy(3000), limit=1.5) == []
    assert watch(GradMonitor(), noisy(3000, spread=1.0), limit=3.0) == []


@pytest.mark.parametrize(("clipped", "warns"), [(90, False), (91, True)])
def test_clipping_most_of_the_time(clipped, warns):
    steps = [(0.5,)] * (100 - clipped) + [(2.0,)] * clipped
    assert watch(GradMonitor(), steps) == ([("clipping", 99)] if warns else [])


def test_clipping_is_heard_again_only_after_it_stopped():
    monitor = GradMonitor()
    assert watch(monitor, [(2.0,)] * 2500) == [("clipping", 99)]
    (notice,) = monitor.warnings
    assert "100 of the last 100 updates were clipped to a norm of 1 (the median before is 2)" in notice.message
    assert "a limit near 2 " in notice.message
    # Heard at 99, over by 1260, due again at 1291.
    assert watch(GradMonitor(), [(2.0,)] * 1200 + [(0.9,)] * 60 + [(2.0,)] * 300) == [
        ("clipping", 99),
        ("clipping", 1350),
    ]


def test_skipped_updates_do_not_count_as_clipped():
    steps = [(2.0,), (NAN,)] * 100
    assert watch(GradMonitor(window=50), steps, nonfinite="skip") == [("skips", 19), ("clipping", 98)]


@pytest.mark.parametrize(("gradient", "warns"), [(1e-3, True), (1e-3 / 0.9, True), (1e-7, False)])
def test_eps_that_swallows(gradient, warns):
    found = watch(GradMonitor(), [(gradient, gradient)] * 300, limit=1e-8)
    assert ("eps" in dict(found)) == (gradient > 1e-8 * math.sqrt(2))
    assert dict(found).get("eps", 99) == 99
    assert watch(GradMonitor(adam_eps=None), [(gradient,)] * 100, limit=1e-9) == [("clipping", 99)]


def test_eps_that_swallows_typical_elements():
    # 2 gradients of 1 element are said to have 10,000: their root mean square is a hundredth of the norm.
    kinds = dict(watch(GradMonitor(elements=10_000), [(3.0, 4.0)] * 100, limit=1e-7))
    assert kinds == {"clipping": 99, "eps": 99}
    monitor = GradMonitor(elements=10_000, adam_eps=1e-8)
    assert dict(watch(monitor, [(3.0, 4.0)] * 100, limit=1.1e-6)) == {"clipping": 99}
    monitor = GradMonitor(elements=10_000)
    watch(monitor, [(3.0, 4.0)] * 100, limit=1e-7)
    assert "a typical element is 1.0e-09 (coefficient 2.0e-08), below eps 1e-08, in 100 of the last 100" in (
        monitor.warnings[1].message
    )


def test_eps_is_not_to_blame_where_half_the_steps_are_fine():
    half = [(1.0,), (1e-4,)] * 200  # clipped to less than eps; less than that by itself
    assert "eps" not in dict(watch(GradMonitor(adam_eps=1e-3), half, limit=5e-4))
    assert dict(watch(GradMonitor(adam_eps=1e-3), [(1.0,), (1.0,), (1e-4,)] * 100, limit=5e-4))["eps"] == 99


def test_spikes():
    steps = noisy(3000)
    for at, size in {10: 100, 500: 100, 520: 100, 2000: 100}.items():  # 10 comes before there is anything to compare
        steps[at] = (size,)
    monitor = GradMonitor()
    assert watch(monitor, steps, limit=5.0) == [("spike", 500), ("spike", 2000)]
    first, second = (notice.message for notice in monitor.warnings)
    assert "the gradient norm 100 is" in first and "largest in layer0.weight" in first and "it was clipped" in first
    assert "1 more since the last such warning" in second
    assert "more since" not in first


def test_the_spikes_score():
    torch.manual_seed(8)
    logs = torch.randn(100).tolist()
    low, median, high = (sorted(logs)[int(q * 99)] for q in (0.25, 0.5, 0.75))
    edge = median + 6 * (high - low) / 1.349
    steps = [(math.exp(log),) for log in logs]
    assert watch(GradMonitor(), [*steps, (math.exp(edge + 0.01),)], limit=INF) == [("spike", 100)]
    assert watch(GradMonitor(), [*steps, (math.exp(edge - 0.01),)], limit=INF) == []
    level = [(1.0,)] * 30  # a norm that never moved may move by less than e^0.6
    assert watch(GradMonitor(), [*level, (1.8,)], limit=INF) == []
    assert watch(GradMonitor(), [*level, (1.9,)], limit=INF) == [("spike", 30)]
    assert watch(GradMonitor(), [*level[:19], (1.9,)], limit=INF) == []
    assert watch(GradMonitor(), [*level, (0.0,), (1e-9,)], limit=INF) == []


def test_broken_norms_are_no_spikes():
    steps = [*noisy(200), (INF,), (NAN,), *noisy(100)]
    assert watch(GradMonitor(), steps, limit=INF) == [("nonfinite", 200)]


def test_gradients_that_stay_zero():
    zero = [(0.5, 0.0, 0.0 if i < 99 else 0.1, 0.0 if i >= 150 else 0.1) for i in range(2000)]
    monitor = GradMonitor()
    # The last is zero for 100 steps at 249 but heard only once 1000 steps are over.
    assert watch(monitor, zero, limit=INF) == [("zero", 99), ("zero", 1100)]
    first, second = (notice.message for notice in monitor.warnings)
    assert "layer1.weight. " in first and "layer2" not in first and "layer3" not in first
    assert "layer3.weight. " in second and "layer1" not in second


def test_gradients_that_are_absent_are_not_zero():
    steps = [(1.0, 0.0 if i % 2 else None) for i in range(199)]
    assert watch(GradMonitor(), steps, limit=INF) == []  # zero in 99 of its steps
    assert watch(GradMonitor(), [*steps, (1.0, 0.0)], limit=INF) == [("zero", 199)]


@pytest.mark.parametrize(("broken", "warns"), [(9, False), (10, True)])
def test_repeated_skips(broken, warns):
    steps = [(1.0, NAN if i % 10 == 0 and i < 10 * broken else 1.0) for i in range(300)]
    monitor = GradMonitor()
    assert watch(monitor, steps, limit=INF, nonfinite="skip") == ([("skips", 90)] if warns else [])
    assert monitor.skips == broken
    if warns:
        assert "10 of the last 91 updates" in monitor.warnings[0].message
        assert "layer1.weight. " in monitor.warnings[0].message


def test_skips_that_are_meant():
    model = Model("a", limit=INF)
    optimizer = torch.optim.SGD(model.parameters, 0.1)
    monitor = GradMonitor()
    for _ in range(100):
        model.step(1.0)
        monitor.update(model.clipper.step(optimizer, when=torch.tensor(False)))
    assert monitor.warnings == [] and monitor.skips == 100


def test_nonfinite_gradients_that_are_passed_on():
    monitor = GradMonitor()
    assert watch(monitor, [(1.0, INF, NAN)] * 3, limit=INF) == [("nonfinite", 0)]
    assert "2 of 3 gradients were not finite" in monitor.warnings[0].message
    assert "layer1.weight, layer2.weight" in monitor.warnings[0].message


def test_elements_that_are_zeroed():
    monitor = GradMonitor()
    assert watch(monitor, [(1.0, 2.0), (NAN, 2.0)] * 5, nonfinite="zero") == [("nonfinite", 1)]
    (notice,) = monitor.warnings
    assert notice.message.startswith(
        "1 elements of 1 of 2 gradients were not finite and were set to 0: layer0.weight. "
    )


def test_unnamed_gradients_are_called_by_number():
    assert alarms.listing([str(i) for i in range(9)], list(range(1, 8))) == (
        "gradient 1, gradient 2, gradient 3, gradient 4, gradient 5 and 2 more"
    )


@pytest.fixture
def events(monkeypatch):
    return late(monkeypatch)


def test_warnings_are_heard_where_update_was_called(tmp_path, events):
    path = tmp_path / "run.jsonl"
    model = Model("a", limit=INF)
    m = GradMonitor(path)
    m.update(model.step(NAN), 1.0)
    events[0].complete = True
    with pytest.warns(GradientWarning, match="step 0: 1 of 1 gradients were not finite") as caught:
        m.update(model.step(1.0))
    assert [warning.filename for warning in caught] == [__file__]
    m.close()
    with pytest.warns(GradientWarning) as caught, GradMonitor(path) as m:
        m.update(model.step(NAN))
    assert [warning.filename for warning in caught] == [__file__]
    written = [line for line in lines(path) if "warning" in line]
    assert [(line["step"], line["warning"]) for line in written] == [(0, "nonfinite")] * 2
    assert written[0]["message"] == m.warnings[0].message
    assert load(path).warnings[0] == m.warnings[0]
    # What led to it is there, whenever the next column is due.
    assert all("row_norms" in line for line in steps_of(path) if line["nonfinite"])


def test_warnings_as_errors_leave_the_record_whole(tmp_path):
    path = tmp_path / "run.jsonl"
    with warnings.catch_warnings(), GradMonitor(path) as monitor:
        warnings.simplefilter("error")
        monitor.TOGETHER = 1
        with pytest.raises(GradientWarning):
            monitor.update(Model("a").step(NAN))
        monitor.update(Model("a").step(0.5))
    assert [line["step"] for line in steps_of(path)] == [0, 1]


def test_gradients_of_which_only_the_norm_is_known_do_not_swallow_anything():
    """As sharded ones without tensor_stats: how large their elements are nobody knows."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    clipper = fastclip.Clipper([parameter], 1e-12)
    with warnings.catch_warnings(), GradMonitor(window=10) as monitor:
        warnings.simplefilter("ignore", GradientWarning)
        for _ in range(30):
            monitor.update(clipper.clip_with_norm_(5.0))
    assert {notice.kind for notice in monitor.warnings} == {"clipping"}
    assert monitor.last["total_norm"] == 5 and monitor.top_norms == {}
