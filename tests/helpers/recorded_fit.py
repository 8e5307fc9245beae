"""Fits a one-parameter model and writes down every batch that it trains on; as a script, on two ranks."""

import contextlib
import json
import sys
import warnings
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from torch.multiprocessing import ProcessRaisedException

from revdeq_lightning.data.text.module import TextDataModule


class Recorder(LightningModule):
    """Appends each training batch (its tokens) to a file of this rank."""

    def __init__(self, record: Path, fail_at: int | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.record, self.fail_at = record, fail_at

    def training_step(self, batch, batch_idx):
        path = self.record.with_suffix(f".{self.global_rank}")
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) == self.fail_at:
            raise InterruptedError("as asked")
        path.write_text("\n".join([*lines, json.dumps(batch.tokens.tolist())]))
        return self.weight * batch.targets.float().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(Callback):
    """Saves a checkpoint at the nth call of one hook, then stops the run by an exception."""

    def __init__(self, hook: str, nth: int, path: Path):
        self.calls = 0

        def save(trainer, *args):
            if trainer.sanity_checking:
                return
            self.calls += 1
            if self.calls == nth:
                trainer.save_checkpoint(path)
                if hook != "on_exception":
                    raise InterruptedError("as asked")

        setattr(self, hook, save)


def data_module(folder: Path, **arguments) -> TextDataModule:
    text = folder / "text.txt"
    if not text.exists():
        numbers = torch.randint(97, 123, (800,), generator=torch.Generator().manual_seed(0))
        text.write_text("".join(chr(i) for i in numbers.tolist()), encoding="utf-8")
    arguments = {"context_length": 8, "batch_size": 3, "test_fraction": 0.0, "seed": 5} | arguments
    arguments = {"tokenizer": "characters", "validation_fraction": 0.1} | arguments
    return TextDataModule(source="files", path=str(text), cache_dir=str(folder / "cache"), **arguments)


def fit(folder: Path, name: str, *, callbacks=(), ckpt_path=None, fail_at=None, data=None, **trainer) -> None:
    settings = {"max_epochs": 3, "accelerator": "cpu", "devices": 1, "limit_val_batches": 1} | trainer
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = Trainer(callbacks=list(callbacks), enable_checkpointing=False, **quiet, **settings)
    run.fit(Recorder(folder / name, fail_at), data or data_module(folder), ckpt_path=ckpt_path)


def recorded(folder: Path, name: str, rank: int = 0) -> list:
    return [json.loads(line) for line in (folder / f"{name}.{rank}").read_text().splitlines()]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    directory = Path(sys.argv[1])
    two_ranks = {"strategy": "ddp_fork", "devices": 2}
    fit(directory, "whole", **two_ranks)
    for workers in (0, 2):
        checkpoint = directory / f"{workers}.ckpt"
        options = {"data": data_module(directory, num_workers=workers), **two_ranks}
        with contextlib.suppress(InterruptedError, ProcessRaisedException):
            fit(directory, f"begin{workers}", callbacks=[SaveAt("on_train_batch_end", 20, checkpoint)], **options)
        options = {"data": data_module(directory, num_workers=workers), **two_ranks}
        fit(directory, f"rest{workers}", ckpt_path=checkpoint, **options)
