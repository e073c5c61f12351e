"""The benchmarks: the models' sizes, what a run writes down, what it refuses to time, and what the documents say."""

import importlib.util
import json
import math
import os
import re

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tabulate")
pytest.importorskip("tqdm")

from bench import (
    backward,
    clip,
    distributed,
    goals,
    inputs,
    isas,
    memory,
    method,
    models,
    pictures,
    providers,
    report,
    rules,
    runs,
    step,
)

TENSORS = {
    "resnet50": 161,
    "vit-b16": 152,
    "bert-base": 199,
    "gpt2-124m": 148,
    "gpt2-1.5b": 580,
    "llama-3.2-1b": 146,
    "llama-3-8b": 291,
    "mixtral-8x7b": 995,
    "olmoe-1b-7b": 3219,
}
FIELDS = {
    *("model", "dtype", "tensors", "elements", "input_sets", "in_cache", "mode", "provider", "status", "reason"),
    *("wall_s", "host_s", "device_s", "vs_torch", "gb_per_s", "of_floor", "ops", "launches", "copies", "syncs"),
    *("extra_bytes", "norm_error", "first_call_s"),
}


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch):
    monkeypatch.setattr(method, "LEAST_ROUNDS", 2)
    monkeypatch.setattr(method, "MOST_ROUNDS", 3)


@pytest.fixture
def run_clip(tmp_path):
    """bench.clip with some arguments, in this process; the JSON that it writes."""

    def run(*arguments):
        out = tmp_path / "out.json"
        assert clip.main(["--device", "cpu", "--quick", "--minutes", "1", "--json", str(out), *arguments]) == 0
        return json.loads(out.read_text())

    return run


class Wrong(providers.Torch):
    """Clips to twice the limit."""

    def bind(self, mode, parameters):
        return lambda limit: torch.nn.utils.clip_grad_norm_(parameters, 2 * limit)


@pytest.mark.parametrize("name", TENSORS)
def test_models_have_the_published_size(name):
    model = models.MODELS[name]
    assert model.published is not None
    assert model.elements == model.published
    assert len(model.shapes) == TENSORS[name]


def test_synthetic_models():
    assert models.find("3x5").shapes == [(5,)] * 3
    assert models.MODELS["one-1.5b"].elements == 1_500_000_000
    with pytest.raises(ValueError, match="gpt3"):
        models.find("gpt3")


def test_misaligned_gradients():
    gradients = inputs.Inputs(models.MODELS["misaligned"]._replace(shapes=[(3, 5)] * 4), torch.float32, "cpu", 1)
    assert all(p.grad.data_ptr() % 16 for p in gradients.sets[0])


def test_rows_have_all_fields(run_clip):
    run = run_clip("--models", "20x64,resnet50", "--modes", "triggered", "--providers", "fastclip cpu,torch foreach")
    assert {"machine", "versions", "commit", "threads", "command", "date", "kind", "device", "rows"} <= run.keys()
    assert run["command"].startswith("python -m bench.clip --device cpu --quick")
    assert "out.json" not in run["command"]
    assert len(run["rows"]) == 4
    for row in run["rows"]:
        assert row.keys() == FIELDS
        assert row["status"] == "ok"
        assert row["wall_s"]["p20"] <= row["wall_s"]["median"] <= row["wall_s"]["p80"]
        assert row["host_s"] == row["wall_s"], "on a CPU a call returns when it is done"
        assert row["vs_torch"]["median"] > 0
        assert row["gb_per_s"] > 0
        assert row["ops"] is not None
        assert row["extra_bytes"] < 1 << 20
        assert row["norm_error"] < 1e-4
        assert (row["of_floor"] is None) == row["in_cache"]


def test_every_mode_and_provider(run_clip):
    everyone = "fastclip cpu,fastclip reference,fastclip.Clipper,torch foreach,torch loop"
    run = run_clip("--models", "6x32", "--dtypes", "fp32,bf16,fp16", "--cold", "--providers", everyone)
    assert {row["status"] for row in run["rows"]} == {"ok"}, [row for row in run["rows"] if row["status"] != "ok"]
    assert {row["mode"] for row in run["rows"]} == set(clip.PASSES)
    assert {row["input_sets"] for row in run["rows"]} == {clip.MOST_SETS}


def test_growth(run_clip):
    run = run_clip("--growth")
    assert run["kind"] == "growth"
    assert {row["model"] for row in run["rows"]} >= {"1x1", "100x16"}


