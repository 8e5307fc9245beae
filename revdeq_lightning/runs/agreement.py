"""What all processes of a run agree on at each optimizer step, in one small exchange."""

from lightning import Trainer

from revdeq_lightning.processes import largest
from revdeq_lightning.runs.signals import STOP


class Agreement:
    """Tells all processes of a signal that one received (`STOP.agreed`), and of a divergence.

    Attributes:
        is_reached: Whether the processes have already exchanged this in the current batch.
    """

    is_reached = False

    def reach(self, trainer: Trainer, diverged: bool = False) -> bool:
        """Return whether any process diverged; all processes must call it."""
        if trainer.world_size == 1:
            STOP.agreed = STOP.received
            return diverged
        anyones, STOP.agreed = largest([diverged, STOP.received])
        self.is_reached = True
        return bool(anyones)


AGREEMENT = Agreement()
"""The only instance, like `STOP`."""
