"""The examples with frameworks, with few steps."""

import sys
from pathlib import Path

import pytest
import torch

import fastclip

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

pytestmark = pytest.mark.usefixtures("quiet_frameworks")


def test_hf_trainer(capsys):
    hf_trainer = pytest.importorskip("examples.hf_trainer")
    losses = hf_trainer.main(["--steps", "12", "--device", "cpu"])
    own, ours, resumed = losses.values()
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=0)
    assert len(resumed) == 12 and resumed[-1] < resumed[0]
    assert "ZClip has seen 12 steps" in capsys.readouterr().out


def test_lightning_trainer(tmp_path, capsys):
    lightning_trainer = pytest.importorskip("examples.lightning_trainer")
    own, ours, rule = lightning_trainer.main(["--steps", "12", "--record", str(tmp_path / "run.jsonl")]).values()
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(own.losses), rtol=1e-6, atol=1e-6)
    assert len(rule.losses) == 12 == fastclip.monitor.load(tmp_path / "run.jsonl").last + 1
    assert "python -m fastclip plot" in capsys.readouterr().out
