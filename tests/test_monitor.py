"""The monitor: what it reads, keeps, writes, draws and warns of, beside the same computed plainly."""

import itertools
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tracemalloc
import types

import pytest
import torch
from cases import NORM_ERROR, unit, wide
from watching import INF, NAN, Event, Model, late, lines, quiet, steps_of, watch

import fastclip
from fastclip import __main__ as command
from fastclip.monitor import GradientWarning, GradMonitor, History, load, rows

# A row's norm is taken from the norms of its gradients in float32: a power, sums and a root come after their error.
ROWS = {"rtol": NORM_ERROR + 8 * unit(torch.float32), "atol": 0}
ROOT = pathlib.Path(__file__).parent.parent


def assert_png(path, width=1300):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    found, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert found == width
    assert 500 <= height <= 2500
    assert 10_000 < len(data) < 1_000_000


# Stats.log


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, 0.0, INF])
@pytest.mark.parametrize("broken", [None, NAN, INF])
def test_log_is_what_the_attributes_say(backend, norm_type, broken):
    parameters = {name: torch.nn.Parameter(torch.zeros(3, 2)) for name in ("a", "b", "c", "d")}
    for parameter in list(parameters.values())[:3]:
        parameter.grad = torch.randn(3, 2)
    if broken is not None:
        parameters["b"].grad[0, 0] = broken
    rules = [fastclip.rules.GlobalNorm(0.5, norm_type), lambda stats: torch.tensor([1.0, 0.5, 2.0])]
    stats = fastclip.Clipper(parameters.items(), rules, nonfinite="skip").clip_()
    found = stats.log(tensors=True)
    assert {type(value) for value in found.values()} <= {float, int, bool, dict}
    expected = {
        "total_norm": stats.total_norm.item(), "limit": 0.5, "coef": stats.coef.min().item(),
        "clipped": stats.clipped.item(), "skipped": stats.skipped.item(), "nonfinite": int(stats.nonfinite.sum()),
        "tensor_norms": dict(zip("abc", stats.tensor_norms.tolist())),
        "tensor_absmax": dict(zip("abc", stats.tensor_absmax.tolist())),
    }  # fmt: skip
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=2 * unit(torch.float32), abs=0, nan_ok=True)  # a bit of float32
    assert stats.log() == pytest.approx({k: v for k, v in found.items() if not isinstance(v, dict)}, nan_ok=True)
    assert found["skipped"] == (broken is not None) == (found["nonfinite"] == 1)


def test_log_without_names_limits_or_gradients():
    stats = fastclip.Clipper([torch.nn.Parameter(torch.ones(2))], 1.0).clip_()
    none = {"total_norm": 0.0, "limit": 1.0, "coef": 1.0, "clipped": False, "skipped": False, "nonfinite": 0}
    assert stats.log(tensors=True) == none | {"tensor_norms": {}, "tensor_absmax": {}}
    stats = Model("ab", named=False).step(3.0, 4.0)
    stats.zeroed = torch.tensor([2**40, 1])
    found = stats.log(tensors=True)
    assert (found["total_norm"], found["limit"], found["zeroed"]) == (5.0, 1.0, 2**40 + 1)
    assert found["tensor_norms"] == {0: 3.0, 1: 4.0}
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([NAN, INF, 3.0])
    found = fastclip.Clipper([p], fastclip.rules.TensorNorm(9.0), nonfinite="zero").clip_().log()
    assert "limit" not in found and (found["nonfinite"], found["zeroed"], found["total_norm"]) == (1, 2, 3.0)


def test_log_rounds_as_the_tensors_do():
    parameter = torch.nn.Parameter(torch.zeros(1000))
    parameter.grad = torch.randn(1000)
    stats = fastclip.Clipper([parameter], 0.1).clip_()
    assert stats.log()["total_norm"] == stats.total_norm.item() != stats.norm.item()
    assert stats.log()["coef"] == stats.coef.item()
    double = torch.nn.Parameter(torch.zeros(10, dtype=torch.float64))
    double.grad = torch.full((10,), 1e300, dtype=torch.float64)
    stats = fastclip.Clipper([double], 0.1).clip_()
    assert stats.log()["total_norm"] == stats.total_norm.item() > 1e300


# What is kept and written


