"""Begins every Python process of ``python -m fastclip run``, whose environment has this folder on PYTHONPATH.

It waits for torch to be imported, which it does not do itself, and has fastclip patch it then. Whatever goes wrong, the
process runs on as it would without. A ``sitecustomize`` that this one hides is run first.
"""

from __future__ import annotations

import _thread
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))


class _Watch:
    """A finder that finds nothing itself, but notices when the import of torch is over.

    Where fastclip is what imports torch, it waits for the import of fastclip to be over too.
    """

    def __init__(self) -> None:
        self._looking: int | None = None  # the thread that looks for a module with the other finders
        self._importing = 0  # how many of the two are being imported
        self._has_torch = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in ("torch", "fastclip") or self._looking == _thread.get_ident():
            return None
        self._looking = _thread.get_ident()
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._looking = None
        loader: Any = getattr(spec, "loader", None)
        if loader is not None and "exec_module" not in vars(loader):
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                del loader.exec_module  # of the instance: the class's is there again
                self._execute(execute, module)

            loader.exec_module = exec_module
        return spec

    def _execute(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        self._importing += 1
        try:
            execute(module)
        finally:
            self._importing -= 1
        self._has_torch |= module.__name__ == "torch"
        if self._has_torch and not self._importing and self in sys.meta_path:
            sys.meta_path.remove(self)
            _begin()


def _begin() -> None:
    try:
        if importlib.util.find_spec("fastclip") is None:  # run from a checkout, and this process is elsewhere
            root = os.path.abspath(os.path.join(_HERE, *[os.pardir] * 3))
            if os.path.basename(root) not in ("site-packages", "dist-packages"):  # not another environment's
                sys.path.append(root)
        from fastclip.integrations import launch

        launch.begin(_report or _own_report())
    except Exception as error:  # noqa: BLE001 - the user's program comes first
        print(f"fastclip: not in use in this process, {type(error).__name__}: {error}", file=sys.stderr)


def _own_report() -> Any:
    """The report of this process, from the file beside this one: fastclip may never be imported."""
    spec = importlib.util.spec_from_file_location("_fastclip_report", os.path.join(_HERE, "report.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    report = module.Report()
    report.register()
    return report


def _run_hidden() -> None:
    """The sitecustomize that this process would have had."""
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None:
        sys.modules["sitecustomize"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder or os.curdir) != _HERE]
# The process that tells the user does so also if it never imports torch; others have nothing to tell then.
_report = _own_report() if os.environ.get("FASTCLIP_RUN_MAIN") == str(os.getpid()) else None
if "torch" in sys.modules:  # a .pth file has imported it
    _begin()
else:
    sys.meta_path.insert(0, _Watch())
_run_hidden()
