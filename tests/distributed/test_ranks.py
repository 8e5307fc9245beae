"""The same weights after 10 steps on any number of processes: DDP and FSDP2, with accumulation, both tasks."""

import itertools
from pathlib import Path

import pytest
import torch

from tests.distributed import rank_fits
from tests.helpers.processes import run_apart

pytestmark = pytest.mark.xdist_group("ranks")

FAST = ["lm-ddp-2-1", "lm-fsdp2-2-2", "image-ddp-2-2", "image-fsdp2-2-2"]
SLOW = ["lm-ddp-1-1", "lm-fsdp2-1-1", "lm-ddp-4-2", "lm-fsdp2-4-2", "image-ddp-4-1", "image-fsdp2-4-1"]
# Batch normalization and mixup know the images that one process has at a time: those are the same in all scenarios.
REFERENCES = {"lm": "lm-one-1-1", "image": "image-one-1-4"}


def run(folder, names):
    run_apart(rank_fits.main, folder, *REFERENCES.values(), *names)
    return folder


@pytest.fixture(scope="module")
def fast(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("fast"), FAST)


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("slow"), [*SLOW, "lm-half-2-1"])


def results(folder, name):
    ranks = int(name.split("-")[2])
    return [torch.load(folder / f"{name}.{rank}.pt") for rank in range(ranks)]


def assert_same_as_one_process(folder, name):
    task = name.split("-")[0]
    ranks, (reference,) = results(folder, name), results(folder, REFERENCES[task])
    assert reference["moved"] > 0.01
    for result in ranks:
        for key, weight in reference["weights"].items():
            torch.testing.assert_close(result["weights"][key], weight, rtol=0, atol=1e-12, msg=f"{name}: {key}")
    num_gradients = rank_fits.NUM_STEPS * int(name.split("-")[3]) * len(ranks)
    assert [r["figures"]["equilibrium/num_gradients"] for r in ranks] == [num_gradients] * len(ranks)
    if task == "lm":
        assert ranks[0]["figures"]["equilibrium/num_certified_gradients"] == num_gradients
        # (With BatchNorm an evaluation depends on whose running statistics it uses.)
        for key in ("val/loss", "val/token_perplexity", "val/bits_per_byte"):
            assert ranks[0]["figures"][key] == pytest.approx(reference["figures"][key], rel=1e-6)  # logged in float32
    # Running statistics are each process's own until it evaluates.
    assert all(r["statistics"] == ranks[0]["statistics"] for r in ranks)
    # Together they see what the one process sees, and no two of them the same.
    seen = [[sample for batch in r["seen"] for sample in batch] for r in ranks]
    together = sorted(sample for own in seen for sample in own)
    assert together == pytest.approx(sorted(sample for batch in reference["seen"] for sample in batch), rel=1e-6)
    assert all(a != b for a, b in itertools.combinations(seen, 2))


@pytest.mark.parametrize("name", FAST)
def test_two_processes_train_the_weights_of_one(fast, name):
    assert_same_as_one_process(fast, name)


def test_a_step_exchanges_its_gradients_and_one_small_tensor(fast):
    """With the stop signal, the divergence guard and the certificate; the gradients fit into one bucket."""
    assert [result["collectives"] for result in results(fast, "lm-ddp-2-1")] == [{"allreduce_": 2}] * 2


@pytest.mark.slow
def test_gradients_sent_in_bfloat16_train_nearly_the_same_weights(slow):
    (reference,), halved = results(slow, REFERENCES["lm"]), results(slow, "lm-half-2-1")
    difference = max(
        float((halved[0]["weights"][key] - weight).abs().max()) for key, weight in reference["weights"].items()
    )
    assert 1e-6 < difference < 0.2 * reference["moved"]
    assert all(torch.equal(halved[0]["weights"][key], halved[1]["weights"][key]) for key in reference["weights"])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_one_and_four_processes_train_the_weights_of_one(slow, name):
    assert_same_as_one_process(slow, name)