def test_a_line_a_step(tmp_path):
    torch.manual_seed(1)
    path = tmp_path / "run.jsonl"
    gradients, losses = torch.randn(57, 5).tolist(), torch.rand(57).tolist()
    with GradMonitor(path, rows_every=10) as monitor:
        watch(monitor, gradients, losses, limit=2.0)
    header, *rest = lines(path)
    assert header["fastclip"] == fastclip.__version__
    assert header["rows"] == [f"layer{i}.weight" for i in range(5)]
    assert [line["step"] for line in rest] == list(range(57))
    norms = [math.hypot(*row) for row in gradients]
    for i, line in enumerate(rest):
        assert line["loss"] == pytest.approx(losses[i])
        assert line["total_norm"] == pytest.approx(norms[i], rel=NORM_ERROR)
        coef = min(1, 2 / (norms[i] + 1e-6))
        assert line["coef"] == pytest.approx(coef, rel=NORM_ERROR + unit(torch.float32))
        assert line["clipped"] == (norms[i] > 2) and line["limit"] == 2.0
        top_norms = sorted(range(5), key=lambda j: -abs(gradients[i][j]))[:3]
        assert list(line["top_norms"]) == [f"layer{j}.weight" for j in top_norms]
        assert ("row_norms" in line) == (i % 10 == 0)
    for at in range(10, 57, 10):  # the largest since the line before
        most = [max(abs(row[j]) for row in gradients[at - 9 : at + 1]) for j in range(5)]
        four_digits = pytest.approx(most, rel=5e-4 + 2 * NORM_ERROR)
        assert rest[at]["row_norms"] == rest[at]["row_absmax"] == four_digits
    assert monitor.last["step"] == 56 and monitor.top_norms == rest[-1]["top_norms"]
    assert monitor.clip_rate == pytest.approx(statistics.mean(norm > 2 for norm in norms))
    assert path.read_bytes().endswith(b"}\n")


def test_spans_hold_means_and_extremes():
    torch.manual_seed(2)
    count, size = 1000, 64
    records = [
        {"step": i, "loss": torch.rand(()).item(), "total_norm": torch.rand(()).exp().item(), "coef": 1 / (1 + i % 7),
         "limit": float(i), "clipped": i % 3 == 0, "skipped": i % 5 == 0, "nonfinite": int(i % 11 == 0)}
        for i in range(count)
    ]  # fmt: skip
    records[77]["total_norm"], records[78]["loss"] = INF, NAN
    history = History(size)
    for record in records:
        history.add(record)
    assert size / 2 <= len(history.spans) <= size
    assert [span.count for span in history.spans[:-1]] == [16] * (len(history.spans) - 1)
    assert history.spans[0].first == 0 and history.spans[-1].last == count - 1
    for before, span in itertools.pairwise(history.spans):
        assert span.first == before.last + 1
    for span in history.spans:
        of = records[span.first : span.last + 1]
        assert span.count == len(of) and span.limit == of[-1]["limit"]
        for name, key in (("loss", "loss"), ("norm", "total_norm"), ("coef", "coef")):
            values, found = [r[key] for r in of if math.isfinite(r[key])], getattr(span, name)
            assert (found.low, found.high, found.count) == (min(values), max(values), len(values))
            assert found.mean == pytest.approx(statistics.mean(values))
        assert span.clipped == sum(r["clipped"] for r in of) and span.skipped == sum(r["skipped"] for r in of)
        broken = [r["nonfinite"] > 0 or not math.isfinite(r["total_norm"] + r["loss"]) for r in of]
        assert span.nonfinite == sum(broken)


def test_columns_keep_the_largest():
    torch.manual_seed(3)
    norms = torch.rand(3000, 4)
    norms[:, 1] = NAN  # never there
    norms[1234, 2] = INF
    history = History(64)
    history.rows = list("abcd")
    for i, column in enumerate(norms):
        history.add({"step": i, "total_norm": 1.0, "coef": 1.0, "clipped": 0, "skipped": 0, "nonfinite": 0}, column)
    ends, cells = history.cells()
    assert History.COLUMNS / 2 <= len(ends) <= History.COLUMNS and cells.shape == (4, len(ends))
    assert ends[-1] == 2999 and {b - a for a, b in itertools.pairwise(ends[:-1])} == {8}
    for start, end, column in zip([0] + [end + 1 for end in ends], ends, cells.T):
        expected = norms[start : end + 1].nan_to_num(-1, posinf=INF).amax(0)
        torch.testing.assert_close(column, expected.where(expected >= 0, NAN), rtol=0, atol=0, equal_nan=True)


