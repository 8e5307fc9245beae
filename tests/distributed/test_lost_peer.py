"""The errors by which gloo, NCCL and the store tell that a process is gone become one line; no other error does."""

import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from torch.utils.data import DataLoader

from revdeq_lightning.cli.errors import lost_resource
from revdeq_lightning.cli.process_end import lost_peer

TRAINER = SimpleNamespace(world_size=2, global_rank=1)


DEBUG = "run with NCCL_DEBUG=INFO for details"


def nccl(reason: str, last: str) -> dist.DistBackendError:
    """As PyTorch writes it."""
    place = "/pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94"
    error = f"NCCL error in: {place}, {reason}, NCCL version 2.27.5\nncclError: What it is.\nLast error:\n{last}"
    return dist.DistBackendError(error)


REMOTE = nccl("remote process exited or there was a network error", "socketProgress: Connection closed by remote peer")
REFUSED = nccl(f"unhandled system error ({DEBUG})", "connect to 10.0.0.1<41234> returned Connection refused")


@pytest.mark.parametrize(
    "error",
    [
        # As they come from PyTorch 2.11 to 2.15 where a machine vanishes: which one depends on the collective.
        RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.77.0.2]:1"),
        RuntimeError("Application timeout caused pair closure"),
        RuntimeError("[unbound_buffer.cc:78] Timed out waiting 15000ms for recv operation to complete"),
        RuntimeError("Pair is not connected (10.77.0.1)"),
        RuntimeError("Socket closed [10.77.0.2]:43129"),
        RuntimeError("connect [10.77.0.2]:43129: No route to host"),
        REMOTE,
        REFUSED,
        dist.DistNetworkError("failed to recv, got 0 bytes"),
        ConnectionResetError("[Errno 104] Connection reset by peer"),
    ],
    ids=lambda error: str(error).split("]")[-1][:40],
)
def test_a_lost_process_is_told_in_one_line(error):
    line = lost_peer(error, TRAINER)
    assert line.startswith("rank 1 lost another process, which ended or does not respond (")
    assert "\n" not in line
    assert lost_peer(error, SimpleNamespace(world_size=1, global_rank=0)) is None


@pytest.mark.parametrize(
    "error", [RuntimeError("shape '[2, 3]' is invalid for input of size 5"), OSError(28, "No space")]
)
def test_no_other_error_is(error):
    assert lost_peer(error, TRAINER) is None


def test_the_useful_line_of_nccl_is_told():
    assert "(NCCL error, remote process exited or" in lost_peer(REMOTE, TRAINER)
    assert "socketProgress: Connection closed by remote peer). Its own log" in lost_peer(REMOTE, TRAINER)


@pytest.mark.parametrize(
    ("reason", "last"),
    [
        (f"unhandled system error ({DEBUG})", "Error while creating shared memory segment, error: No space left (28)"),
        ("invalid usage", "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000"),
        (f"unhandled cuda error ({DEBUG})", "Cuda failure 2 'out of memory'"),
    ],
)
def test_what_nccl_cannot_do_here_is_told_without_the_advice_to_go_on(reason, last):
    told = f"NCCL error, {reason}, NCCL version 2.27.5: {last}"
    line = f"rank 1 cannot exchange data with the other processes: {told}"
    assert lost_peer(nccl(reason, last), TRAINER) == line


class Data:
    """One sample, which does not come."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, index):
        if self.error is None:
            time.sleep(1)
        raise self.error


class HubError(Exception):
    """Of a library, with a constructor that PyTorch cannot call in the process that trains."""

    def __init__(self, text, response):
        super().__init__(text)


def error_of_loading(kind, error, **settings):
    """What a loader of that sample raises; its workers end here, not where the error is collected."""
    batches = iter(DataLoader(Data(error), **settings))
    with pytest.raises(kind) as caught:
        next(batches)
    if settings:
        batches._shutdown_workers()
    return caught.value


@pytest.mark.parametrize(
    ("error", "settings", "words"),
    [
        (None, {"num_workers": 1, "timeout": 0.5}, "a data-loading process does not respond: DataLoader timed out"),
        (ConnectionError("hub: Read timed out."), {"num_workers": 1}, "ConnectionError: hub: Read timed out."),
        (HubError("502 timed out", 0), {"num_workers": 1}, "HubError: 502 timed out"),
        # As where a worker ends while it hands a batch over.
        (ConnectionResetError(104, "Connection reset by peer"), {}, "a data-loading process ended: [Errno 104]"),
    ],
    ids=["timeout", "in a worker", "in a worker, not made anew", "handed over"],
)
def test_what_loads_data_is_no_other_rank(error, settings, words):
    caught = error_of_loading((OSError, RuntimeError), error, **settings)
    assert lost_peer(caught, TRAINER) is None
    assert words in lost_resource(caught, "training")


def test_a_mistake_in_the_data_keeps_its_traceback():
    caught = error_of_loading(ZeroDivisionError, ZeroDivisionError("timed out"), num_workers=1)
    assert lost_peer(caught, TRAINER) is lost_resource(caught, "training") is None
