"""The monitor's file: what becomes of one that was resumed or damaged, who writes it, and what copies do."""

import copy
import gc
import json
import math
import multiprocessing
import os
import pathlib
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from watching import INF, NAN, Model, lines, quiet, steps_of

import fastclip
from fastclip import __main__ as command
from fastclip.monitor import GradientWarning, GradMonitor, load
from fastclip.monitor.plot import draw

ROOT = pathlib.Path(__file__).parent.parent


def record(path, names, gradients, first=0, **options):
    """A run that writes a column of the heat map at every step."""
    model = Model(names, limit=INF)
    with quiet(), GradMonitor(path, rows_every=1, **options) as monitor:
        for step in range(first, first + gradients[1]):
            monitor.update(model.step(*gradients[0]), step=step)


def rows_of(history):
    """The heat map as {row: its norms}, with None where there was no gradient."""
    cells = history.cells()[1]
    return {
        row: [None if math.isnan(norm) else norm for norm in norms] for row, norms in zip(history.rows, cells.tolist())
    }


# Resumed with other gradients


@pytest.mark.parametrize(
    ("names", "gradients", "expected"),
    [
        (["a"], [5.0], {"a": [1, 1, 5, 5], "b": [2, 2, None, None], "c": [3, 3, None, None]}),
        (["c", "a"], [4.0, 5.0], {"a": [1, 1, 5, 5], "b": [2, 2, None, None], "c": [3, 3, 4, 4]}),
        (
            ["x", "y", "z", "b"],
            [5.0, 6.0, 7.0, 8.0],
            {"a": [1, 1, None, None], "b": [2, 2, 8, 8], "c": [3, 3, None, None]}
            | {"x": [None, None, 5, 5], "y": [None, None, 6, 6], "z": [None, None, 7, 7]},
        ),
    ],
)
def test_columns_keep_their_rows_after_a_resume_with_other_gradients(tmp_path, names, gradients, expected):
    pytest.importorskip("matplotlib")
    path = tmp_path / "run.jsonl"
    record(path, ["a", "b", "c"], ([1.0, 2.0, 3.0], 4))
    record(path, names, (gradients, 2), first=2)
    assert rows_of(load(path)) == expected
    assert command.main(["plot", str(path)]) == 0


def test_rows_that_no_column_has_are_forgotten(tmp_path):
    path = tmp_path / "run.jsonl"
    record(path, ["a", "b", "c"], ([1.0, 2.0, 3.0], 4))
    record(path, ["b", "x"], ([5.0, 6.0], 2))
    assert rows_of(load(path)) == {"b": [5, 5], "x": [6, 6]}
    record(path, ["y", "b"], ([None, 7.0], 1))  # named first once it has a gradient
    assert rows_of(load(path)) == {"b": [7]}