def test_memory_is_bounded(tmp_path):
    """100,000 steps of history, and thousands through a whole monitor, leave nothing behind that grows."""
    history, sizes = History(256), set()
    record = {"loss": 1.0, "total_norm": 1.0, "coef": 1.0, "clipped": False, "skipped": False, "nonfinite": 0}
    column = torch.ones(8)
    history.rows = [str(i) for i in range(8)]
    for i in range(100_000):
        history.add({**record, "step": i}, column if i % 10 == 0 else None)
        sizes.add(len(history.spans))
    assert max(sizes) == 256 and len(history.cells()[0]) <= History.COLUMNS
    assert sum(span.count for span in history.spans) == 100_000

    model, names = Model("ab", named=False), range(2)
    stats = model.step(1.0, 2.0)
    with quiet(), GradMonitor(tmp_path / "run.jsonl", history=64) as monitor:
        for _ in range(6000):
            monitor.update(stats, 1.0)
        tracemalloc.start()
        for _ in range(2000):
            monitor.update(stats, 1.0)
        grown, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert grown < 64 * 1024
        assert len(monitor.history.spans) <= 64 and not monitor._pending
        assert list(monitor._register.names) == [str(i) for i in names]
    assert monitor._lines._file is None


def test_nan_and_inf_are_words(tmp_path):
    path = tmp_path / "run.jsonl"
    monitor = GradMonitor(path, rows_every=1)
    watch(monitor, [(1.0, 2.0), (NAN, 1.0), (-INF, 1.0), (1.0, 1.0)], [1.0, NAN, -INF, torch.tensor(INF)])
    monitor.close()
    found = steps_of(path)
    assert [line["loss"] for line in found] == [1.0, "nan", "-inf", "inf"]
    assert [line["total_norm"] for line in found[1:3]] == ["nan", "inf"]
    assert found[1]["top_norms"] == {"layer0.weight": "nan", "layer1.weight": 1.0}
    assert found[1]["row_norms"] == ["nan", 1.0] and found[2]["row_norms"] == ["inf", 1.0]
    assert [line["nonfinite"] for line in found] == [0, 1, 1, 0]
    history = load(path)
    assert [span.nonfinite for span in history.spans] == [0, 1, 1, 1]
    assert history.spans[3].loss.count == 0 and history.spans[1].norm.count == 0
    torch.testing.assert_close(history.cells()[1], torch.tensor([[1, INF, INF, 1], [2, 1, 1, 1]]))


@pytest.mark.parametrize("named", [True, False])
def test_gradients_come_and_go(tmp_path, named):
    path = tmp_path / "run.jsonl"
    model = Model(["a", "b", "c"], limit=INF, named=named)
    with GradMonitor(path, rows_every=1) as monitor:
        for gradients in [(1, 2, None), (None, None, None), (None, 3, 4), (5, 6, 7)]:
            monitor.update(model.step(*gradients))
    found = steps_of(path)
    if named:
        expected = [[1, 2], [None, None], [None, 3, 4], [5, 6, 7]]
        assert [line["rows"] for line in lines(path) if "rows" in line] == [["a", "b"], ["a", "b", "c"]]
    else:
        expected = [[1, 2], [None, None], [3, 4], [5, 6, 7]]
    assert [line["row_norms"] for line in found] == expected
    assert [len(line["top_norms"]) for line in found] == [2, 0, 2, 3]
    assert found[1]["total_norm"] == 0 and found[1]["coef"] == 1
    torch.testing.assert_close(load(path).cells()[1], monitor.history.cells()[1], equal_nan=True)
    assert monitor.history.cells()[1].shape == (3, 4)


