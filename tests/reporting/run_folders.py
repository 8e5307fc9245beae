"""Folders of runs as a training leaves them, written by hand."""

import json
from pathlib import Path

from PIL import Image

FOLDER_STEPS = range(9, 100, 10)


def write_metrics(folder: Path, rows: list[dict[str, object]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    keys = dict.fromkeys(["step", *(key for row in rows for key in row)])
    lines = [",".join(str(row.get(key, "")) for key in keys) for row in rows]
    (folder / "metrics.csv").write_text("\n".join([",".join(keys), *lines]) + "\n")
    return folder


def training_rows(**changes: float) -> list[dict[str, object]]:
    """Ten logged steps of a language model, 0.5 s each; two validations and a test."""
    rows: list[dict[str, object]] = [
        {
            "step": step,
            "train/loss": 3 - 0.02 * step,
            "equilibrium/forward_nfe": 4.0,
            "equilibrium/backward_nfe": 4.0,
            "equilibrium/relative_residual": 10 ** (-1 - step / 50),
            "equilibrium/num_gradients": step + 1.0,
            "equilibrium/num_certified_gradients": step + 1.0,
            "equilibrium/total_forward_nfe": 4.0 * (step + 1),
            "equilibrium/total_backward_nfe": 4.0 * (step + 1),
            "system/tokens_per_second": 7000.0 + step,
            "system/seconds_per_step": 0.5,
            "system/peak_memory_bytes": 300 * 2**20,
            **{f"system/{part}_seconds": 0.1 * (i + 1) for i, part in enumerate(("data", "forward", "backward"))},
            **changes,
        }
        for step in FOLDER_STEPS
    ]
    rows += [{"step": step, "val/loss": 2.5 - step / 100, "val/bits_per_byte": 1.9} for step in (49, 99)]
    return [*rows, {"step": 100, "test/loss": 1.4567, "test/bits_per_byte": 1.605, "test/word_perplexity": 6418.0}]


def whole_run(folder: Path, beta: float = 0.8) -> Path:
    """A run with every file there is."""
    extra = {
        "gradient_error/bptt/relative_l2": 0.0,
        "gradient_error/converged/relative_l2": 0.09,
        "equilibrium/spectral_radius": 0.7,
        "equilibrium/fraction_converged": 0.5,
        "system/model_flop_utilization": 0.3,
        "gradient_error/bptt/head/cosine": 1.0,
        "gradient_error/bptt/equilibrium/cosine": 0.9,
        "my/own metric": 2.0,
    }
    write_metrics(folder, training_rows(**extra))
    (folder / "config.yaml").write_text(
        f"model:\n  solver: {{solver: reversible, max_steps: 4, beta: {beta}}}\nseed: 0\n"
    )
    environment = {"started": "2026-01-02T03:04:05Z", "packages": {"torch": "2.13"}}
    environment["earlier_starts"] = [{"started": "2025-12-31", "packages": {}}]
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "residual_curve.csv").write_text(
        "step,solve,evaluation,relative_residual\n"
        + "".join(f"{step},1,{e},{0.5**e}\n" for step in (9, 99) for e in range(1, 5))
    )
    (folder / "depth_sweep.csv").write_text(
        "steps,forward_nfe,loss\n" + "".join(f"{n // 2},{n},{1 + 1 / n}\n" for n in (2, 4, 8, 16))
    )
    sample = {"step": 99, "prompt": "def ", "text": "f(x):\n    return '<script>alert(1)</script>' " + "x" * 300}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (folder / "samples").mkdir()
    Image.new("RGB", (900, 300), (200, 120, 40)).save(folder / "samples" / "00000099.png")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "best 1.ckpt").write_bytes(b"0" * 3000)
    return folder