def test_wrong_gradients_are_not_timed(run_clip, monkeypatch):
    torch_too = providers.Torch(providers.BASELINE, None)
    monkeypatch.setattr(clip, "providers", lambda device: [torch_too, Wrong("wrong", None)])
    good, wrong = run_clip("--models", "20x64", "--modes", "triggered")["rows"]
    assert (good["provider"], good["status"]) == (providers.BASELINE, "ok")
    assert (wrong["provider"], wrong["status"]) == ("wrong", "wrong")
    assert "gradients are off" in wrong["reason"]
    assert wrong["wall_s"] is None


def test_a_run_that_does_not_fit_is_skipped(run_clip, monkeypatch):
    monkeypatch.setattr(method, "free_bytes", lambda device: 1 << 30)
    rows = run_clip("--models", "llama-3-8b", "--modes", "norm", "--providers", "fastclip cpu")["rows"]
    assert [row["status"] for row in rows] == ["skipped"]
    assert "GiB" in rows[0]["reason"]


@pytest.mark.parametrize("wrong", [["--models", "gpt3"], ["--modes", "fast"], ["--providers", "nobody"]])
def test_refuses_before_measuring(wrong, capsys):
    with pytest.raises(SystemExit):
        clip.main(wrong)
    assert wrong[1] in capsys.readouterr().err


def test_falling_limits_stay_below_the_norm():
    p = torch.nn.Parameter(torch.zeros(1000))
    p.grad = torch.randn(1000).bfloat16().float()
    falling = method.Falling([[p]])
    falling.start()
    for _ in range(20):
        limit = next(falling)
        assert torch.nn.utils.clip_grad_norm_([p], limit) > limit
    assert falling.calls == falling.writes() == 20