def test_many_gradients_share_rows():
    names = [f"h.{i}.{part}.{kind}" for i in range(20) for part in ("attn", "mlp") for kind in ("weight", "bias")]
    register = rows.Register(most=50)
    index = register.index(tuple(names))
    assert index.tolist() == list(range(80))
    assert register.rows == [f"h.{i}.{part}" for i in range(20) for part in ("attn", "mlp")]
    maxima = rows.Maxima(register)
    model = Model(names, limit=INF)
    torch.manual_seed(4)
    both = torch.randn(2, 80)
    with GradMonitor(rows=50, rows_every=2) as monitor:
        monitor.update(model.step(*both[0]))
        monitor.update(model.step(*both[0]))
        monitor.update(model.step(*both[1]))
    most = both.abs().amax(0).view(40, 2)
    torch.testing.assert_close(monitor.history.cells()[1][:, 1], most.double().norm(dim=1).float(), **ROWS)
    assert maxima._lately is None

    register = rows.Register(most=7)
    register.index(range(20))
    assert register.rows == ["0 … 2", "3 … 5", "6 … 8", "9 … 11", "12 … 14", "15 … 17", "18 … 19"]
    register.index(range(30))
    assert len(register.rows) == 7 and register.row[20:] == [6] * 10


def test_row_norms_of_every_order():
    for p in (1.0, 2.0, 3.0, INF):
        parameters = {name: torch.nn.Parameter(torch.zeros(5)) for name in ("x.a", "x.b", "y.a")}
        for parameter in parameters.values():
            parameter.grad = torch.randn(5)
        grads = wide(parameter.grad for parameter in parameters.values())
        with GradMonitor(rows=2) as monitor:
            monitor.update(fastclip.Clipper(parameters.items(), fastclip.rules.GlobalNorm(INF, p)).clip_())
        expected = torch.stack([torch.cat(grads[:2]).norm(p), grads[2].norm(p)])
        torch.testing.assert_close(monitor.history.cells()[1][:, 0], expected.float(), **ROWS)
        assert monitor.history.rows == ["x", "y"]


# Reading late


@pytest.fixture
def events(monkeypatch):
    return late(monkeypatch)


def test_steps_are_taken_up_in_order_and_never_waited_for(events, tmp_path):
    path = tmp_path / "run.jsonl"
    model, monitor = Model("a", limit=INF), GradMonitor(path)
    for i in range(4):
        stats = model.step(i)
        monitor.update(stats, i)
        for part in stats._parts:  # as a replay of a CUDA graph does
            part.power.fill_(99)
            part.absmax.fill_(99)
    assert not lines(path) and monitor.last == {}
    events[2].complete = True
    monitor.update(model.step(4), 4)
    assert not lines(path), "the third must wait for the first two"
    events[0].complete = events[1].complete = True
    monitor.update(model.step(5), 5)
    assert [line["step"] for line in steps_of(path)] == [0, 1, 2] and monitor.last["step"] == 2
    assert not any(event.waits for event in events)
    monitor.close()
    assert [line["total_norm"] for line in steps_of(path)] == [line["loss"] for line in steps_of(path)] == [*range(6)]
    assert [event.waits for event in events] == [0, 0, 0, 1, 1, 1]


def test_steps_on_their_way_are_bounded(events):
    stats, monitor = Model("a").step(0.5), GradMonitor()
    for _ in range(GradMonitor.MOST_PENDING + 10):
        monitor.update(stats)
    assert monitor.missed == 10 and len(monitor._pending) == GradMonitor.MOST_PENDING
    for event in events:
        event.complete = True
    monitor.update(stats)
    assert monitor.missed == 10
    monitor.close()
    assert monitor.history.last == GradMonitor.MOST_PENDING + 10
    assert sum(span.count for span in monitor.history.spans) == GradMonitor.MOST_PENDING + 1


def fail(monitor, *steps):
    with monitor:
        for stats in steps:
            monitor.update(stats)
        raise ZeroDivisionError


def test_an_exception_in_the_loop_keeps_what_was_done(events, tmp_path):
    path, model = tmp_path / "run.jsonl", Model("a")
    monitor = GradMonitor(path)
    with pytest.raises(ZeroDivisionError):
        fail(monitor, model.step(1), model.step(2))
    assert [line["total_norm"] for line in steps_of(path)] == [1, 2]
    monitor.close()
    with pytest.raises(RuntimeError, match=r"after close"):
        monitor.update(model.step(3))


def test_a_broken_device_does_not_hide_the_loops_error(events, monkeypatch, tmp_path):
    def fails(self):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(Event, "synchronize", fails)
    monitor = GradMonitor(tmp_path / "run.jsonl")
    with pytest.raises(ZeroDivisionError):
        fail(monitor, Model("a").step(1))
    assert monitor._lines._file is None
    with pytest.raises(RuntimeError, match="CUDA error"), GradMonitor() as monitor:
        monitor.update(Model("a").step(1))


