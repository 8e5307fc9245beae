"""Strategies by the command line: files beside a task's, and what does not fit, in one line."""

import functools
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import yaml
from lightning import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed import fake_pg  # noqa: F401  # registers the backend "fake"

from revdeq_lightning.distributed import strategies
from revdeq_lightning.distributed.strategies import EquilibriumDDP, EquilibriumFSDP2, shard_equilibria
from revdeq_lightning.errors import ParallelismError
from revdeq_lightning.processes import gathered, host_group, largest, summed
from revdeq_lightning.tasks.base import deferred_weights
from tests.helpers.modules import make_model
from tests.helpers.processes import run_python
from tests.helpers.runs import error_of, run, tiny_config, tiny_data, tiny_task, tiny_trainer

CONFIGS = sorted(Path("configs/trainer").glob("*.yaml"))
ON_THIS = ["--trainer.accelerator=cpu", "--trainer.devices=1"]


@pytest.fixture(autouse=True)
def nothing_left():
    """Lightning leaves its port in the environment, which the processes of other tests would take for theirs."""
    before = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def trainers(monkeypatch):
    """Every trainer that fits."""
    seen, original = [], Trainer.fit

    @functools.wraps(original)
    def fit(self, *args, **kwargs):
        seen.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "fit", fit)
    return seen


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_trainer_file_beside_a_tasks_file_says_how_and_not_what(path, tmp_path, trainers):
    run("fit", "--config", tiny_config(tmp_path, max_steps=1), "--config", path, *ON_THIS, "--run.test=false")
    expected = EquilibriumFSDP2 if "fsdp2" in path.stem else EquilibriumDDP
    assert type(trainers[0].strategy) is expected
    (folder,) = (tmp_path / "runs").glob("tiny/*")  # the task's file names the run
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1
    header = path.read_text().split("trainer:")[0]
    assert f"--config {path}" in header
    assert "hardware" in header
    assert set(yaml.safe_load(path.read_text())) == {"trainer"}


