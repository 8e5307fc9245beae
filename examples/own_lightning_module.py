"""Your own LightningModule with an equilibrium inside, watched by the callbacks of this package.

python examples/own_lightning_module.py

The module knows nothing of the callbacks: they find its `EquilibriumLayer`s by themselves.
"""

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from revdeq_lightning import EquilibriumLayer, MomentumSolver
from revdeq_lightning.callbacks.function_evaluations import FunctionEvaluations
from revdeq_lightning.callbacks.gradient_error import GradientError
from revdeq_lightning.callbacks.reconstruction_certificate import ReconstructionCertificate


class Block(nn.Module):
    """Two convolutions; the norm at the end bounds the state."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.GroupNorm(4, channels)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """Evaluate f."""
        return self.norm(self.second(torch.relu(self.first(z))) + x)


class Digits(lightning.LightningModule):
    """A classifier of 8x8 digits: embed, solve, pool, read out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 16, 3, padding=1)
        self.equilibrium = EquilibriumLayer(Block(16), solver=MomentumSolver(max_steps=6))
        self.head = nn.Linear(16, 10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        z = self.equilibrium(self.embed(images)).value
        loss = nn.functional.cross_entropy(self.head(z.mean((2, 3))), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(folder: str = "runs/own_lightning_module", max_epochs: int = 3) -> dict[str, float]:
    """Train on scikit-learn's digits and return what was logged last."""
    from sklearn.datasets import load_digits

    lightning.seed_everything(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    trainer = lightning.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        devices=1,
        logger=CSVLogger(folder, name=""),
        enable_checkpointing=False,
        log_every_n_steps=10,
        callbacks=[
            FunctionEvaluations(),
            ReconstructionCertificate(policy="stop"),
            GradientError(every_n_steps=40, num_samples=4),
        ],
    )
    trainer.fit(Digits(), DataLoader(data, batch_size=64, shuffle=True))
    return {key: float(value) for key, value in sorted(trainer.callback_metrics.items())}


if __name__ == "__main__":
    for key, value in main().items():
        print(f"{key:45} {value:.4g}")
