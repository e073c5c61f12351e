"""README and the pages of docs/: every snippet runs, as it stands, in the order of its page, and no link is broken.

A block of `python` or `sh` runs. Other languages are shown only: `text` and `console` for what cannot run here
(installs, other projects' scripts), `json` for data. In comments, which no reader sees:

    <!-- test:
    python that runs at this place
    -->
    <!-- test: needs cuda -->      before a block: without CUDA it is compiled and not run
"""

import importlib.util
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch

import fastclip

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *DOCS.rglob("*.md"))
               if "_build" not in path.parts)  # fmt: skip
NEEDS = {
    "docs/guides/README.md": ["matplotlib", "accelerate"],  # the second only because its commands take long
    "docs/guides/plain.md": [],
    "docs/guides/accelerate.md": ["accelerate"],
    "docs/guides/transformers.md": ["transformers", "accelerate", "trl", "peft", "datasets"],
    "docs/guides/lightning.md": ["lightning"],
    "docs/guides/timm.md": ["timm"],
    "docs/guides/torchtitan.md": ["torchtitan"],
    "docs/guides/stable_baselines3.md": ["stable_baselines3", "gymnasium"],
    "docs/monitor.md": ["matplotlib"],
}
SHOWN = ("text", "console", "json")
BLOCK = re.compile(r"^```([\w{}-]*)\n(.*?)^```$|^<!-- test:(.*?)-->$", flags=re.MULTILINE | re.DOTALL)


def blocks(page):
    """(language, text) of the page's fenced blocks and of its hidden ones, and "" before one that needs CUDA."""
    for match in BLOCK.finditer((ROOT / page).read_text()):
        language, text, hidden = match.groups()
        if hidden is None:
            yield language, text
        else:
            yield ("needs", hidden.split()[1]) if hidden.startswith(" needs ") else ("python", hidden)


def run_commands(text):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    packages = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # the fastclip of this tree
    environment = {**os.environ, "PATH": path, "PYTHONPATH": packages}
    for line in text.splitlines():
        done = subprocess.run(line, shell=True, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        if "fastclip run" in line:
            assert re.search(r"^fastclip: \d+ clips by ", done.stderr, flags=re.MULTILINE), done.stderr


def test_every_guide_is_named():
    guides = {page for page in PAGES if page.startswith("docs/guides/")}
    assert guides <= set(NEEDS) <= set(PAGES)
    index = (DOCS / "guides" / "README.md").read_text()
    assert all(f"({Path(page).name})" in index for page in guides if page != "docs/guides/README.md")


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120, "what is longer belongs to a page of docs/"


def test_blocks_are_of_known_languages():
    for page in PAGES:
        for language, _ in blocks(page):
            assert language in ("python", "sh", "needs", *SHOWN) or language.startswith("{"), (page, language)


def has_code(page):
    return any(language in ("python", "sh") for language, _ in blocks(page))


@pytest.mark.parametrize("page", list(filter(has_code, PAGES)))
@pytest.mark.filterwarnings("ignore")
def test_the_snippets_run(page, tmp_path, monkeypatch):
    missing = [name for name in NEEDS.get(page, ()) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: make test-integrations")
    if page.endswith("/timm.md"):
        sys.path.insert(0, str(Path(__file__).parent / "integrations"))
        import trainings

        trainings.timm_dispatch_clip_grad()  # also without torchvision
    if page.endswith("/torchtitan.md"):  # whose function the page replaces
        utils = importlib.import_module("torchtitan.distributed.utils")
        monkeypatch.setattr(utils, "clip_grad_norm_", utils.clip_grad_norm_)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    names = {"__name__": "guide"}
    runs = True  # the next block
    try:
        for language, text in blocks(page):
            if language == "needs":
                runs = torch.cuda.is_available()
                assert text == "cuda"
                continue
            if language == "sh":
                run_commands(text)
            elif text.startswith("# train.py\n"):
                Path("train.py").write_text(text)
            elif language == "python":
                code = compile(text, page, "exec")
                if runs:
                    exec(code, names)
            runs = True
    finally:
        fastclip.unpatch_torch()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if "accelerate" in sys.modules:  # one state for all Accelerators of a process
            importlib.import_module("accelerate.state").AcceleratorState._reset_state(True)


def prose(page):
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(text):
    """Of the headings of a page, as GitHub and the site make them."""
    for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE):
        kept = [c for c in heading.lower() if c in " -_" or unicodedata.category(c)[0] in "LN"]
        yield "".join(kept).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "bench/NOTES.md"])
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(ROOT / page)):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), f"{page} links to {link}"
        if anchor:
            assert anchor in anchors(prose(target)), f"{page} links to {link}"