def test_a_run_goes_on_under_another_strategy_with_the_settings_of_the_run(tmp_path, trainers, capsys):
    run("fit", "--config", tiny_config(tmp_path))
    (last,) = (tmp_path / "runs").glob("tiny/*/checkpoints/last.ckpt")
    sharded = "--trainer.strategy.sharded_checkpoints=true"
    fsdp2 = "configs/trainer/fsdp2.yaml"
    run("fit", "--ckpt_path", last, "--config", fsdp2, sharded, "--trainer.max_steps=8", *ON_THIS)
    assert type(trainers[1].strategy) is EquilibriumFSDP2
    assert trainers[1].global_step == 8
    assert last.is_dir()  # as the other is replaced
    assert "8 of 8 gradients certified exact" in capsys.readouterr().out
    error = error_of(capsys, "test", "--ckpt_path", last, "--trainer.strategy=auto")
    assert "is a sharded checkpoint (a folder): add --trainer.strategy=fsdp2" in error
    run("test", "--ckpt_path", last)
    assert "nats per token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trainer.strategy=fsdp2", "--trainer.precision=bf16-true"], "state in float32 or better"),
        (["--trainer.strategy=fsdp2", "--diagnostics.gradient_error_every_n_steps=2"], "trainer.strategy=ddp, not"),
        (["--config=configs/trainer/fsdp2.yaml", "--trainer.strategy.gather_dtype=bfloat16"], "trainer.precision=bf16"),
        (["--trainer.strategy=fsdp2", "--model.jacobian_weight=0.1"], "jacobian_weight=0.1 evaluates f outside"),
        (["--config=configs/trainer/ddp.yaml", "--trainer.strategy.timeout_seconds=0"], "timeout_seconds=0 of the"),
        (["--config=configs/trainer/fsdp2.yaml", "--trainer.strategy.timeout_seconds=-5"], "timeout_seconds=-5 of the"),
        (["--trainer.num_nodes=2"], "first machine is not set; start with configs/cluster/torchrun.sh"),
        (["--trainer.strategy=ddq"], "invalid strategy name"),
        (["--trainer.strategy=ddp", "--trainer.devices=0"], "devices=0, strategy=ddp): `Trainer(devices='0')`"),
    ],
)
def test_settings_that_do_not_fit_are_told_in_one_line(tmp_path, capsys, options, words):
    options = (*options, *ON_THIS[: 1 if "devices" in options[-1] else 2])
    assert words in error_of(capsys, "fit", "--config", tiny_config(tmp_path), *options, code=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for GPUs where there are none")
def test_devices_that_are_not_there_are_told_in_one_line(tmp_path, capsys):
    options = ("--config", tiny_config(tmp_path), "--trainer.accelerator=cuda", "--trainer.devices=8")
    assert "CUDA" in error_of(capsys, "fit", *options)


def test_a_model_that_does_not_fit_the_gpu_is_told_with_advice(tmp_path, capsys, monkeypatch):
    @functools.wraps(Trainer.fit)
    def fit(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ...")

    monkeypatch.setattr(Trainer, "fit", fit)
    line = error_of(capsys, "fit", "--config", tiny_config(tmp_path), code=1)
    for words in ("process 0 ran out of GPU memory (it requested 2.50 GiB more)", "data.batch_size", "fsdp2"):
        assert words in line


@pytest.fixture(params=[EquilibriumDDP, EquilibriumFSDP2])
def set_up(request, monkeypatch):
    """Let a strategy believe that it is on a GPU as the processes meet; what came before the error, if any."""
    calls, (_, lightnings) = [], request.param.__bases__
    monkeypatch.setattr(request.param, "root_device", torch.device("cuda:3"))
    monkeypatch.setattr(lightnings, "setup_environment", lambda self: calls.append("met"))
    monkeypatch.setattr(strategies, "host_group", lambda timeout: None)

    def set_up(**settings):
        strategy = request.param(**settings)
        strategy.num_nodes, strategy.parallel_devices = 1, [torch.device("cuda:3")]
        strategy.setup_environment()

    return set_up, calls


def test_gpus_without_nccl_are_told_before_the_processes_meet(set_up, monkeypatch):
    set_up, calls = set_up
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(ParallelismError, match="built without NCCL"):
        set_up()
    assert not calls


@pytest.mark.parametrize("mixed", [True, False])
def test_gpus_of_different_kinds_are_told_with_their_numbers(set_up, monkeypatch, mixed):
    (set_up, calls), properties = set_up, SimpleNamespace(name="H200", total_memory=141 * 2**30)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(strategies, "gathered", lambda own: [own, "B200 (180 GiB)" if mixed else own, own])
    set_up(allow_mixed_gpus=True)
    if mixed:
        with pytest.raises(ParallelismError, match=r"2 x H200 \(141 GiB\), 1 x B200 \(180 GiB\).*allow_mixed_gpus"):
            set_up()
    else:
        set_up()
    assert calls == ["met", "met"]


def test_what_is_on_the_host_goes_over_gloo_whatever_the_gpus_use():
    groups = []
    for _ in range(2):  # the second process group has one of its own
        dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=1)  # stands for NCCL
        groups.append(host_group())
        assert (dist.get_backend(groups[-1]), host_group()) == ("gloo", groups[-1])
        assert (largest([3, 0]), summed([2, 1]), gathered("a")) == ([3, 0], [2, 1], ["a"])
        dist.destroy_process_group()
    assert groups[0] is not groups[1]


def test_strategies_that_would_shard_f_by_itself_are_refused_by_name(tmp_path):
    task = tiny_task(tiny_data(tmp_path))
    task._trainer = SimpleNamespace(strategy=EquilibriumDDP())
    task.configure_model()
    for strategy in (ModelParallelStrategy(), FSDPStrategy()):
        task._trainer.strategy = strategy
        with pytest.raises(ParallelismError, match=rf"^{type(strategy).__name__} .*trainer.strategy=fsdp2"):
            task.configure_model()


def test_a_sharding_unit_inside_an_equilibrium_is_refused_before_training(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    model = make_model("modern")
    fully_shard(model.equilibrium.f.layers[0].mlp, mesh=mesh)
    with pytest.raises(ParallelismError, match=r"equilibrium.f.layers.0.mlp is .*fully_shard\(model.equilibrium\)"):
        shard_equilibria(model, mesh)


def test_weights_that_never_come_are_told(tmp_path):
    data = tiny_data(tmp_path)
    with deferred_weights():
        task = tiny_task(data)
    with pytest.raises(NotImplementedError) as caught:  # of Lightning, which moves the weights when it cleans up
        tiny_trainer(tmp_path).fit(task, data)
    assert "no weights without trainer.strategy=fsdp2, got SingleDeviceStrategy" in str(caught.value.__context__)


@pytest.mark.slow
def test_two_processes_by_the_command_line(tmp_path):
    options = "--config", "configs/trainer/cpu_fsdp2.yaml", "--run.version=two"
    output, _ = run_python("-m", "revdeq_lightning", "fit", "--config", tiny_config(tmp_path), *options)
    assert "12 of 12 gradients certified exact" in output
    assert "Sample (5 tokens" in output
    assert (tmp_path / "runs/tiny/two/checkpoints/last.ckpt").is_file()
