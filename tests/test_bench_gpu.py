"""What `make gpu` runs, as far as a machine without a GPU can tell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tabulate")
pytest.importorskip("tqdm")

from bench import gpu, gpu_compare, runs

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("names", [None, "sanitize", "clip,step"])
def test_the_limits_of_what_is_run_together_are_within_the_deadline(names, tmp_path):
    listed = gpu.chosen(gpu.parts(tmp_path), names)
    assert sum(part.limit for part in listed) <= gpu.DEADLINE
    assert all(part.seconds < part.limit for part in listed)
    everything = {"build", "tests", "clip", "step", "rules", "monitor", "distributed"}
    expected = {None: everything, "sanitize": {"memcheck", "racecheck"}, "clip,step": {"clip", "step"}}[names]
    assert {part.name for part in listed} == expected
    assert f"of {gpu.DEADLINE} s" in gpu.plan(listed)


def test_parts_that_there_are_not(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "clip,speed"])
    assert "'speed' is none of build, tests, clip" in capsys.readouterr().err


def test_the_plan_needs_no_gpu(capsys):
    assert gpu.main(["--plan"]) == 0
    assert "together" in capsys.readouterr().out


WORK = """
import time
from pathlib import Path
from bench import method
results = method.Results(Path({path!r}), "clip", "cpu", 1, [])
results.add([{{"case": 1}}])
try:
    time.sleep(60)
finally:
    print("ERROR SUMMARY: the end is said")
"""
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('begun', flush=True); time.sleep(60)"


def test_a_part_that_is_stopped_keeps_what_it_has(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gpu, "GRACE", 3)
    path = tmp_path / "rows.json"
    outcome = gpu.run(gpu.Part("clip", [sys.executable, "-c", WORK.format(path=str(path))], 1, 12), 60)
    assert outcome["status"] == "failed" and outcome["said"].startswith("stopped after")
    assert json.loads(path.read_text())["rows"] == [{"case": 1}]
    assert "the end is said" in capfd.readouterr().out


def test_a_part_that_does_not_want_to_stop(monkeypatch, capfd):
    monkeypatch.setattr(gpu, "GRACE", 1)
    outcome = gpu.run(gpu.Part("clip", [sys.executable, "-c", DEAF], 1, 3), 60)
    assert outcome["status"] == "failed" and outcome["said"].startswith("stopped after")
    assert outcome["seconds"] < 10 and "begun" in capfd.readouterr().out


def test_without_time_left_nothing_is_begun():
    outcome = gpu.run(gpu.Part("clip", [sys.executable, "-c", "1 / 0"], 1, 50), 3)
    assert outcome["status"] == "failed" and outcome["said"] == "no time was left"


@pytest.mark.parametrize(
    ("slower", "says"), [(2.0, "take triton: CUDA takes 2.00"), (0.5, "take cuda"), (1.01, "may stay")]
)
def test_triton_beside_cuda(slower, says, tmp_path, capsys):
    """Of a CPU run in the clothes of one on a GPU, in which CUDA takes `slower` times what Triton does."""
    assert gpu_compare.main([str(tmp_path)]) == 1
    run = json.loads(json.dumps(runs.newest()["clip", "cpu"])) | {"device": "cuda"}
    rows = [row for row in run["rows"] if row["provider"] == "fastclip cpu" and row["status"] == "ok"]
    run["rows"] = []
    for row in rows:
        for name, factor in (("triton", 1.0), ("cuda", slower)):
            times = {"median": factor * row["wall_s"]["median"]}
            run["rows"].append(
                {**row, "provider": f"fastclip {name}"} | dict.fromkeys(("wall_s", "host_s", "device_s"), times)
            )
    run["rows"].append({**rows[0], "model": "other", "provider": "fastclip cuda", "status": "wrong"})
    (tmp_path / "cuda-clip.json").write_text(json.dumps(run))
    assert gpu_compare.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert says in out and len(gpu_compare.compared(run["rows"])) == len(rows)


@pytest.mark.long
@pytest.mark.slow
def test_a_dry_run(tmp_path):
    """Every part, at toy sizes; their rows and the record of the run are written."""
    environment = {**os.environ, "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.gpu", "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    outcomes = json.loads((tmp_path / "cuda-run.json").read_text())["rows"]
    assert {outcome["status"] for outcome in outcomes} == {"ok"} and len(outcomes) == 8
    for name in ("clip", "step", "rules", "monitor"):
        rows = json.loads((tmp_path / f"cpu-{name}.json").read_text())["rows"]
        assert rows and not any(row.get("status") in ("failed", "wrong") for row in rows)
