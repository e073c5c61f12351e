"""The demo, with few steps: what it prints, what it draws, and that Ctrl-C keeps what was done."""

import importlib.util
import pathlib

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tabulate")
pytest.importorskip("tqdm")

pytestmark = pytest.mark.usefixtures("one_thread")
PATH = pathlib.Path(__file__).parent.parent / "examples" / "demo.py"


@pytest.fixture
def demo():
    spec = importlib.util.spec_from_file_location("demo", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def reported(demo, monkeypatch):
    """The runs the demo reports on."""
    seen = []
    report = demo.report
    monkeypatch.setattr(demo, "report", lambda runs, args: (seen.extend(runs), report(runs, args)))
    return seen


def interrupt_at(demo, monkeypatch, call):
    """Ctrl-C when batch() is called for the `call`-th time; the first is the warm-up's."""
    calls = 0
    batch = demo.batch

    def counted(*args):
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return batch(*args)

    monkeypatch.setattr(demo, "batch", counted)


def assert_png(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert 600 <= width <= 2000
    assert 400 <= height <= 2000
    assert 10_000 < len(data) < 1_000_000


def rows(lines):
    """The table's rows: what stands under its rule, up to the first line that is no run's."""
    under = lines[next(i for i, line in enumerate(lines) if line.startswith("---")) + 1 :]
    return [line for line in under if line.startswith(("unclipped", "torch", "fastclip"))]


@pytest.fixture
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_double")
def test_demo(demo, reported, tmp_path, capsys):
    """In float64, where what six steps make of roundings is far below any real difference."""
    out = tmp_path / "picture.png"
    assert demo.main(["--steps", "6", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert_png(out)
    assert lines[-1] == f"Picture: {out}"
    assert [row.split()[0] for row in rows(lines)] == ["unclipped", "torch", "fastclip"]
    assert any("differ by" in line for line in lines)

    unclipped, by_torch, by_fastclip = reported
    assert [len(run.steps) for run in reported] == [6, 6, 6]
    for a, b in ((by_torch.losses, by_fastclip.losses), (by_torch.norms, by_fastclip.norms)):
        torch.testing.assert_close(torch.tensor(b), torch.tensor(a), rtol=1e-9, atol=0)
    assert unclipped.steps[0].loss == by_torch.steps[0].loss, "the runs must start from the same weights and batch"
    assert unclipped.norms[0] == pytest.approx(by_torch.norms[0], rel=1e-9)
    assert unclipped.losses[-1] != by_torch.losses[-1]


def test_interrupt_keeps_what_was_done(demo, reported, monkeypatch, tmp_path, capsys):
    out = tmp_path / "picture.png"
    interrupt_at(demo, monkeypatch, 1 + 6 + 4)
    assert demo.main(["--steps", "6", "--out", str(out)]) == 130
    lines = capsys.readouterr().out.splitlines()
    assert_png(out)
    assert lines[-1] == f"Picture: {out}"
    first, second = rows(lines)
    assert first.startswith("unclipped ")
    assert second.startswith("torch (3 of 6 steps) ")
    assert [len(run.steps) for run in reported] == [6, 3]


@pytest.mark.parametrize("call", [1, 2])
def test_interrupt_before_the_first_step(demo, monkeypatch, tmp_path, capsys, call):
    out = tmp_path / "picture.png"
    interrupt_at(demo, monkeypatch, call)
    assert demo.main(["--steps", "6", "--out", str(out)]) == 130
    assert capsys.readouterr().out.splitlines()[-1] == "Stopped before the first step."
    assert not out.exists()


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        (["--steps", "0"], "--steps"),
        (["--max-norm", "0"], "--max-norm"),
        (["--out", "no/such/a.png"], "folder"),
        (["--out", "a"], ".png"),
    ],
)
def test_refuses_before_training(demo, capsys, wrong, word):
    with pytest.raises(SystemExit):
        demo.main(wrong)
    assert word in capsys.readouterr().err
