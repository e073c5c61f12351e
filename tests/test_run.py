"""python -m fastclip run: scripts that stay as they are, and everything that they start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastclip
from fastclip import rules
from fastclip.__main__ import main
from fastclip.integrations import launch

pytestmark = pytest.mark.slow
STARTUP = Path(launch.__file__).parent / "startup"

# Binds the name at its import, and clips in itself, in spawned and in forked processes.
TRAIN = '''
"""A script that knows nothing of fastclip."""
import os, sys
import torch
import torch.multiprocessing as mp
from torch.nn.utils import clip_grad_norm_


def clip(limit=0.5):
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    p.grad = torch.tensor([3.0, 4.0], dtype=torch.bfloat16)
    norm = clip_grad_norm_([p], limit)  # of bfloat16 only where it is torch's
    print(norm.item(), norm.dtype, p.grad.tolist())


def child(rank):
    torch.set_num_threads(1)
    clip()


if __name__ == "__main__":
    rank = os.environ.get("RANK")
    if rank is not None:
        torch.distributed.init_process_group("gloo")
    clip()
    if "spawn" in sys.argv:
        mp.spawn(child, nprocs=2)
        fork = mp.get_context("fork").Process(target=child, args=(2,))
        fork.start()
        fork.join()
    if "refused" in sys.argv:
        clip("0.5")
    if rank is not None:
        torch.distributed.destroy_process_group()
    print(__name__, __file__, sys.argv[1:], sys.flags.bytes_warning, sys.stdout.write_through)
    sys.exit(3 if "fail" in sys.argv else 0)
'''


# Looks for torch before it imports it, as transformers does, and clips in a fork alone.
FIRST_FASTCLIP = """
import importlib.util
assert importlib.util.find_spec("torch")
import fastclip
import multiprocessing
import torch


def child():
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    for _ in range(3):
        print(torch.nn.utils.clip_grad_norm_([p], 1.0).dtype, flush=True)


if __name__ == "__main__":
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(TRAIN)
    return path


def started(*command, cwd=None, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    for name in (launch.RULE, launch.RECORD, launch.REPORT, launch.MAIN, "RANK", "PYTHONWARNINGS", "PYTHONUNBUFFERED"):
        env.pop(name, None)
    return subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True)


def report_of(done):
    lines = [line for line in done.stderr.splitlines() if line.startswith("fastclip: ")]
    assert len(lines) == 1, done.stderr
    return lines[0].removeprefix("fastclip: ")


BACKEND = fastclip.backends.choose(fastclip.backends.torch.device("cpu")).name
RUN = (sys.executable, "-m", "fastclip", "run")


