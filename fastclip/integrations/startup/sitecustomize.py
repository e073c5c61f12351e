"""Begins every Python process of ``python -m fastclip run``, whose environment has this folder on PYTHONPATH.

It waits for torch to be imported, which it does not do itself, and has fastclip patch it then. Whatever goes wrong, the
process runs on as it would without. A ``sitecustomize`` that this one hides is run first.
"""

import importlib.machinery
import importlib.util
import os
import sys


class _AfterTorch:
    """A finder that finds nothing itself, but adds to the import of torch what comes after it."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch" or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        loader = getattr(spec, "loader", None)
        if loader is None:
            return spec
        execute = loader.exec_module

        def exec_module(module):
            del loader.exec_module  # of the instance: the class's is there again
            execute(module)
            _begin()

        loader.exec_module = exec_module
        return spec


def _begin():
    try:
        if importlib.util.find_spec("fastclip") is None:  # run from a checkout, and this process is elsewhere
            root = os.path.abspath(os.path.join(_HERE, *[os.pardir] * 3))
            if os.path.basename(root) not in ("site-packages", "dist-packages"):  # not another environment's
                sys.path.append(root)
        from fastclip.integrations import launch

        launch.begin()
    except Exception as error:  # noqa: BLE001 - the user's program comes first
        print(f"fastclip: not in use in this process, {type(error).__name__}: {error}", file=sys.stderr)


def _run_hidden():
    """The sitecustomize that this process would have had."""
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None:
        sys.modules["sitecustomize"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder or os.curdir) != _HERE]
sys.meta_path.insert(0, _AfterTorch())
_run_hidden()
