"""Several ranks on one machine: processes that are forked from a server which has imported everything already."""

import datetime as dt
import multiprocessing
import os
import sys
import tempfile
import traceback

TIMEOUT = 120  # seconds, for all ranks together

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([
    "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel", "sklearn.datasets", "fastclip",
])  # fmt: skip


def run(size, function, *arguments):
    """What ``function(*arguments)`` returns on each of `size` ranks of a gloo world, or an error with their tracebacks.

    `function` must be one of a module, and what it takes and returns must pickle.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = []
        for rank in range(size):
            receiver, sender = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_rank, args=(sender, folder, rank, size, function, arguments), daemon=True
            )
            process.start()
            sender.close()
            results.append((process, receiver))
        values, errors = [], []
        for rank, (process, receiver) in enumerate(results):
            try:
                kind, value = receiver.recv() if receiver.poll(TIMEOUT) else ("error", "no answer in time")
            except EOFError:
                process.join()
                kind, value = "error", f"ended with exit code {process.exitcode}"
            (values if kind == "value" else errors).append(value if kind == "value" else f"rank {rank}: {value}")
        for process, _ in results:
            process.kill() if errors else process.join()
        assert not errors, "\n".join(errors)
        return values


def _rank(sender, folder, rank, size, function, arguments):
    import torch
    import torch.distributed as dist

    try:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        torch.set_num_threads(1)
        torch.manual_seed(0)
        timeout = dt.timedelta(seconds=TIMEOUT / 2)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timeout
        )
        value = function(*arguments)
        dist.barrier()
        sender.send(("value", value))
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - the test that waits for this rank shows it
        sender.send(("error", traceback.format_exc()))
        sys.exit(1)
