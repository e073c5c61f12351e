"""Ways in for those who do not write the line that clips: their framework does, and fastclip takes its place.

- :func:`fastclip.patch_torch` puts fastclip into torch's own functions, which nearly all frameworks call;
- ``python -m fastclip run SCRIPT`` does so around a script, or any command, that stays as it is;
- the modules here hand the clip to a framework's own optimizer step: :mod:`~fastclip.integrations.accelerate`,
  :mod:`~fastclip.integrations.transformers`, :mod:`~fastclip.integrations.lightning`,
  :mod:`~fastclip.integrations.torchtitan`. Each imports its framework, and is itself imported when it is first named.
"""

import importlib
from types import ModuleType

FRAMEWORKS = ("accelerate", "lightning", "torchtitan", "transformers")


def __getattr__(name: str) -> ModuleType:
    if name in FRAMEWORKS:
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            raise AttributeError(f"{__name__}.{name} needs a package that is not installed: {error}") from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *FRAMEWORKS])
