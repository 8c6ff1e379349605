"""What a hanging rank returns: the collective that it waits in, by PyTorch's flight recorder."""

import os
import threading
import time
from multiprocessing.connection import Connection

import pytest
import torch
import torch._C._distributed_c10d as c10d
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.multiprocessing.spawn import spawn

from dis_scale.process.machine import free_ports
from dis_scale.training import devices
from pipelines.environment import prepare_group


def hang(rank: int, port: int, answer: Connection) -> None:
    """Finish one collective; then rank 0 begins another, in which the other rank never joins."""
    prepare_group("127.0.0.1", "cpu")
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    devices.check_group(torch.device("cpu"))
    if rank == 0:
        threading.Thread(target=dist.all_reduce, args=(torch.ones(7, 3),), daemon=True).start()
        # The end of the first is noted by another thread, a moment after its result is there.
        while "[[7, 3]]" not in (record := devices.flight_record()) or "number 1," in record:
            time.sleep(0.05)
        answer.send(record)
    else:
        time.sleep(600)


def test_the_collective_that_a_rank_waits_in_is_named() -> None:
    (port,) = free_ports(1)
    receiver, sender = mp.get_context("spawn").Pipe(duplex=False)
    group = spawn(hang, (port, sender), nprocs=2, join=False)
    try:
        assert receiver.poll(120), "no answer"
        record = receiver.recv()
    finally:
        for process in group.processes:
            process.kill()
    assert record.splitlines() == [
        "process group 0: last_completed 1, last_enqueued 2, last_started -1",
        "gloo:all_reduce number 2, sizes [[7, 3]]: scheduled",
    ]


def test_pytorch_for_the_cpu_only_has_a_record_without_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(c10d, "_dump_nccl_trace_json")
    assert isinstance(devices.flight_record(), str)
