"""How often the host waits for the device in a step of a run with all default callbacks: where it reads a number.

The CPU stands for the device: what was not made on the host from Python's numbers or NumPy's arrays counts as on it,
except for bytes, which are the states of generators.
"""

import collections

import pytest
import torch
from lightning import Callback
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from revdeq_lightning.equilibrium import checks
from tests.helpers.data import tiny_image_config
from tests.helpers.runs import run, tiny_config

READS = {getattr(Tensor, n) for n in ("item", "tolist", "cpu", "numpy", "nonzero", "equal", "masked_select")}
READS |= {getattr(Tensor, f"__{n}__") for n in ("bool", "float", "int", "index", "format")}
READS |= {torch.nonzero, torch.equal}
MAKE_ON_HOST = {torch.tensor, torch.as_tensor, torch.from_numpy, torch.get_rng_state}


class Waits(TorchFunctionMode):
    """Counts, by training step, what makes the host wait."""

    def __init__(self):
        super().__init__()
        self.counts, self.step = collections.Counter(), None
        self.on_host = {}  # keeps them alive: memory used again would be taken for the same tensor

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dtype is not torch.uint8]
        known = all(t.untyped_storage().data_ptr() in self.on_host for t in tensors)
        if func in READS and not known:
            self.counts[self.step] += 1
        copied = func is Tensor.cpu or (func is Tensor.to and "cpu" in args[1:])
        if (tensors and known) or func in MAKE_ON_HOST or copied:
            self.have([t for t in tree_leaves(result) if isinstance(t, Tensor)])
        return result

    def have(self, tensors):
        self.on_host |= {t.untyped_storage().data_ptr(): t for t in tensors}


class Noted(collections.deque):
    """What is to be checked later: who waits for it begins with the newest."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __reversed__(self):
        self.waits.counts[self.waits.step] += bool(self)
        self.waits.have([on_host for on_host, *_ in self])
        return super().__reversed__()


class Marks(Callback):
    """Says in which step the run is."""

    waits: Waits

    def on_train_batch_start(self, trainer, *_):
        self.waits.step = trainer.global_step + 1


@pytest.mark.parametrize("task", ["language", "image"])
def test_the_host_waits_once_in_a_step_and_thrice_where_it_logs(tmp_path, monkeypatch, task):
    waits = Marks.waits = Waits()
    monkeypatch.setattr(checks, "host_must_wait", lambda device: True)
    monkeypatch.setattr(checks._own, "waiting", Noted(waits), raising=False)
    settings = {"callbacks": [{"class_path": f"{__name__}.Marks"}], "limit_val_batches": 0}
    settings |= {"log_every_n_steps": 2, "max_steps": 4}
    if task == "language":
        command = ["fit", "--config", tiny_config(tmp_path, **settings)]
    else:
        command = ["image", "fit", "--config", tiny_image_config(tmp_path, **settings)]
    with waits:
        run(*command, "--run.test=false")
    # A third one at logging steps is for the events of `Cost`, which a CPU does not have.
    assert [waits.counts[step] for step in (1, 2, 3)] == [1, 2, 1]