def test_a_thinned_heat_map_begins_where_its_spans_do(tmp_path):
    """A span is forgotten whole, so the columns of its earlier steps are too."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "run.jsonl"
    record(path, ["a"], ([1.0], 100))
    record(path, ["a"], ([2.0], 20), first=50)
    for size in (2, 4, 16):
        history = load(path, size=size)
        ends, _ = history.cells()
        assert all(end <= history.spans[0].last or end > history.spans[0].first for end in ends)
        assert ends == sorted(set(ends)) and ends[0] >= history.spans[0].first and ends[-1] == history.last == 69
        draw(history, tmp_path / f"{size}.png")


# Damaged, or something else


HEADER = {"fastclip": "1", "norm_type": 2.0, "rows": ["a", "b"]}
STEP = {
    "step": 0, "loss": 1.0, "total_norm": 1.0, "limit": 1.0, "coef": 1.0, "clipped": False, "skipped": False,
    "nonfinite": 0, "row_norms": [1.0, None],
}  # fmt: skip
WARNING = {"step": 0, "warning": "spike", "message": "loud"}


def written(path, *found):
    path.write_text("".join(json.dumps(line) + "\n" for line in found))


@pytest.mark.parametrize(
    ("found", "complaint"),
    [
        (({**HEADER, "rows": None},), "line 1: .* rows must be a list, got None"),
        (({**HEADER, "rows": "ab"},), "rows must be a list, got 'ab'"),
        (({**HEADER, "rows": [["a"], {}]},), r"rows must be different names, got \[\['a'\], {}\]"),
        (({**HEADER, "rows": ["a", "a"]},), "rows must be different names"),
        (({**HEADER, "rows": [1, 2]},), "rows must be different names"),
        (({**HEADER, "norm_type": "x"},), "norm_type must be a number, got 'x'"),
        (({**HEADER, "norm_type": -1},), "norm_type must be >= 0, got -1"),
        (({**HEADER, "norm_type": NAN},), "norm_type must be >= 0, got nan"),
        (({"fastclip": "1"},), "'rows' is missing"),
        ((HEADER, {**STEP, "step": "0"}), "line 2: .* step must be an int from 0 to 9223372036854775807, got '0'"),
        ((HEADER, {**STEP, "step": True}), "step must be an int"),
        ((HEADER, {**STEP, "step": 0.5}), "step must be an int"),
        ((HEADER, {**STEP, "step": -1}), "step must be an int"),
        ((HEADER, {**STEP, "step": 10**400}), "step must be an int .* got 1000000000000000"),
        ((HEADER, {**STEP, "loss": [1.0]}), r"loss must be a number, got \[1.0\]"),
        ((HEADER, {**STEP, "loss": None}), "loss must be a number, got None"),
        ((HEADER, {**STEP, "coef": {}}), "coef must be a number, got {}"),
        ((HEADER, {**STEP, "total_norm": True}), "total_norm must be a number, got True"),
        ((HEADER, {**STEP, "limit": 10**400}), "limit must be a number that a float can hold"),
        ((HEADER, {**STEP, "nonfinite": "many"}), "nonfinite must be a number, got 'many'"),
        ((HEADER, {**STEP, "clipped": 7}), "clipped must be a bool, got 7"),
        ((HEADER, {**STEP, "skipped": "no"}), "skipped must be a bool, got 'no'"),
        ((HEADER, {**STEP, "row_norms": 3}), "row_norms must be a list, got 3"),
        ((HEADER, {**STEP, "row_norms": [1, 2, 3]}), "row_norms has 3 numbers, and there are 2 rows"),
        ((HEADER, {**STEP, "row_norms": [1, [2]]}), r"row_norms must be a number, got \[2\]"),
        ((HEADER, STEP, {**WARNING, "warning": ["x"]}), r"line 3: .* warning must be a str, got \['x'\]"),
        ((HEADER, STEP, {**WARNING, "message": None}), "message must be a str, got None"),
        ((HEADER, STEP, {**WARNING, "step": INF}), "step must be an int"),
        ((HEADER, STEP, {"rows": 3}), "rows must be a list, got 3"),
        (([HEADER],), "line 1: not a whole line of JSON .list where an object should be"),
        ((STEP, HEADER), "line 1: .* begins with a header"),
    ],
)
def test_fields_of_other_types_are_refused(tmp_path, capsys, found, complaint):
    path = tmp_path / "run.jsonl"
    written(path, *found, *[{**STEP, "step": 5}] * 2)
    with pytest.raises(ValueError, match=complaint):
        load(path)
    assert command.main(["plot", str(path)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(path) in said and len(said) < 400


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\n", b"\0" * 1000, bytes(range(256)) * 10, b"[" * 100_000, b'{"a":' * 100_000,
        b"\xff\xfe{}", b"1" * 10_000, b'{"fastclip": "0.1.0", "sta', b'{"fastclip": "1", "rows": ["a"',
        b"null\n", b'"text"\n', b"{}\n",
    ],
    ids=range(13),
)  # fmt: skip
def test_what_is_no_record_is_one_line_of_complaint(tmp_path, capsys, data):
    path = tmp_path / "run.jsonl"
    path.write_bytes(data)
    assert command.main(["plot", str(path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_paths_that_cannot_be(tmp_path, capsys):
    path = tmp_path / "run.png"
    record(path, ["a"], ([1.0], 2))
    before = path.read_bytes()
    for arguments, said in [
        ([tmp_path], "directory"),
        (["/"], "name"),
        (["."], "name"),
        ([path], "is the record itself"),
        ([path, "-o", tmp_path / "." / "run.png"], "is the record itself"),
        ([path, "-o", tmp_path], "path must end in .png"),
        ([path, "-o", tmp_path / "no" / "run.png"], "No such file"),
    ]:
        assert command.main(["plot", *map(str, arguments)]) == 1
        found = capsys.readouterr().err
        assert said in found and found.count("\n") == 1
    assert path.read_bytes() == before


WHOLE = [
    HEADER,
    *({**STEP, "step": i, "loss": "nan" if i == 3 else 1.0} for i in range(4)),
    WARNING,
    {"rows": ["a", "b", "c"]},
    {**STEP, "step": 4, "row_norms": [1.0, "inf", 2.0]},
    {**HEADER, "rows": ["c", "d"]},
    {**STEP, "step": 2},
]
ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(10**300, 10**320) | st.floats() | st.text(max_size=3)
    | st.sampled_from(["nan", "inf", "-inf", "a", 2**63, 2**63 - 1, 1e308, -1e308, 5e-324]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*STEP, *HEADER]), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@st.composite
def damaged(drawn):
    """A record with a few values, keys or lines of another kind."""
    found = [dict(line) for line in WHOLE]
    for _ in range(drawn(st.integers(1, 4))):
        line = drawn(st.sampled_from(found))
        key = drawn(st.sampled_from([*HEADER, *STEP, *WARNING]))
        what = drawn(st.sampled_from(["set", "set", "delete", "swap", "copy"]))
        if what == "set":
            line[key] = drawn(ODD)
        elif what == "delete":
            line.pop(key, None)
        elif what == "swap":
            found.reverse()
        else:
            found.append(dict(line))
    return "".join(json.dumps(line) + "\n" for line in found).encode()


@st.composite
def cut_up(drawn):
    """The bytes of a record with some replaced, inserted or left out."""
    data = bytearray("".join(json.dumps(line) + "\n" for line in WHOLE).encode())
    for _ in range(drawn(st.integers(1, 6))):
        at = drawn(st.integers(0, len(data)))
        data[at : at + drawn(st.integers(0, 3))] = drawn(
            st.binary(max_size=3) | st.sampled_from([b"\n", b'"', b"9" * 50])
        )
    return bytes(data[: drawn(st.none() | st.integers(0, len(data)))])


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@FUZZ
@given(data=damaged() | cut_up())
def test_load_fails_in_two_ways_only(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(data)
    try:
        history = load(path)
    except (OSError, ValueError):
        return
    ends, cells = history.cells()
    assert cells.shape == (len(history.rows), len(ends)) and history.spans
    assert ends == sorted(set(ends)) and all(end >= history.spans[0].first for end in ends)


@settings(FUZZ, max_examples=25)
@given(data=damaged())
def test_what_can_be_loaded_can_be_drawn(tmp_path_factory, data):
    pytest.importorskip("matplotlib")
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(data)
    try:
        history = load(path)
    except ValueError:
        return
    draw(history, path.with_suffix(".png"))


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": 1.7e308}, {"loss": -1.7e308}, {"total_norm": 1.7e308}, {"total_norm": 5e-324}, {"total_norm": -1.0},
        {"limit": -1.0}, {"limit": 1.7e308}, {"limit": INF}, {"coef": 1e300}, {"step": 2**63 - 1},
        {"row_norms": [1e308, 5e-324]}, {"row_norms": [-1.0, 3.4e38]}, {"row_norms": [0.0, 3.4028234663852886e38]},
    ],
    ids=str,
)  # fmt: skip
def test_extreme_numbers_are_drawn(tmp_path, changes):
    pytest.importorskip("matplotlib")
    path = tmp_path / "run.jsonl"
    written(path, HEADER, STEP, {**STEP, "step": 1}, {**STEP, "step": 2, **changes})
    assert command.main(["plot", str(path)]) == 0


def test_names_are_no_formulas(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "a$_$b.jsonl"
    written(path, {**HEADER, "rows": ["$\\frac$", "\ud800\n\tb"]}, STEP, {**WARNING, "warning": "$\\bad{$"})
    assert command.main(["plot", str(path)]) == 0


def test_norms_beyond_float32_are_finite(tmp_path):
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    p.grad = torch.full_like(p, 1e100)
    with GradMonitor(tmp_path / "run.jsonl") as monitor:
        monitor.update(fastclip.Clipper([("a", p)], INF).clip_())
    for history in (monitor.history, load(tmp_path / "run.jsonl")):
        assert history.cells()[1].isfinite().all()


# One writer


def test_a_file_has_one_writer(tmp_path):
    path = tmp_path / "run.jsonl"
    model, monitor = Model("a"), GradMonitor(path)
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    for same in (path, str(path), link):
        with pytest.raises(ValueError, match=f"path {str(same)!r} is open in another monitor of this process"):
            GradMonitor(same)
    monitor.update(model.step(1.0))
    monitor.close()
    with GradMonitor(path) as second:
        second.update(model.step(2.0), step=1)
    assert [line["total_norm"] for line in steps_of(path)] == [1, 2]
    path.rename(tmp_path / "old.jsonl")
    with GradMonitor(tmp_path / "old.jsonl"), GradMonitor(path):
        pass


OTHER = """
import sys, torch, fastclip
try:
    monitor = fastclip.monitor.GradMonitor(sys.argv[1])
