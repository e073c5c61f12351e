"""The choice between backends, and what they share."""

import asyncio
import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch

from fastclip import backends
from fastclip.backends import cpu, current, packers, use_backend


@pytest.fixture(autouse=True)
def _auto():
    use_backend("auto")
    yield
    assert current() == "auto"
    use_backend("auto")


class Worker:
    """A thread that runs what it is given, one thing at a time, and returns what that gave."""

    def __enter__(self):
        self._asked, self._done, self._task = threading.Semaphore(0), threading.Semaphore(0), None
        self._thread = threading.Thread(target=self._work)
        self._thread.start()
        return self

    def _work(self):
        while self._asked.acquire() and self._task is not None:
            self._result = self._task()
            self._done.release()

    def __call__(self, task):
        self._task = task
        self._asked.release()
        assert self._done.acquire(timeout=60)
        return self._result

    def __exit__(self, *_):
        self._task = None
        self._asked.release()
        self._thread.join()


def test_blocks_in_two_threads_know_nothing_of_each_other():
    with Worker() as one, Worker() as two:
        blocks = {one: contextlib.ExitStack(), two: contextlib.ExitStack()}
        one(lambda: blocks[one].enter_context(use_backend("reference")))
        two(lambda: blocks[two].enter_context(use_backend("cpu")))
        assert (one(current), two(current), current()) == ("reference", "cpu", "auto")
        one(blocks[one].close)
        assert (one(current), two(current), current()) == ("auto", "cpu", "auto")
        two(blocks[two].close)
        assert (one(current), two(current), current()) == ("auto", "auto", "auto")


def test_a_block_about_to_be_entered_is_seen_by_nobody():
    """Between its constructor and __enter__ another thread may run."""
    with Worker() as other:
        block = use_backend("reference")
        assert other(current) == "auto"
        with block:
            assert (other(current), current()) == ("auto", "reference")
        assert (other(current), current()) == ("auto", "auto")


def test_a_plain_call_holds_for_all_threads_but_those_in_a_block():
    with Worker() as one, Worker() as two, contextlib.ExitStack() as block:
        one(lambda: block.enter_context(use_backend("cpu")))
        use_backend("reference")
        assert (one(current), two(current), current()) == ("cpu", "reference", "reference")
        two(lambda: [use_backend("triton"), None][1])
        assert (one(current), two(current), current()) == ("cpu", "triton", "triton")
        one(block.close)
        assert one(current) == "triton"
        use_backend("auto")


def test_a_plain_call_whose_result_is_kept():
    """As an interactive session keeps it: it counts once somebody asks, and of several the latest does."""
    with Worker() as other:
        kept = [use_backend("reference"), use_backend("cpu")]
        assert current() == "cpu"
        assert other(current) == "cpu"
        kept.append(use_backend("triton"))
        use_backend("auto")
        assert (other(current), current()) == ("auto", "auto")
        del kept
        assert (other(current), current()) == ("auto", "auto")


def test_one_object_entered_again_and_in_two_threads():
    block = use_backend("reference")
    with Worker() as other:
        with block:
            with use_backend("cpu"), block:
                assert current() == "reference"
            other(block.__enter__)
            assert other(current) == "reference"
            other(lambda: block.__exit__(None, None, None))
            assert (other(current), current()) == ("auto", "reference")
        with pytest.raises(KeyError), block:
            raise KeyError
        assert current() == "auto"


def test_blocks_of_generators_end_in_any_order():
    def generator(name):
        with use_backend(name):
            yield current()

    one, two = generator("reference"), generator("cpu")
    assert (next(one), next(two)) == ("reference", "cpu")
    one.close()
    assert current() == "cpu"
    two.close()
    assert current() == "auto"
    with Worker() as other:
        elsewhere = generator("reference")
        assert other(lambda: next(elsewhere)) == "reference"
        elsewhere.close()
        assert (other(current), current()) == ("auto", "auto")


def test_blocks_of_two_tasks():
    async def task(name, barrier):
        with use_backend(name):
            await barrier()
            return current()

    async def both():
        turns = [asyncio.Event(), asyncio.Event()]

        async def first():
            turns[0].set()
            await turns[1].wait()

        async def second():
            await turns[0].wait()
            turns[1].set()

        found = await asyncio.gather(task("reference", first), task("cpu", second))
        return [*found, current()]

    assert asyncio.run(both()) == ["reference", "cpu", "auto"]


def test_many_calls_leave_nothing_behind():
    for _ in range(1000):
        use_backend("auto")
        with use_backend("cpu"):
            pass
    assert len(backends.choice._context.get()) <= 1


def test_a_wrong_name_changes_nothing():
    with pytest.raises(ValueError, match="name must be one of triton, cuda, cpu, reference or auto, got 'gpu'"):
        use_backend("gpu")
    assert current() == "auto"


def test_capturing_asks_about_the_device_it_is_given(monkeypatch):
    """A graph that is captured on one GPU says nothing about what is launched on another."""
    at = [0]

    @contextlib.contextmanager
    def device(which):
        before, at[0] = at[0], which.index
        yield
        at[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: at[0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: at[0] == 1)
    asked = [torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cuda")]
    assert [backends.capturing(d) for d in asked] == [False, False, True, False]
    at[0] = 1
    assert [backends.capturing(d) for d in asked] == [False, False, True, True]
    assert at == [1]


def test_an_instruction_set_that_this_cpu_lacks_is_told(monkeypatch):
    lesser = packers.get()._replace(kernels=SimpleNamespace(isa=lambda: "avx2"))
    monkeypatch.setattr(packers, "chosen", lesser)
    monkeypatch.setenv("FASTCLIP_CPU_ISA", "avx512")
    assert cpu.describe().startswith("avx2 (FASTCLIP_CPU_ISA asks for avx512, which this CPU lacks), ")
    monkeypatch.setenv("FASTCLIP_CPU_ISA", "avx2")
    assert cpu.describe().startswith("avx2, ")
