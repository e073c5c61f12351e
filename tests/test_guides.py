"""The guides: every snippet of every page runs, as it stands, in the order of the page."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastclip

FOLDER = Path(__file__).parent.parent / "docs" / "guides"
NEEDS = {
    "README": ["matplotlib", "accelerate"],  # the second only because its commands take long
    "plain": [],
    "accelerate": ["accelerate"],
    "transformers": ["transformers", "accelerate", "trl", "peft", "datasets"],
    "lightning": ["lightning"],
    "timm": ["timm"],
    "torchtitan": ["torchtitan"],
    "stable_baselines3": ["stable_baselines3", "gymnasium"],
}


def blocks(page):
    """(language, text) of the page's fenced blocks."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", (FOLDER / f"{page}.md").read_text(), flags=re.MULTILINE | re.DOTALL)


def test_every_page_is_named():
    assert {path.stem for path in FOLDER.glob("*.md")} == set(NEEDS)
    index = (FOLDER / "README.md").read_text()
    assert all(f"({page}.md)" in index for page in NEEDS if page != "README")


@pytest.mark.parametrize("page", NEEDS)
@pytest.mark.filterwarnings("ignore")
def test_the_snippets_run(page, tmp_path, monkeypatch):
    missing = [name for name in NEEDS[page] if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: make test-integrations")
    if page == "timm":
        sys.path.insert(0, str(Path(__file__).parent / "integrations"))
        import trainings

        trainings.timm_dispatch_clip_grad()  # also without torchvision
    if page == "torchtitan":  # whose function the page replaces
        utils = importlib.import_module("torchtitan.distributed.utils")
        monkeypatch.setattr(utils, "clip_grad_norm_", utils.clip_grad_norm_)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    names = {"__name__": "guide"}
    try:
        for language, text in blocks(page):
            if language == "sh":
                for line in text.splitlines():
                    done = subprocess.run(
                        line, shell=True, env={**os.environ, "PATH": path}, capture_output=True, text=True
                    )
                    assert done.returncode == 0, f"{line}\n{done.stderr}"
                    if "fastclip run" in line:
                        assert re.search(r"^fastclip: \d+ clips by ", done.stderr, flags=re.MULTILINE), done.stderr
            elif text.startswith("# train.py\n"):
                Path("train.py").write_text(text)
            else:
                exec(compile(text, f"{page}.md", "exec"), names)
    finally:
        fastclip.unpatch_torch()
        if "accelerate" in sys.modules:  # one state for all Accelerators of a process
            importlib.import_module("accelerate.state").AcceleratorState._reset_state(True)
