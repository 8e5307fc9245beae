"""The command line on a tiny model, in this process."""

from pathlib import Path

import yaml
from tiny_runs import text_file

from revdeq_lightning.cli.main import main


def tiny_config(folder: Path, *, network=None, **trainer) -> Path:
    config = {
        "model": {
            "network": network or {"d_model": 16, "num_heads": 2, "d_mlp": 24},
            "solver": {"max_steps": 3},
            "optimizer": {"optimizer": "muon", "lr": 0.01, "ema_decay": 0.9},
        },
        "data": {
            "source": "files",
            "path": str(text_file(folder)),
            "tokenizer": "characters",
            "context_length": 8,
            "batch_size": 4,
            "cache_dir": str(folder / "cache"),
        },
        "trainer": {
            "max_steps": 6,
            "val_check_interval": 3,
            "check_val_every_n_epoch": None,
            "log_every_n_steps": 1,
            "accelerator": "cpu",
            "devices": 1,
            **trainer,
        },
        "run": {"folder": str(folder / "runs"), "sample_tokens": 5, "sample_prompt": "a"},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run(*arguments: object) -> None:
    main([str(a) for a in arguments])
