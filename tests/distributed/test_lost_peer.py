"""The errors by which gloo, NCCL and the store tell that a process is gone become one line; no other error does."""

from types import SimpleNamespace

import pytest
import torch.distributed as dist

from revdeq_lightning.tasks.process_end import lost_peer

TRAINER = SimpleNamespace(world_size=2, global_rank=1)


@pytest.mark.parametrize(
    "error",
    [
        # As they come from PyTorch 2.11 to 2.15 where a machine vanishes: which one depends on the collective.
        RuntimeError(
            "[pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.77.0.2]:1"
        ),
        RuntimeError("Application timeout caused pair closure"),
        RuntimeError("[unbound_buffer.cc:78] Timed out waiting 15000ms for recv operation to complete"),
        RuntimeError("Pair is not connected (10.77.0.1)"),
        RuntimeError("Socket closed [10.77.0.2]:43129"),
        RuntimeError("connect [10.77.0.2]:43129: No route to host"),
        dist.DistBackendError("NCCL error: remote process exited or there was a network error"),
        dist.DistNetworkError("failed to recv, got 0 bytes"),
        ConnectionResetError("[Errno 104] Connection reset by peer"),
    ],
    ids=lambda error: str(error).split("]")[-1][:40],
)
def test_a_lost_process_is_told_in_one_line(error):
    line = lost_peer(error, TRAINER)
    assert line.startswith("rank 1 lost another process, it ended or does not answer (")
    assert "\n" not in line
    assert lost_peer(error, SimpleNamespace(world_size=1, global_rank=0)) is None


@pytest.mark.parametrize(
    "error", [RuntimeError("shape '[2, 3]' is invalid for input of size 5"), OSError(28, "No space")]
)
def test_no_other_error_is(error):
    assert lost_peer(error, TRAINER) is None
