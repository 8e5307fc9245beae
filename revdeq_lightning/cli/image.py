"""The image classifiers' command line; `predict` is in `inference.py`."""

from typing import Any, ClassVar

from lightning.pytorch.cli import LightningArgumentParser

from revdeq_lightning.callbacks.samples import ImageSamples
from revdeq_lightning.cli.trainer import AbstractCommandLine
from revdeq_lightning.data.images.module import ImageDataModule
from revdeq_lightning.report.classification import ClassificationReport
from revdeq_lightning.runs.folder import ImageRunConfig
from revdeq_lightning.tasks.classification import ClassificationTask


class ImageCommandLine(AbstractCommandLine):
    """`fit`, `validate` and `test` of the image classifiers."""

    task_class, data_class = ClassificationTask, ImageDataModule
    run_class = ImageRunConfig
    figures: ClassVar[dict[str, str]] = {
        "accuracy": "accuracy {:.2%}",
        "top5_accuracy": "{:.2%} in the first five",
        "loss": "{:.4f} nats per image",
    }

    def link_sizes(self, parser: LightningArgumentParser) -> None:
        for size in ("num_classes", "num_channels"):
            parser.link_arguments(f"data.{size}", f"model.network.{size}", apply_on="instantiate")

    def task_callbacks(self) -> list[Any]:
        every = self.diagnostics.samples_every_n_validations
        samples = [ImageSamples(folder=self.run_config.path, every_n_validations=every)] if every else []
        return [ClassificationReport(self.run_config.path), *samples]

    def closing_split(self) -> str | None:
        # Without test images, use the validation images, so that every run has image samples and a depth sweep.
        return next((split for split in ("test", "validation") if split in self.datamodule.splits), None)