# Crashed and resumed runs


def record(path, count, first=0, loss=1.0):
    model = Model(["a.weight", "b.weight"])
    with GradMonitor(path) as monitor:
        for i in range(first, first + count):
            monitor.update(model.step(0.3, 0.4), loss, step=i)


def test_a_cut_off_line_is_left_out(tmp_path):
    path = tmp_path / "run.jsonl"
    record(path, 30)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    assert load(path).last == 28
    assert command.main(["plot", str(path)]) == 0
    assert_png(tmp_path / "run.png")

    record(path, 10, first=20, loss=2.0)  # resumed from a checkpoint: the file goes on, the steps from 20 are new
    history = load(path)
    assert [span.first for span in history.spans] == list(range(30))
    assert [span.loss.mean for span in history.spans] == [1.0] * 20 + [2.0] * 10
    record(path, 5, loss=3.0)  # begun anew
    assert [span.loss.mean for span in load(path).spans] == [3.0] * 5


def test_a_thinned_run_is_resumed(tmp_path):
    path = tmp_path / "run.jsonl"
    record(path, 100)
    record(path, 20, first=50, loss=2.0)
    history = load(path, size=16)
    assert history.last == 69 and sum(span.count for span in history.spans) in range(62, 71)
    assert all(span.loss.mean == (1.0 if span.last < 50 else 2.0) for span in history.spans)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "there is no step in it"),
        ('{"fastclip": "1", "rows": []}\n', "there is no step in it"),
        ('{"step": 1}\n', "line 1: no line of a fastclip record: a record begins with a header"),
        (
            '{"fastclip": "1", "rows": []}\n{"step": 1}\n',
            "line 2: no line of a fastclip record: 'nonfinite' is missing",
        ),
        ('{"fastclip": "1", "rows": []}\n[1]\n{"step": 2}\n', "line 2: not a whole line of JSON"),
        ('{"fastclip": "1", "rows": []}\n{"st\n{"step": 2}\n', "line 2: not a whole line of JSON"),
        ("\x89PNG\n\x1a\n", "line 1: not a whole line of JSON"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path, capsys, text, complaint):
    path = tmp_path / "run.jsonl"
    path.write_text(text)
    assert command.main(["plot", str(path)]) == 1
    said = capsys.readouterr().err
    assert str(path) in said and complaint in said
    assert not (tmp_path / "run.png").exists()


def test_no_such_file(tmp_path, capsys):
    assert command.main(["plot", str(tmp_path / "none.jsonl")]) == 1
    assert "none.jsonl" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that is always full")
def test_a_full_disk_does_not_stop_the_training(tmp_path):
    model, monitor = Model("a"), GradMonitor(tmp_path / "run.jsonl")
    monitor.update(model.step(1))
    monitor._lines._file.close()
    monitor._lines._file = open("/dev/full", "ab")  # noqa: SIM115
    for _ in range(monitor.TOGETHER - 2):
        monitor.update(model.step(1))
    with pytest.warns(GradientWarning, match="the record ends here"):
        monitor.update(model.step(1))
    monitor.update(model.step(1))
    monitor.close()
    assert monitor.history.last == monitor.TOGETHER


def test_on_a_cpu_steps_are_taken_up_together_or_when_looked_at(tmp_path):
    path = tmp_path / "run.jsonl"
    model, monitor = Model("a", limit=INF), GradMonitor(path)
    together = monitor.TOGETHER
    for step in range(2 * together + 1):
        monitor.update(model.step(step))
        assert len(steps_of(path)) == (step + 1) // together * together
    assert monitor.last["step"] == 2 * together
    assert len(steps_of(path)) == 2 * together + 1
    monitor.update(model.step(7))
    monitor.close()
    assert [line["total_norm"] for line in steps_of(path)] == [*range(2 * together + 1), 7]


