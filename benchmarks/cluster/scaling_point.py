"""`python -m benchmarks.cluster.scaling_point RANKS`: seconds of a DDP step and of its all-reduce, and its bytes."""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from torch.nn.parallel import DistributedDataParallel

from revdeq_lightning.models import TransformerConfig
from revdeq_lightning.models.build import SolverConfig, build_language_model

WARMUP, STEPS = 3, 15


class Loss(torch.nn.Module):
    """A wrapper, because DDP calls `forward`."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *batch: torch.Tensor) -> torch.Tensor:
        return self.model.loss(*batch).loss  # type: ignore[operator, no-any-return]


def work(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    settings = yaml.safe_load(Path("configs/lm/default.yaml").read_text())
    data, parts = settings["data"], settings["model"]
    network = TransformerConfig(data["bpe_vocab_size"], data["context_length"], **parts["network"])
    model = build_language_model(network, SolverConfig(**parts["solver"]))
    run = DistributedDataParallel(Loss(model), gradient_as_bucket_view=True)
    tokens = torch.randint(data["bpe_vocab_size"], (data["batch_size"], data["context_length"] + 1))
    gradients = torch.zeros(sum(p.numel() for p in model.parameters()))
    seconds: dict[str, list[float]] = {"step": [], "reduce": []}
    for _ in range(WARMUP + STEPS):
        begin = time.perf_counter()
        run(tokens[:, :-1], tokens[:, 1:]).backward()
        seconds["step"].append(time.perf_counter() - begin)
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(gradients)
        seconds["reduce"].append(time.perf_counter() - begin)
    if rank == 0:
        medians = [statistics.median(values[WARMUP:]) for values in seconds.values()]
        print(*medians, gradients.nbytes, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as rendezvous:
        count = int(sys.argv[1])
        mp.spawn(work, (count, rendezvous), nprocs=count)