def test_step(tmp_path):
    out = tmp_path / "out.json"
    assert step.main(["--device", "cpu", "--models", "5x32", "--minutes", "1", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["optimizer"] for row in rows} == {"AdamW", "SGD"}
    assert {row["provider"] for row in rows} >= {step.BASELINE, "fastclip.clip_norm_ + fused"}
    assert all(row["vs_torch"]["median"] > 0 for row in rows)


def test_rules(tmp_path, capsys):
    path = tmp_path / "rules.json"
    rules.main(["--device", "cpu", "--models", "20x64", "--minutes", "0.05", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert {r["status"] for r in rows} == {"ok"}
    assert next(r for r in rows if r["provider"] == "GlobalNorm")["vs_torch"]["median"] == 1
    table = report.rules_table(rows)
    assert table.count("×") >= len(rows) and "ZClip" in table
    assert "ZClip" in capsys.readouterr().out


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux tells what was resident at most")
def test_memory():
    config = memory.Config(1, 2, 16, "fp32")
    for name in (memory.BASELINE, memory.IN_BACKWARD):
        measured = memory.peak_of_a_step(name, "cpu", config, 4)
        assert 0 < measured["largest_bytes"] < measured["gradient_bytes"] < 2 * measured["largest_bytes"]
    assert sum(p.numel() for p in memory.GPT2(memory.CONFIGS["gpt2-124m"]._replace(layers=1)).parameters()) == (
        sum(map(math.prod, models.gpt2(1, 768)))
    )


@pytest.mark.slow
def test_backward(tmp_path):
    path = tmp_path / "backward.json"
    backward.main(["--quick", "--tokens", "8", "--threads", "1", "--device", "cpu", "--json", str(path)])
    run = json.loads(path.read_text())
    assert [r["provider"] for r in run["rows"]] == [
        backward.BASELINE,
        backward.CLIPPED,
        "fastclip.optim",
        backward.HOOKED,
    ]
    assert run["rows"][0]["step_vs_torch"]["median"] == 1 and all(r["step_s"]["median"] > 0 for r in run["rows"])
    assert "8 tokens" in report.backward_words(run)
    assert 0 < run["rows"][3]["hooks_s"]["median"] < run["rows"][3]["backward_s"]["median"]
    assert report.inside_backward({}, "cpu") == []
    (words,) = report.inside_backward(
        {("backward", "cpu"): run, ("memory", "cpu"): runs.newest()["memory", "cpu"]}, "cpu"
    )
    assert f"{run['rows'][3]['step_vs_torch']['median']:.2f}×" in words and "% of the gradients' bytes less" in words


@pytest.mark.slow
def test_isas():
    rows = isas.rows_here("1x16", 0.1, 1)
    assert {r["dtype"] for r in rows} == set(isas.DTYPES) and len({r["isa"] for r in rows}) == 1
    assert all(r["status"] == "ok" for r in rows)
    rows = [{**r, "of_floor": 0.987} for r in rows]
    assert isas.table(rows).count("99%") == len(runs.MODES) * len(isas.DTYPES)


@pytest.mark.slow
def test_distributed(tmp_path, capsys):
    path = tmp_path / "distributed.json"
    distributed.main(["--quick", "--counts", "20", "--json", str(path)])
    run = json.loads(path.read_text())
    rows = run["rows"]
    ours = [r for r in rows if r["provider"].startswith("fastclip")]
    assert {r["status"] for r in ours} == {"ok"} and {r["case"] for r in ours} == {"host", "messages", "truth"}
    assert all(r["messages"] == 1 for r in ours if r["case"] == "messages")
    assert all(r["error"] < 1e-6 for r in ours if r["case"] == "truth")
    assert "fastclip" in capsys.readouterr().out
    words = report.distributed_words(run) + report.distributed_table(rows) + report.message_table(rows)
    assert "×" in words and "per sharding" in words


def test_the_documents_show_the_committed_results():
    newest = runs.newest()
    assert ("clip", "cpu") in newest
    for path, written in report.texts(newest).items():
        for text in written:
            assert text in path.read_text(), f"{path.name}: run `python -m bench.report`"


def test_the_headline_and_the_brief_table_hold_numbers_of_the_full_one():
    newest = runs.newest()
    full = report.block(newest)
    numbers = re.findall(r"\*\*([\d.]+×)\*\*", report.headline(newest) + report.brief(newest))
    assert len(numbers) == 1 + 2 * len(report.IN_BRIEF)
    assert all(f"**{number}**" in full for number in numbers)


def test_pictures(tmp_path):
    newest = runs.newest()
    text = report.block(newest)
    for name, figure in pictures.draw(newest).items():
        assert f"(bench-{name}.svg)" in text
        assert (pictures.FOLDER / f"bench-{name}.svg").is_file(), "run `python -m bench.report`"
        pictures.save(figure, tmp_path / "1.svg")
        pictures.save(pictures.draw(newest)[name], tmp_path / "2.svg")
        assert (tmp_path / "1.svg").read_bytes() == (tmp_path / "2.svg").read_bytes()


@pytest.mark.parametrize("norm", [0.01, 0.03, 1.0, 1e4])
def test_limits_fall_below_whatever_norm_a_call_leaves(norm):
    """torch's formula leaves a norm that is 1e-6 below the limit, absolutely."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.tensor([norm])
    limits = method.Falling([[parameter]])
    limits.start()
    for _ in range(50):
        limit = next(limits)
        assert 0 < limit < torch.nn.utils.clip_grad_norm_([parameter], limit)


def test_report_of_a_gpu_run():
    """No GPU is needed to see that its part can be written: a CPU run in its clothes, with made-up counts."""
    newest = runs.newest()
    for kind in ("clip", "growth", "step"):
        run = json.loads(json.dumps(newest[kind, "cpu"]))
        run |= {"device": "cuda", "copy_bytes_per_s": 1e12}
        run["machine"] |= {"driver": "0"}
        for row in run["rows"]:
            row["provider"] = row["provider"].replace("fastclip cpu", "fastclip triton")
            if row["status"] == "ok":
                row |= {"launches": 2, "syncs": 0, "copies": 0, "of_floor": 0.5, "device_s": row["wall_s"]}
        newest[kind, "cuda"] = run
    text = report.block(newest)
    assert "not measured" not in text.lower()
    assert "1,000 GB/s" in text
    assert report.brief(newest).count("| GPT-2 124M, bf16 ") == 2 and "not been measured" not in report.brief(newest)
    assert {"cuda-ratio", "cuda-bandwidth", "cuda-growth"} <= pictures.draw(newest).keys()
    assert "of a copy" in goals.goals(newest)


@pytest.mark.parametrize(
    "document", ["Makefile", "README.md", "docs/benchmarks.md", "CONTRIBUTING.md", "bench/NOTES.md"]
)
def test_documented_commands_exist(document):
    text = (method.ROOT / document).read_text()
    assert not re.findall(r"python3? bench/\S+", text), "the benchmarks are modules: python -m bench.clip"
    for module in re.findall(r"-m (bench\.\w+)", text):
        assert importlib.util.find_spec(module), f"{document} names {module}"