except ValueError as error:
    print("refused:", error)
else:
    print("accepted")
"""


@pytest.mark.skipif(os.name == "nt", reason="needs fcntl")
def test_a_file_has_one_writer_among_processes(tmp_path):
    def other():
        run = subprocess.run([sys.executable, "-c", OTHER, str(path)], capture_output=True, text=True, cwd=ROOT)
        assert run.returncode == 0, run.stderr
        return run.stdout

    path = tmp_path / "run.jsonl"
    with GradMonitor(path, rows_every=1) as monitor:
        for i in range(4):
            monitor.update(Model("a").step(i))
        load(path)  # closes a handle of the file, with which the lock would go
        with pytest.raises(ValueError, match="open in another monitor"):
            GradMonitor(path)
        assert f"refused: path {str(path)!r} is open in a monitor of another process" in other()
    assert other() == "accepted\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_writes_nothing(tmp_path):
    path = tmp_path / "run.jsonl"
    model, monitor = Model("a", limit=INF), GradMonitor(path)
    for i in range(6):  # two of them are still to be taken up
        monitor.update(model.step(i))

    def forked(sender):
        with quiet():
            monitor._ended()  # as at its exit
            monitor.update(model.step(7))
            monitor.close()
        sender.send([notice.kind for notice in monitor._history.warnings])

    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=forked, args=(sender,))
    process.start()
    process.join(120)
    assert process.exitcode == 0 and receiver.recv() == ["file"]
    assert len(steps_of(path)) == 4
    monitor.close()
    assert [line["step"] for line in steps_of(path)] == [*range(6)]


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_0_writes_unless_asked(tmp_path, monkeypatch, rank, asked):
    path, called = tmp_path / "run.jsonl", []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    writes = asked or rank == 0
    folders = [] if writes else [tmp_path / "events"]  # which TensorBoard, if there is one, would make
    with GradMonitor(path, log=[lambda *given: called.append(given), *folders], every_rank=asked) as monitor:
        monitor.update(Model("a").step(1))
        copied = copy.deepcopy(monitor)
    copied.update(Model("a").step(2))
    copied.close()
    assert path.exists() == writes and not (tmp_path / "events").exists()
    assert monitor.history.last == 0 and len(called) == (1 if writes else 0)
    if not writes:
        with GradMonitor(path), GradMonitor(path):
            pass


def test_a_monitor_made_before_the_process_group_writes_as_its_rank(tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    monitor = GradMonitor(path)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    with monitor:
        monitor.update(Model("a").step(1))
    assert monitor.history.last == 0 and lines(path) == []


# The end


@pytest.mark.parametrize("cycle", [False, True])
def test_a_collected_monitor_writes_its_last_steps(tmp_path, cycle):
    path = tmp_path / "run.jsonl"
    model, monitor = Model("a"), GradMonitor(path)
    for _ in range(monitor.TOGETHER + 2):
        monitor.update(model.step(1))
    left = weakref.ref(monitor)
    if cycle:
        monitor.itself = monitor
    del monitor
    gc.collect()
    assert left() is None and [line["step"] for line in steps_of(path)] == [*range(6)]
    with GradMonitor(path):
        pass


def test_no_exit_entry_remains(tmp_path):
    """An entry would keep what it calls."""
    entries = []
    for i in range(8):
        monitor = GradMonitor(tmp_path / f"{i % 2}.jsonl")
        monitor.update(Model("a").step(1))
        if i % 2:
            monitor.close()
        copied = copy.deepcopy(monitor)
        entries += [weakref.ref(monitor._at_exit), weakref.ref(copied._at_exit)]
        assert all(entry() is not None for entry in entries[-2:])
        del monitor, copied
    gc.collect()
    assert [entry() for entry in entries] == [None] * 16


# Copies


COPIES = {"pickle": lambda monitor: pickle.loads(pickle.dumps(monitor)), "deepcopy": copy.deepcopy, "copy": copy.copy}


@pytest.fixture(params=COPIES)
def copied(request):
    return COPIES[request.param]


def run_of(monitor, steps, model):
    with quiet():
        for scale in steps:
            monitor.update(model.step(scale, 0.0, NAN if scale == 13 else 1.0), scale)


def test_a_copy_knows_what_the_monitor_knew(copied):
    """And goes on alike: the same warnings, spans and columns."""
    torch.manual_seed(1)
    norms = torch.rand(300).add(0.5).tolist()
    norms[120] = norms[280] = 13  # both broken; the second is heard of by neither
    options = {"rows_every": 3, "history": 32, "window": 50, "adam_eps": 1e-3, "elements": 9, "rows": 2}
    model = Model(["x.a", "x.b", "y.a"], limit=0.9)
    whole, first = GradMonitor(**options), GradMonitor(**options)
    run_of(whole, norms, model)
    run_of(first, norms[:150], model)
    second = copied(first)
    run_of(second, norms[150:], model)
    assert second.last == whole.last and second.history.spans == whole.history.spans
    assert second.warnings == whole.warnings != []
    assert (second.skips, second.clip_rate, second.missed) == (whole.skips, whole.clip_rate, 0)
    assert second.history.cells()[0] == whole.history.cells()[0] and second.history.rows == whole.history.rows
    torch.testing.assert_close(second.history.cells()[1], whole.history.cells()[1], equal_nan=True, rtol=0, atol=0)
    assert first.history.last == 149, "the copy's steps must not come back to the monitor"


def test_a_copy_goes_on_in_the_file_once_it_is_free(tmp_path, copied):
    path, model = tmp_path / "run.jsonl", Model("a", limit=INF)
    monitor = GradMonitor(path)
    for i in range(6):
        monitor.update(model.step(i))
    second = copied(monitor)
    assert len(steps_of(path)) == 6, "what is on its way belongs to the monitor"
    monitor.close()
    for i in range(6, 8):
        second.update(model.step(i))
    second.close()
    assert [line["total_norm"] for line in steps_of(path)] == [*range(8)]
    assert sum("fastclip" in line for line in lines(path)) == 2
    assert [span.norm.mean for span in load(path).spans] == [*range(8)]
    third = copied(second)  # of one that is closed
    assert third.history.last == 7
    with pytest.raises(RuntimeError, match="after close"):
        third.update(model.step(1))


def test_a_file_that_a_monitor_writes_is_not_its_copys(tmp_path, copied):
    path, model = tmp_path / "run.jsonl", Model("a", limit=INF)
    with GradMonitor(path) as monitor:
        for i in range(4):
            monitor.update(model.step(i))
        second = copied(monitor)
        second.update(model.step(9))
        with pytest.warns(GradientWarning, match="the record ends here.*is open in another monitor of this process"):
            second.close()
        monitor.update(model.step(4))
    assert [line["total_norm"] for line in steps_of(path)] == [*range(5)]
    assert second.history.last == 4 and [notice.kind for notice in second.warnings] == ["file"]


@pytest.mark.parametrize("who", ["monitor", "copy"])
def test_of_a_monitor_that_wrote_nothing_and_its_copy_the_first_to_write_has_the_file(tmp_path, copied, who):
    path, model = tmp_path / "run.jsonl", Model("a", limit=INF)
    monitor = GradMonitor(path)
    both = [monitor, copied(monitor)]
    first, other = both if who == "monitor" else both[::-1]
    for _ in range(first.TOGETHER):
        first.update(model.step(1))
    other.update(model.step(2))
    with pytest.warns(GradientWarning, match="is open in another monitor"):
        other.close()
    first.close()
    assert [line["total_norm"] for line in steps_of(path)] == [1] * 4


def spawned(monitor, done):
    monitor.update(Model("a", limit=INF).step(3))
    monitor.close()
    done.put(monitor.history.last)


def test_a_copy_in_another_process_writes(tmp_path):
    path = tmp_path / "run.jsonl"
    monitor = GradMonitor(path)
    context = multiprocessing.get_context("spawn")
    done = context.SimpleQueue()
    process = context.Process(target=spawned, args=(monitor, done))
    process.start()
    process.join(120)
    assert process.exitcode == 0 and done.get() == 0
    assert [line["total_norm"] for line in steps_of(path)] == [3]
    monitor.close()


def test_what_a_copy_logs_to(tmp_path):
    called, model = [], Model("a", limit=INF)
    monitor = GradMonitor(log=lambda scalars, step: called.append(step), log_every=1)
    with copy.deepcopy(monitor) as second:
        second.update(model.step(1))
    assert called == [0]
    with pytest.warns(GradientWarning, match=r"takes only folders along, so these are gone: function\. .* log_to\(\)"):
        third = pickle.loads(pickle.dumps(monitor))
    third.update(model.step(1))
    assert third.history.last == 0 and called == [0]
    third.log_to(lambda scalars, step: called.append((step, scalars["grad/norm"])))
    third.update(model.step(2))
    third.close()
    assert called == [0, (1, 2.0)]


def test_a_pickled_monitor_opens_its_folder_again(tmp_path, monkeypatch):
    class Writer:
        def __init__(self, folder):
            opened.append(folder)
            self.add_scalar = lambda *given: None
            self.close = lambda: opened.append("closed")

    opened = []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type("", (), {"SummaryWriter": Writer}))
    monitor = GradMonitor(log=tmp_path)
    copied = pickle.loads(pickle.dumps(monitor))
    assert opened == [str(tmp_path)], "a copy that sees no step leaves nothing in the folder"
    copied.update(Model("a").step(1))
    copied.close()
    monitor.log_to(None)
    assert opened == [str(tmp_path), str(tmp_path), "closed", "closed"]


# Around it: other default devices, dtypes and modes


@pytest.mark.parametrize("names", [["x.a", "x.b", "y.a"], None])
def test_under_a_default_device_or_dtype(tmp_path, names):
    pytest.importorskip("matplotlib")

    def run(path):
        parameters = [torch.nn.Parameter(torch.zeros(2, device="cpu", dtype=torch.float32)) for _ in range(3)]
        for parameter, grad in zip(parameters, ([0.0, 0.0], [1.0, 2.0], [NAN, 70_000.0])):
            parameter.grad = torch.tensor(grad, device="cpu", dtype=torch.float32)
        rules = [lambda stats: (stats.tensor_norms > 1).float(), fastclip.rules.GlobalNorm(1.0)]
        clipper = fastclip.Clipper(list(zip(names, parameters)) if names else parameters, rules, nonfinite="zero")
        with quiet(), GradMonitor(path, rows_every=1, rows=2, elements=6) as monitor:
            for _ in range(130):
                parameters[1].grad.fill_(3.0)
                stats = clipper.clip_()
                monitor.update(stats, torch.ones((), device="cpu"))
            found = stats.log(tensors=True)
        monitor.plot(tmp_path / "run.png")
        torch.testing.assert_close(load(path).cells()[1], monitor.history.cells()[1], rtol=1e-3, atol=0)
        return found, rows_of(monitor.history), [notice.kind for notice in monitor.warnings], repr(stats)

    expected = run(tmp_path / "0.jsonl")
    assert "zero" in expected[2]
    try:
        torch.set_default_device("meta")
        assert run(tmp_path / "1.jsonl") == expected
    finally:
        torch.set_default_device(None)
    for i, dtype in enumerate((torch.float64, torch.float16)):
        try:
            torch.set_default_dtype(dtype)
            assert run(tmp_path / f"{2 + i}.jsonl") == expected
        finally:
            torch.set_default_dtype(torch.float32)


def test_in_and_out_of_inference_mode():
    """What was made in inference mode cannot be changed in place outside of it."""
    model, monitor = Model("ab", limit=INF), GradMonitor(rows_every=2)
    for i in range(250):
        with torch.inference_mode(i // 10 % 2 == 0):
            monitor.update(model.step(*((0.0, 1.0) if i else (None, None))))
            with quiet():
                assert monitor.last["step"] == i
    assert [notice.kind for notice in monitor.warnings] == ["zero"]
    with torch.inference_mode():
        inside = GradMonitor(rows_every=1)
    for gradients in ((None, None), (1.0, 2.0), (3.0, 4.0)):
        inside.update(model.step(*gradients))
    assert rows_of(inside.history) == {"a": [None, 1, 3], "b": [None, 2, 4]}


def test_losses_and_steps_of_other_libraries():
    numpy = pytest.importorskip("numpy")
    model, monitor = Model("a"), GradMonitor(log_every=numpy.int64(5), adam_eps=numpy.float32(1e-8))
    kinds = [numpy.float16, numpy.float32, numpy.float64, numpy.longdouble, numpy.int32, numpy.array]
    for step, kind in enumerate(kinds):
        monitor.update(model.step(1.0), kind(2), step=numpy.int32(step))
        assert monitor.last["loss"] == 2 and type(monitor.last["loss"]) is float
        assert monitor.last["step"] == step and type(monitor.last["step"]) is int
    for wrong, error in ((numpy.bool_(True), TypeError), (numpy.complex64(1), TypeError), (10**400, ValueError)):
        with pytest.raises(error, match="loss must be a number"):
            monitor.update(model.step(1.0), wrong)
    with pytest.raises(ValueError, match=r"step must be < 2\*\*63"):
        monitor.update(model.step(1.0), 1.0, 2**63)
    assert monitor.last["step"] == len(kinds) - 1