def test_a_run_that_ends_without_close_is_whole(tmp_path):
    path = tmp_path / "run.jsonl"
    program = f"""
import torch, fastclip
p = torch.nn.Parameter(torch.ones(1))
p.grad = torch.ones(1)
monitor = fastclip.monitor.GradMonitor({str(path)!r})
for _ in range(6):
    monitor.update(fastclip.Clipper([p], 1.0).clip_())
raise KeyError
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert "KeyError" in run.stderr
    assert [line["step"] for line in steps_of(path)] == [*range(6)]


# Pictures


def eventful(count):
    """Gradients of three tensors and losses, with all that a picture marks."""
    torch.manual_seed(5)
    for i in range(count):
        scale = 30 if i == count // 2 else NAN if i == count // 3 else 1
        gradients = [scale * g for g in torch.randn(3).exp().tolist()]
        yield (*gradients, 0.0 if i % 2 else None), 3 / (1 + i / 50)


@pytest.mark.parametrize(("count", "history"), [(1, 64), (2, 64), (400, 4096), (1000, 64)])
def test_plot(tmp_path, count, history):
    pytest.importorskip("matplotlib")
    monitor = GradMonitor(tmp_path / "run.jsonl", history=history, rows_every=3)
    gradients, losses = zip(*eventful(count))
    watch(monitor, gradients, losses, limit=3.0, nonfinite="skip")
    figure = monitor.plot(tmp_path / "live.png")
    monitor.close()
    assert [ax.get_ylabel() for ax in figure.axes] == [
        "loss", "gradient norm", "coefficient", "", "norm of each gradient",
    ]  # fmt: skip
    assert figure.axes[1].get_yscale() == "log"
    assert f"{count:,} steps" in figure.get_suptitle()
    assert command.main(["plot", str(tmp_path / "run.jsonl"), "-o", str(tmp_path / "file.png")]) == 0
    assert_png(tmp_path / "live.png")
    assert_png(tmp_path / "file.png")
    legend = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert legend[:2] == ["norm before clipping", "limit"]
    if count > 2:
        assert legend[2:] == ["clipped", "not finite", "skipped"]
        cells = [text.get_text() for text in figure.axes[3].get_legend().get_texts()]
        assert cells[0] == "not finite"


def test_plot_of_little():
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="nothing to draw"):
        GradMonitor().plot()
    monitor = GradMonitor()  # no loss, no gradient, no finite norm
    for gradient in (None, NAN, 0.0):
        with quiet():
            monitor.update(Model("a", limit=INF).step(gradient))
            figure = monitor.plot()
        assert len(figure.axes) == 2 + 2 * (len(monitor.history.rows) > 0)
    with pytest.raises(ValueError, match=r"path must end in \.png, \.pdf or \.svg, got 'a\.txt'"):
        monitor.plot("a.txt")


def test_a_picture_has_few_rows(tmp_path):
    pytest.importorskip("matplotlib")
    names = [f"model.layers.{i}.{part}.weight" for i in range(30) for part in ("attention", "mlp", "norm")]
    model, monitor = Model(names, limit=INF), GradMonitor()
    torch.manual_seed(6)
    gradients = torch.randn(90)
    monitor.update(model.step(*gradients))
    figure = monitor.plot(tmp_path / "run.png")
    assert_png(tmp_path / "run.png")
    heat = figure.axes[2]
    assert [label.get_text() for label in heat.get_yticklabels()] == [f"model.layers.{i}" for i in range(30)]
    drawn = torch.tensor(heat.collections[0].get_array().data[:, 0])
    torch.testing.assert_close(drawn.double(), gradients.double().view(30, 3).norm(dim=1), **ROWS)


def test_without_matplotlib(monkeypatch):
    monitor = GradMonitor()
    monitor.update(Model("a").step(0.5))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'torch-fastclip\[demo\]'"):
        monitor.plot()


def test_import_needs_no_plotting():
    code = "import sys, fastclip; fastclip.monitor.GradMonitor(); sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Loggers


class Writer:
    def __init__(self):
        self.scalars, self.closed = [], False

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def close(self):
        self.closed = True


class Run:
    def __init__(self):
        self.logged = []

    def log(self, scalars, step):
        self.logged.append((scalars, step))


class Metrics(Run):
    """A logger of Lightning's, or the module mlflow."""

    def log_metrics(self, metrics, step=None):
        super().log(metrics, step)

    log = None


