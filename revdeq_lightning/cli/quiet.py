"""Filters messages of Lightning that a user of the command line cannot act on."""

import logging
import os
import warnings

QUIET_INFO = (
    *("GPU available", "TPU available", "HPU available", "💡 Tip", "Seed set to", "`Trainer.fit` stopped"),
    *("Restored all states", "Restoring states", "Loaded model weights", "`weights_only` was not set"),
    "You are using a CUDA device",  # with advice in Python; run.float32_matmul_precision
    *("Detected KeyboardInterrupt", "to estimate number of stepping batches"),
)
QUIET_WARNINGS = (
    r"Be aware that when using `ckpt_path`",  # evaluation does not need the callbacks of training
    r"LightningCLI's args parameter",  # the arguments of the command line without the task
    r".*does not have many workers",  # text comes from a memory map: 0 workers is fast enough
    r".*Checkpoint directory .* exists and is not empty",  # a resumed run continues in its folder
    r"The `srun` command is available",  # one process on a machine with SLURM is no mistake; `make submit` uses srun
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated",  # between Lightning and PyTorch
)


def quieten_lightning() -> None:
    """Drop messages and warnings by name; all others stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(lambda record: not any(text in record.getMessage() for text in QUIET_INFO))
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's calls, not the user's
    for message in QUIET_WARNINGS:
        warnings.filterwarnings("ignore", message)
