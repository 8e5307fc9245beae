"""Image classification: training loss, also for mixed images, and evaluation metrics."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revdeq_lightning.data.images.batches import ImageBatch
from revdeq_lightning.data.loading.sampler import IGNORE_INDEX
from revdeq_lightning.equilibrium.validation import require_in_range
from revdeq_lightning.metrics import ClassificationMetrics
from revdeq_lightning.models import ClassifierConfig
from revdeq_lightning.models.build import SolverConfig, build_image_classifier
from revdeq_lightning.tasks.base import AbstractTask, TrainingOutput, integers
from revdeq_lightning.tasks.optimizers import OptimizerConfig


class ClassificationTask(AbstractTask):
    """Train and evaluate an image classifier.

    Logs `train/loss` and, over whole splits, `val/` and `test/`: `loss` (nats per image, without label smoothing),
    `accuracy` and, with more than 5 classes, `top5_accuracy`. Checkpoints contain settings, class names, and the
    preprocessing of the images, and suffice to classify files. Any loader of pairs (images, labels) will do, of
    floating-point images; checkpoints do then not classify files.

    Args:
        network: Sizes and architecture; classes and channels come from the data.
        solver: How the equilibria are found and differentiated.
        optimizer: Optimizer, schedule, averaging of the weights.
        label_smoothing: Probability that the training targets spread over all classes, in [0, 1).
        channels_last: Keep images and states in the memory order (B, H, W, C): faster on recent GPUs and with bfloat16.
        compile: Compile each f with torch.compile: worth its minutes on a GPU.
        jacobian_weight: Weight of the penalty on df/dz at the fixed point; 0 for none (see `AbstractTask`).
    """

    network_class = ClassifierConfig
    batch_type = ImageBatch

    def __init__(
        self,
        network: ClassifierConfig,
        solver: SolverConfig,
        optimizer: OptimizerConfig,
        label_smoothing: float = 0.0,
        channels_last: bool = False,
        compile: bool = False,
        jacobian_weight: float = 0.0,
    ) -> None:
        require_in_range("label_smoothing", label_smoothing, "[0, 1)")
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        build = partial(build_in_order, memory_format=memory_format)
        super().__init__(
            network,
            solver,
            optimizer,
            build,
            compile=compile,
            jacobian_weight=jacobian_weight,
            label_smoothing=label_smoothing,
            channels_last=channels_last,
        )
        self.label_smoothing, self.memory_format = label_smoothing, memory_format
        num_classes = self.model.config.num_classes
        self.metrics = nn.ModuleDict({name: ClassificationMetrics(num_classes) for name in ("val", "test")})

    def setup(self, stage: str) -> None:
        config = self.model.config
        if check_model := self.from_data("check_model"):
            check_model(num_classes=config.num_classes, num_channels=config.num_channels)

    def batch_of(self, inputs: Tensor, targets: Tensor) -> ImageBatch:
        if not inputs.is_floating_point():
            raise TypeError(f"images must be floating-point and normalized, got {inputs.dtype}: convert them")
        targets = integers("labels", targets)
        num_classes = self.model.config.num_classes
        if targets.ndim != 1 or (targets.device.type == "cpu" and int(targets.max()) >= num_classes):
            received = f"shape {tuple(targets.shape)}" if targets.ndim != 1 else f"the class {int(targets.max())}"
            raise ValueError(f"labels must be classes 0 ... {num_classes - 1}, one an image, got {received}")
        return ImageBatch(
            inputs,
            targets,
            targets,
            torch.ones(len(targets), device=targets.device),
            targets.new_empty(len(targets), 0),
        )

    def forward(self, images_BCHW: Tensor) -> Any:
        """Logits and statistics of normalized images."""
        dtype = next(self.model.parameters()).dtype  # trainer.precision=64-true, or bf16-true
        return self.model(images_BCHW.to(dtype).contiguous(memory_format=self.memory_format))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Mean nats per image, weighted by the shares of both labels for mixed images."""
        batch = self.as_batch(batch)
        with self.penalized() as penalties:
            output = self(batch.images)
        logits_BV, weights_B = output.logits_BV.float(), batch.weights.float()  # as the loss, also in double precision
        nats = count = torch.zeros_like(weights_B[0])
        for labels_B, shares_B in ((batch.labels, weights_B), (batch.partner_labels, 1 - weights_B)):
            nats_B = F.cross_entropy(logits_BV, labels_B, reduction="none", label_smoothing=self.label_smoothing)
            nats = nats + shares_B @ nats_B
            count = count + shares_B @ (labels_B != IGNORE_INDEX).float()
        loss = nats / count.clamp(min=1)  # an image that could not be decoded does not count
        self.log("train/loss", loss)
        loss = self.with_penalty(loss, penalties)
        return {"loss": loss, "step": TrainingOutput(output.stats, len(batch.labels), "images")}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if preprocessing_state := self.from_data("preprocessing_state"):
            checkpoint["preprocessing"] = preprocessing_state()

    def evaluation_sums(self, batch: Any) -> dict[str, Tensor]:
        """Sums over the images of the batch, for `DepthSweep`."""
        batch = self.as_batch(batch)
        sums = self._sums(batch, self(batch.images).logits_BV.float())
        return {"loss": sums["nats"], "accuracy": sums["right"], "count": sums["images"]}

    def _sums(self, batch: ImageBatch, logits_BV: Tensor) -> dict[str, Tensor]:
        """Sums over the images of a batch without padding, as `ClassificationMetrics` takes them."""
        first_BK = logits_BV.topk(min(5, logits_BV.shape[1])).indices  # of equal logits in any order
        return {
            "nats": F.cross_entropy(logits_BV, batch.labels, reduction="sum", ignore_index=IGNORE_INDEX),
            "right": (logits_BV.argmax(-1) == batch.labels).sum(),
            "right_in_five": (first_BK == batch.labels[:, None]).sum(),
            "images": (batch.labels != IGNORE_INDEX).sum(),
        }

    def _add_to(self, split: str, batch: ImageBatch) -> Tensor:
        logits_BV: Tensor = self(batch.images).logits_BV.float()
        self._metric(split).update(**self._sums(batch, logits_BV))
        return logits_BV


def build_in_order(network: ClassifierConfig, solver: SolverConfig, memory_format: torch.memory_format) -> nn.Module:
    """The model that the settings describe, its kernels in this memory order."""
    return build_image_classifier(network, solver).to(memory_format=memory_format)
