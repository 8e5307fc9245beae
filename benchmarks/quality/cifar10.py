"""CIFAR-10 on two CPU cores: the classifier of configs/cifar10/cpu.yaml compared with a ResNet of the same size.

    python -m benchmarks.quality.cifar10 --data cifar10-train.tar.xz [--only NAME ...] [--seeds 0 1]

The data: a folder or tar archive with `train/CLASS/*`; a tenth of the training images is held out. Data, batches,
augmentation, optimizer, and minutes are the same; the ResNet, which is cheaper per image, sees more epochs.
"""

import sys

from benchmarks.quality.training import Table, Variant, run

RESNET = [
    "--model.network.architecture=resnet",
    "--model.network.channels=[64,128,224]",
    "--model.network.blocks=[1,1,1]",
    "--model.solver.solver=none",
    "--model.solver.reversible_stored_evaluations=0",
    "--trainer.max_epochs=16",
]
TABLE = Table(
    title="CIFAR-10 on two CPU cores",
    command=["image", "fit", "--config", "configs/cifar10/cpu.yaml", "--data.source=folder"],
    variants={
        "stages": Variant(6, [], limit=0.84),
        "resnet": Variant(0, RESNET),
    },
    metric="val/accuracy",
    unit="validation accuracy",
    smaller_is_better=False,
    threads=2,
)


if __name__ == "__main__":
    sys.exit(run(TABLE, __doc__, "cifar10", seeds=[0, 1], jobs=1, data="folder or tar archive with train/CLASS/*"))
