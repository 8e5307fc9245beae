"""Times by a clock that only the parts of a step move; operations counted by hand."""

import resource
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback
from lightning.pytorch.profilers import SimpleProfiler
from torch import nn
from torch.utils.data import DataLoader

from revdeq_lightning.callbacks import cost
from revdeq_lightning.callbacks.cost import Cost, count_flops
from revdeq_lightning.callbacks.peaks import peak_flops
from revdeq_lightning.equilibrium import ImplicitAdjoint, MomentumSolver, PicardSolver, ReversibleSolver
from tests.helpers.modules import DIM, NUM_CLASSES, NUM_INPUTS, Stranger, loader, table, trainer
from tests.helpers.runs import tiny_data, tiny_task, tiny_trainer


@pytest.fixture
def clock(monkeypatch):
    """Goes on only where a test says so."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


class TimedStranger(Stranger):
    """Each part of a step takes its own time; evaluation takes very long."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def training_step(self, batch, batch_idx):
        self.clock.now += 5
        return super().training_step(batch, batch_idx)

    def backward(self, loss):
        self.clock.now += 7
        loss.backward()

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        optimizer.register_step_post_hook(self.step_took)
        return optimizer

    def step_took(self, *_):
        self.clock.now += 11

    def validation_step(self, batch, batch_idx):
        self.clock.now += 1000


class SlowData:
    def __init__(self, clock):
        self.clock, self.data = clock, loader().dataset

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        self.clock.now += 0.5
        return self.data[i]


class SlowCallback(Callback):
    def __init__(self, clock):
        self.clock = clock

    def on_train_batch_end(self, *_):
        self.clock.now += 13


def rows(folder):
    return [row for row in table(folder / "logs/metrics.csv", without="val/") if "system/seconds_per_step" in row]


@pytest.mark.parametrize(("is_first", "accumulate"), [(True, 2), (False, 1)])
def test_the_parts_of_a_step(tmp_path, clock, is_first, accumulate):
    callbacks = [Cost(), SlowCallback(clock)]
    profiler = SimpleProfiler()
    settings = {"max_steps": 6 // accumulate, "val_check_interval": 2, "log_every_n_steps": 1, "profiler": profiler}
    callbacks = callbacks if is_first else callbacks[::-1]
    run = trainer(tmp_path, callbacks, accumulate_grad_batches=accumulate, **settings)
    data = DataLoader(SlowData(clock), 8)
    run.fit(TimedStranger(clock), data, data)
    assert run.profiler is profiler
    assert any(key.endswith("train_dataloader_next") for key in profiler.recorded_durations)
    logged = rows(tmp_path)
    assert len(logged) == 6 // accumulate
    for number, row in enumerate(logged):
        # Where the slow callback comes after this one, its time falls into the next step.
        others = 13 * accumulate - (13 if is_first and number == 0 else 0)
        parts = {"data": 4 * accumulate, "forward": 5 * accumulate, "backward": 7 * accumulate, "optimizer": 11}
        for name, seconds in (parts | {"other": others}).items():
            assert float(row[f"system/{name}_seconds"]) == seconds, name
        total = sum(parts.values()) + others
        assert float(row["system/seconds_per_step"]) == total
        assert float(row["system/samples_per_second"]) == pytest.approx(8 * accumulate / total)
        # 4 evaluations forward, 4 backward a batch.
        assert float(row["system/evaluations_per_second"]) == pytest.approx(8 * accumulate / total)


def test_throughput_in_the_units_of_the_task_and_of_all_processes(tmp_path, clock):
    data = tiny_data(tmp_path)
    run = tiny_trainer(tmp_path, [SlowCallback(clock)], max_steps=4, limit_val_batches=0)
    run.fit(tiny_task(data), data)
    tokens = 4 * 8  # batch of 4, context of 8
    assert run.callback_metrics["system/tokens_per_second"].item() == pytest.approx(tokens / 13)

    logged = []
    module = Stranger()
    module.log_dict = lambda values, **_: logged.append(values)
    fake = SimpleNamespace(global_step=1, log_every_n_steps=1, world_size=3, optimizers=[], callbacks=[])
    fake.fit_loop = SimpleNamespace(_should_accumulate=lambda: False)
    callback = Cost()
    callback.on_train_start(fake, module)
    clock.now += 2
    output = {"step": SimpleNamespace(num_items=50, unit="images", stats=())}
    callback.on_train_batch_end(fake, module, output, None, 0)
    assert logged[0]["system/images_per_second"] == 50 * 3 / 2


def test_peak_memory_grows_by_what_is_allocated(tmp_path):
    before = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = before + 2**26  # more than ever before

    class Allocate(Callback):
        def on_train_batch_start(self, *_):
            torch.ones(size - 1024 * current_kilobytes(), dtype=torch.uint8)

    run = trainer(tmp_path, [Allocate(), Cost()], max_steps=2)
    run.fit(Stranger(), loader())
    assert size - 2**24 < run.callback_metrics["system/peak_memory_bytes"] < size + 2**27


def current_kilobytes():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


class LinearBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(DIM, DIM, bias=False)

    def forward(self, z, x):
        return 0.1 * self.linear(z) + x


def operations_by_hand(*nfe):
    """Of one sample: 2 an element of a matrix for each of value, weight's gradient and, where needed, input's."""
    encoder, head = 2 * NUM_INPUTS * DIM, 2 * DIM * NUM_CLASSES
    f = 2 * DIM * DIM
    # The first evaluation is at z = 0, which needs no gradient.
    return encoder * 2 + head * 3 + sum(f * (3 * n - 1) for n in nfe)


def linear_stranger(*solvers, **settings):
    module = Stranger(*solvers, **settings)
    for layer in module.layers:
        layer.f = LinearBlock()
    return module


def test_operations_are_those_counted_by_hand(tmp_path):
    module = linear_stranger(MomentumSolver(max_steps=4), ReversibleSolver(max_steps=3))
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, loader())
    flops = count_flops(run, module, next(iter(loader())))
    assert flops.of_sample([4, 6]) == operations_by_hand(4, 6)
    assert flops.of_sample([2, 10]) == operations_by_hand(2, 10)  # as with a tolerance
    assert flops.of_sample([3]) is None


