"""Which backend is asked for: one choice of the process, and those of ``with use_backend(...)`` blocks.

A constructor cannot know whether ``__enter__`` will follow. So a new object changes nothing by itself: it counts as a
plain call, which sets the choice of the process, once it is dropped without having been entered (a statement drops it
at once) or once the thread that made it asks for the choice. The choice of a ``with`` block is seen by nobody else.
"""

from __future__ import annotations

import itertools
import os
from contextvars import ContextVar
from types import TracebackType

BACKENDS = ("triton", "cuda", "cpu", "foreach", "reference")

_default = os.environ.get("FASTCLIP_BACKEND") or "auto"  # of the process; checked when it is used
_default_number = -1  # of the plain call that set it
_numbers = itertools.count()

CREATED, ENTERED, OVER = range(3)


class _Choice:
    """What one object asks of a context (a thread, an asyncio task).

    It is marked as over rather than taken out of the context: blocks of generators end in any order, and in other
    threads than they began in.
    """

    __slots__ = ("name", "number", "state")

    def __init__(self, name: str, state: int) -> None:
        self.name, self.state, self.number = name, state, next(_numbers)
        _context.set((*(choice for choice in _context.get() if choice.state != OVER), self))

    def becomes_default(self) -> None:
        """What was created was not entered, so it was a plain call. Of several, the latest counts."""
        global _default, _default_number
        self.state = OVER
        if self.number > _default_number:
            _default, _default_number = self.name, self.number


_context: ContextVar[tuple[_Choice, ...]] = ContextVar("fastclip.use_backend", default=())  # innermost last


def current() -> str:
    """The current choice: "auto" or the name of a backend."""
    choices = _context.get()
    if not choices:
        return _default
    if choices[-1].state != ENTERED:
        for choice in choices:
            if choice.state == CREATED:
                choice.becomes_default()
        choices = tuple(choice for choice in choices if choice.state == ENTERED)
        _context.set(choices)
    return choices[-1].name if choices else _default


class use_backend:
    """Choose the backend of all following calls; as a context manager, until the end of the block.

    A plain call sets the choice of the process, for all threads that are in no such block. A ``with`` block sets it for
    the thread or the asyncio task that it is in, and for no other. The environment variable ``FASTCLIP_BACKEND`` is the
    choice to begin with.

    Args:
        name: ``"triton"``, ``"cuda"``, ``"cpu"``, ``"foreach"``, ``"reference"``, or ``"auto"`` (the best that runs on
            each gradient's device). Gradients that no kernel handles (complex, sparse, views with gaps) go to
            ``reference`` anyway.

    Raises:
        ValueError: no backend has that name. One that cannot run raises RuntimeError, with the reason, when it is used.
    """

    _created: _Choice | None = None

    def __init__(self, name: str) -> None:
        self._name = checked(name, "name")
        self._entered: list[_Choice] = []  # and not yet left
        self._created = _Choice(name, CREATED)

    def __enter__(self) -> None:
        if self._created is not None:
            self._created.state = OVER
            self._created = None
        self._entered.append(_Choice(self._name, ENTERED))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        here = [choice for choice in _context.get() if choice in self._entered]
        choice = here[-1] if here else self._entered[-1]  # a generator may go on in another thread
        self._entered.remove(choice)
        choice.state = OVER
        _context.set(tuple(choice for choice in _context.get() if choice.state != OVER))

    def __del__(self) -> None:
        if self._created is not None and self._created.state == CREATED:
            self._created.becomes_default()


def checked(name: str, argument: str) -> str:
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"{argument} must be one of {', '.join(BACKENDS)} or auto, got {name!r}")
    return name