def test_a_module_that_goes_on_to_torch(script, tmp_path):
    done = started(*RUN, "--record", "run.jsonl", "-m", "train", "refused", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == [
        "5.0 torch.float32 [0.30078125, 0.400390625]",
        "5.0 torch.bfloat16 [0.30078125, 0.400390625]",
    ]
    reason = "clip_grad_norm_: max_norm must be a number, got str '0.5'"
    assert report_of(done) == f"1 clip by {BACKEND}; 1 call left to torch ({reason})"
    steps = [line for line in map(json.loads, (tmp_path / "run.jsonl").read_text().splitlines()) if "step" in line]
    assert [line["limit"] for line in steps] == [0.5]


def test_a_script_whose_first_import_is_fastclip(tmp_path):
    (tmp_path / "train.py").write_text(FIRST_FASTCLIP)
    done = started(*RUN, "--record", "run.jsonl", "train.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["torch.float32"] * 3
    assert report_of(done) == f"3 clips by {BACKEND}"
    steps = [line for line in map(json.loads, (tmp_path / "run.jsonl").read_text().splitlines()) if "step" in line]
    assert len(steps) == 3  # also of the fork, which multiprocessing ends without atexit


def test_a_command_that_clips_nothing(tmp_path):
    done = started(*RUN, "--rule", "[Mask(1e-8), GlobalNorm(max_norm)]", "--", "sh", "-c", "kill -TERM $$")
    assert done.returncode == 128 + 15
    assert report_of(done).startswith("nothing was clipped: none of torch.nn.utils'")
    assert started(*RUN, "--", "no-such-command").returncode == 127


# ---- the start of each process, with a torch and a fastclip that are quickly imported ----


MAIN = launch.MAIN


def begun(tmp_path, launch="", code="import torch; print(torch.known)", **environment):
    for name, text in {
        "torch/__init__.py": "known = [__loader__.__class__.__name__]\n",
        "fastclip/__init__.py": "import torch\nready = True\n",
        "fastclip/integrations/__init__.py": "import fastclip\nassert fastclip.ready\n",
        "fastclip/integrations/launch.py": launch or PATCHES,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    path = os.pathsep.join([str(STARTUP), str(tmp_path)])
    env = {**os.environ, "PYTHONPATH": path, **environment}
    as_main = ["sh", "-c", f'{MAIN}=$$ exec "$@"', "sh"]  # the process that run became
    command = [*as_main, sys.executable, "-c", code]
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)


PATCHES = "def begin(report):\n    import torch\n    torch.known.append('patched')\n"


@pytest.mark.parametrize(
    "code",
    [
        "import torch",
        "import fastclip, torch",
        "import importlib.util as u; assert u.find_spec('torch') and u.find_spec('fastclip'); import torch",
        "import importlib.util as u; u.find_spec('torch'); import fastclip, torch; import importlib",
        "import importlib, torch, fastclip; known = torch.known; importlib.reload(torch); torch.known[:] = known",
    ],
)
def test_torch_is_patched_once_it_is_imported(tmp_path, code):
    done = begun(tmp_path, code=f"{code}; print(torch.known, torch.__spec__.loader.exec_module)")
    assert done.stdout.startswith("['SourceFileLoader', 'patched'] <bound method") and not done.stderr


def test_a_process_that_does_not_import_torch(tmp_path):
    code = "import sys; print({'torch', 'fastclip'} & {*sys.modules}, [p for p in sys.path if 'startup' in p])"
    done = begun(tmp_path, code=code)
    assert done.stdout.strip() == "set() []" and not done.stderr
    done = begun(tmp_path, code="", FASTCLIP_RUN_REPORT=str(tmp_path / "report"))
    assert done.stderr.startswith("fastclip: nothing was clipped: none of torch.nn.utils'")


def test_a_process_whose_start_imports_torch(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import torch")
    assert begun(tmp_path).stdout.strip() == "['SourceFileLoader', 'patched']"


def test_a_process_where_fastclip_fails_runs_on(tmp_path):
    done = begun(tmp_path, "raise OSError('broken here')")
    assert done.returncode == 0 and done.stdout.strip() == "['SourceFileLoader']"
    assert done.stderr.strip() == "fastclip: not in use in this process, OSError: broken here"


def test_a_process_without_torch_runs_on(tmp_path):
    done = begun(tmp_path, code="import sys; sys.path[:] = []\ntry: import torch\nexcept ImportError as e: print(e)")
    assert done.stdout.strip() == "No module named 'torch'" and not done.stderr


def test_the_sitecustomize_that_is_hidden_runs_too(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('mine', __name__)\n")
    code = "import sys, torch; print(sys.modules['sitecustomize'].__file__, torch.known[-1])"
    done = begun(tmp_path, code=code)
    assert done.stdout.split() == ["mine", "sitecustomize", str(tmp_path / "sitecustomize.py"), "patched"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_does_not_report_for_its_parent(tmp_path):
    code = "import os\nif pid := os.fork(): os.waitpid(pid, 0)"
    done = begun(tmp_path, code=code, FASTCLIP_RUN_REPORT=str(tmp_path / "report"))
    assert done.stderr.count("fastclip:") == 1


# ---- the command line ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to run"),
        (["--"], "nothing to run"),
        (["no_such.py"], "no script 'no_such.py'"),
        (["--rule", "ZClp", "x.py"], "--rule 'ZClp' is neither a number nor made of fastclip's rules (AGC,"),
        (["--rule", "-1", "x.py"], "max_norm must be >= 0, got -1"),
        (["--rule", "ZClip(", "x.py"], "--rule 'ZClip('"),
        (["--rule", "Only(1.0, 'head.*')", "x.py"], "goes by names of parameters"),
        (["--record", "/no/such/folder/run.jsonl", "x.py"], "record: there is no folder"),
    ],
)
def test_a_bad_command_line(arguments, message, capsys):
    assert main(["run", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastclip run: ") and message in error


def test_rules_as_text():
    assert isinstance(launch.rule_of("ZClip"), rules.ZClip)
    assert launch.rule_of(" ZClip(z_max=3) ").z_max == 3
    assert launch.rule_of("0.5") == 0.5
    mask, norm = launch.rule_of("[Mask(1e-8), GlobalNorm(inf, norm_type=inf)]")
    assert mask.threshold == 1e-8 and norm.max_norm == norm.norm_type == float("inf")
    made = launch.rule_of("[ZClip, GlobalNorm(max_norm / 2)]")
    assert isinstance(made(3.0)[0], rules.ZClip) and made(3.0)[1].max_norm == 1.5
    for text in ("print", "().__class__", "'x'", "[]", "__import__('os')", "x := 3", "Rule()"):
        with pytest.raises(ValueError, match="--rule"):
            launch.rule_of(text)