@pytest.mark.parametrize("solver", [MomentumSolver(max_steps=4), PicardSolver(max_steps=9, rtol=0.05)])
def test_utilization_is_operations_by_time_and_peak(tmp_path, solver):
    peak = 1e9
    adjoint = None if isinstance(solver, MomentumSolver) else cost.BackpropAdjoint()
    module = linear_stranger(solver, adjoint=adjoint, lr=0.0)
    run = trainer(tmp_path, [Cost(peak_flops=peak)], max_steps=1, log_every_n_steps=1)
    run.fit(module, loader())
    module.train()
    nfe = module.layers[0](module.encoder(next(iter(loader()))[0])).stats.forward_nfe
    figures = run.callback_metrics
    expected = operations_by_hand(nfe) * figures["system/samples_per_second"].item() / peak
    assert figures["system/model_flop_utilization"].item() == pytest.approx(expected, rel=1e-5)


def test_without_a_known_peak_or_with_another_derivative_nothing_is_counted(tmp_path):
    callback, implicit = Cost(), Cost(peak_flops=1e9)
    trainer(tmp_path / "a", [callback], max_steps=1).fit(Stranger(), loader())
    trainer(tmp_path / "b", [implicit], max_steps=1).fit(Stranger(adjoint=ImplicitAdjoint()), loader())
    assert callback.flops is implicit.flops is None


def test_a_step_that_cannot_be_counted_does_not_end_the_training(tmp_path):
    class Fixed(Stranger):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0].view(8, NUM_INPUTS), batch[1]), batch_idx)

    run = trainer(tmp_path, [Cost(peak_flops=1e9)], max_steps=4)
    with pytest.warns(UserWarning, match="the operations cannot be counted: RuntimeError"):
        run.fit(Fixed(), loader())
    assert run.global_step == 4
    assert "system/model_flop_utilization" not in run.callback_metrics


def test_peaks_are_those_of_the_data_sheets_without_sparsity(monkeypatch):
    for name, peak in {"H200": 989e12, "H200 NVL": 835e12, "L40S": 362e12, "TITAN": None}.items():
        assert peak_flops(f"NVIDIA {name}", torch.bfloat16) == peak
    for name in ("RTX A4000", "T400", "GB200", "GeForce RTX 3090 Ti", "A100-SXM4-40GB MIG 1g.5gb"):  # not the A40 ...
        assert peak_flops(f"NVIDIA {name}", torch.bfloat16) is None
    assert peak_flops("Tesla T4", torch.float16) == 65e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float32) == 156e12


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the tests above are its CPU twins")
def test_cuda_times_of_the_stream_add_up_and_memory_is_the_devices(tmp_path):
    run = trainer(tmp_path, [Cost(peak_flops=1e12)], accelerator="gpu")
    run.fit(Stranger(), loader())
    figures = {key: value.item() for key, value in run.callback_metrics.items()}
    parts = [figures[f"system/{name}_seconds"] for name in cost.LOGGED_PHASES]
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(figures["system/seconds_per_step"], rel=1e-5)
    assert 0 < figures["system/peak_memory_bytes"] <= torch.cuda.max_memory_allocated()
    assert 0 < figures["system/model_flop_utilization"] < 1