def test_loggers():
    writer, run, metrics, called = Writer(), Run(), Metrics(), []
    with GradMonitor(log=[writer, run, metrics, lambda *args: called.append(args)], log_every=2) as monitor:
        watch(monitor, [(0.3, 0.4), (1, 1), (3.0, 4.0), (1, 1)], [1.0, 2.0, 3.0, 4.0])
    assert called == run.logged == metrics.logged and [step for _, step in called] == [0, 2]
    assert called[1][0] == pytest.approx(
        {"loss": 3.0, "grad/norm": 5.0, "grad/limit": 1.0, "grad/coef": 0.2, "grad/clip_rate": 2 / 3, "grad/skips": 0,
         "grad/nonfinite": 0}, rel=1e-6,
    )  # fmt: skip
    assert writer.scalars == [(name, value, step) for scalars, step in called for name, value in scalars.items()]
    assert not writer.closed, "it is not ours to close"


class WandbRun:
    """A run of W&B, as its rows go by its own step: what is logged below it is dropped, above it begins a new row."""

    def __init__(self):
        self.rows, self.step, self.defined, self._row = [], 0, {}, {}

    def define_metric(self, name, step_metric=None):
        assert step_metric is None or step_metric in self.defined
        self.defined[name] = step_metric

    def log(self, scalars, step=None, commit=None):
        if step is not None and step < self.step:
            return
        if step is not None and step > self.step:
            self._flush(step)
        self._row |= scalars
        if commit or (commit is None and step is None):
            self._flush(self.step + 1)

    def _flush(self, step):
        self.rows += [self._row] if self._row else []
        self._row, self.step = {}, step


