"""Experiments for the modern classifier: two epochs of CIFAR-10 each, one thread.

    python -m benchmarks.quality.image_block --data cifar10-train.tar.xz [--only NAME ...] [--seeds 0 1] [--jobs 2]

Base: configs/cifar10/cpu.yaml with channels 32-64-128. Every other row makes only the change that its name describes.
"""

import sys

from benchmarks.quality.training import Table, Variant, run

CHANNELS = "--model.network.channels=[32,64,128]"
STEPS, SOLVER, NETWORK = "--model.solver.max_steps", "--model.solver.solver", "--model.network"


def variant(evaluations: int, *options: str) -> Variant:
    """A change of the base; if a setting is given twice, the last one applies."""
    return Variant(evaluations, [CHANNELS, "--trainer.max_epochs=2", *options])


TABLE = Table(
    title="Experiments for the modern classifier",
    command=["image", "fit", "--config", "configs/cifar10/cpu.yaml", "--data.source=folder"],
    variants={
        "base": variant(6),
        "1 evaluation a stage": variant(3, f"{STEPS}=1"),
        "4 evaluations": variant(12, f"{STEPS}=4"),
        "momentum 0.03": variant(6, "--model.solver.momentum=0.03125"),
        "momentum 0.25": variant(6, "--model.solver.momentum=0.25"),
        "paper's solver, beta 0.5": variant(6, f"{SOLVER}=reversible", f"{STEPS}=1", "--model.solver.beta=0.5"),
        "paper's solver, beta 0.8": variant(6, f"{SOLVER}=reversible", f"{STEPS}=1", "--model.solver.beta=0.8"),
        "paper's solver, beta 0.8, 4 evaluations": variant(
            12, f"{SOLVER}=reversible", f"{STEPS}=2", "--model.solver.beta=0.8"
        ),
        "paper's block": variant(6, f"{NETWORK}.block=paper"),
        "expansion 2 inside f": variant(6, f"{NETWORK}.widths=[2,2,2]"),
        "48-96-192": variant(6, f"{NETWORK}.channels=[48,96,192]"),
        "groups of 8": variant(6, f"{NETWORK}.group_size=8"),
        "one group": variant(6, f"{NETWORK}.group_size=0"),
        "dropout 0.1, one mask a solve": variant(6, f"{NETWORK}.dropout=0.1"),
        "stochastic depth 0.1": variant(6, f"{NETWORK}.stochastic_depth=0.1"),
        "joint, 2 evaluations": variant(2, f"{NETWORK}.architecture=joint"),
        "joint, 4 evaluations": variant(4, f"{NETWORK}.architecture=joint", f"{STEPS}=4"),
        "channels_last": variant(6, "--model.channels_last=true"),
    },
    metric="val/accuracy",
    unit="validation accuracy after two epochs",
    smaller_is_better=False,
)


if __name__ == "__main__":
    sys.exit(run(TABLE, __doc__, "image_block", seeds=[0], jobs=1, data="folder or tar archive with train/CLASS/*"))