def test_a_wandb_run_keeps_every_step_whatever_else_it_logs():
    run, model = WandbRun(), Model("a", limit=INF)
    with quiet(), GradMonitor(log=run, log_every=2) as monitor:
        for i in range(20):
            run.log({"accuracy": i})
            run.log({"lr": i})
            monitor.update(model.step(i + 1), 0.5)
        for i in range(10, 15):  # resumed from a checkpoint
            monitor.update(model.step(i + 1), 0.5, step=i)
    found = [row for row in run.rows if "grad/norm" in row]
    assert [row["grad/step"] for row in found] == [*range(0, 20, 2), *range(10, 15, 2)]
    assert all(row["grad/norm"] == row["grad/step"] + 1 and row["loss"] == 0.5 for row in found)
    assert [row["accuracy"] for row in run.rows if "accuracy" in row] == [*range(20)]
    assert run.defined == {"grad/step": None, "grad/*": "grad/step", "loss": "grad/step"}
    assert {name for row in found for name in row if not name.startswith("grad/")} == {"loss"}


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with GradMonitor(log=tmp_path / "events", log_every=1) as monitor:
        watch(monitor, [(0.3, 0.4), (3.0, 4.0)], [1.0, 2.0])
    read = EventAccumulator(str(tmp_path / "events"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("grad/norm")] == [(0, 0.5), (1, 5.0)]
    assert [event.value for event in read.Scalars("loss")] == [1.0, 2.0]


def test_a_folder_means_tensorboard(tmp_path, monkeypatch):
    made = types.SimpleNamespace(SummaryWriter=lambda folder: (opened.append(folder), Writer())[1])
    opened = []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", made)
    with GradMonitor(log=tmp_path) as monitor:
        watch(monitor, [(1.0,)])
        (writer,) = monitor._own
    assert opened == [str(tmp_path)] and writer.closed and writer.scalars
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        GradMonitor(log=str(tmp_path))


# Arguments


@pytest.mark.parametrize(
    ("wrong", "error", "word"),
    [
        ({"history": 1}, ValueError, "history must be >= 2, got 1"),
        ({"history": 2.5}, TypeError, "history must be an int"),
        ({"rows": 0}, ValueError, "rows must be >= 1"),
        ({"rows_every": 0}, ValueError, "rows_every"),
        ({"log_every": True}, TypeError, "log_every"),
        ({"window": -1}, ValueError, "window"),
        ({"adam_eps": -1}, ValueError, "adam_eps must be a number >= 0 or None, got -1"),
        ({"elements": 0}, ValueError, "elements"),
        ({"log": 3}, TypeError, "log must be .* got int 3"),
        ({"path": "no/such/folder/run.jsonl"}, OSError, "no/such/folder"),
    ],
)
def test_wrong_arguments(wrong, error, word):
    with pytest.raises(error, match=word):
        GradMonitor(**wrong)


def test_wrong_updates():
    stats, monitor = Model("a").step(1), GradMonitor()
    for wrong, error, word in [
        ((torch.ones(()),), TypeError, "stats must be a fastclip.Stats, got Tensor"),
        (
            (stats, torch.ones(2)),
            ValueError,
            r"loss must be one real number, got a torch.float32 tensor of shape \(2,\)",
        ),
        ((stats, "1"), TypeError, "loss must be a number"),
        ((stats, 1.0, -1), ValueError, "step must be >= 0"),
        ((stats, 1.0, 1.5), TypeError, "step must be an int"),
    ]:
        with pytest.raises(error, match=word):
            monitor.update(*wrong)
    assert monitor.last == {} and math.isnan(monitor.clip_rate) and monitor.top_norms == {}


def test_losses_may_require_gradients():
    monitor = GradMonitor()
    monitor.update(Model("a").step(0.5), torch.ones(1, requires_grad=True, dtype=torch.bfloat16) * 2)
    assert monitor.last["loss"] == 2


def test_optimizers_of_ours():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = fastclip.optim.SGD([parameter], lr=0.1, max_norm=1.0)
    parameter.grad = torch.ones(3)
    optimizer.step()
    monitor = GradMonitor()
    monitor.update(optimizer.stats, 1)
    assert monitor.last["total_norm"] == pytest.approx(3**0.5) and monitor.last["clipped"]


# On a GPU


@pytest.mark.gpu
def test_update_does_not_wait(tmp_path):
    path = tmp_path / "run.jsonl"
    names = [f"layer{i}" for i in range(20)]
    parameters = {name: torch.nn.Parameter(torch.zeros(100, device="cuda")) for name in names}
    for parameter in parameters.values():
        parameter.grad = torch.randn(100, device="cuda")
    norms = []
    clipper = fastclip.Clipper(parameters.items(), [lambda stats: torch.ones_like(stats.norms), 1.0])
    with quiet(), GradMonitor(path) as monitor:
        stats = clipper.clip_()  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for i in range(200):
                for parameter in parameters.values():
                    parameter.grad.normal_()
                stats = clipper.clip_()
                monitor.update(stats, stats.total_norm * 2 if i % 2 else 1.0)
                norms.append(stats.total_norm)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = steps_of(path)
    assert [line["step"] for line in found] == list(range(200)) and not monitor.missed
    norms = torch.stack(norms).tolist()
    assert [line["total_norm"] for line in found] == norms
    assert [line["loss"] for line in found] == [2 * norm if i % 2 else 1.0 for i, norm in enumerate(norms)]


@pytest.mark.gpu
def test_update_never_waits_for_a_busy_gpu():
    parameter = torch.nn.Parameter(torch.zeros(8, device="cuda"))
    parameter.grad = torch.ones(8, device="cuda")
    clipper, monitor = fastclip.Clipper([parameter], 1.0), GradMonitor()
    monitor.update(clipper.clip_())
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    monitor.update(clipper.clip_())
    assert monitor.history.last < 1, "the second step was taken up before the GPU had done it"
    monitor.close()
    assert monitor.history.last == 1


@pytest.mark.gpu
def test_replays_are_read_one_by_one():
    parameter = torch.nn.Parameter(torch.zeros(8, device="cuda"))
    parameter.grad = torch.ones(8, device="cuda")
    clipper = fastclip.Clipper([parameter], 1e9)
    clipper.clip_()
    graph = torch.cuda.CUDAGraph()
    with GradMonitor() as monitor:
        with torch.cuda.graph(graph):
            stats = clipper.clip_()
            with pytest.raises(RuntimeError, match="captured"):
                monitor.update(stats)
        seen = []
        for i in range(10):
            parameter.grad.fill_(i)
            graph.replay()
            monitor.update(stats)
            seen.append(i * 8**0.5)
    assert [span.norm.mean for span in monitor.history.spans] == pytest.approx(seen)


@pytest.mark.gpu
def test_log_is_one_copy():
    parameters = [torch.nn.Parameter(torch.zeros(100, device="cuda")) for _ in range(20)]
    for parameter in parameters:
        parameter.grad = torch.randn(100, device="cuda")
    stats = fastclip.Clipper(parameters, [1.0, fastclip.rules.TensorNorm(0.1)]).clip_()
    stats.log(tensors=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        stats.log(tensors=True)
    assert sum("DtoH" in event.name for event in profiler.events()) == 1
