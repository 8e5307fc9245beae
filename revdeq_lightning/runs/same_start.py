"""All ranks begin from the same checkpoint, or none of them begins."""

from lightning import Callback, LightningModule, Trainer


class SameStart(Callback):
    """Refuses to train where a rank does not see the checkpoint that the first rank goes on from.

    Every rank looks for itself: machines whose run folder is not on a file system that they share see other ones, and
    a rank that begins anew beside one that goes on would spoil the run, or hang.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare.

        Raises:
            FileNotFoundError: On every rank, if one differs.
        """
        if stage != "fit" or trainer.world_size == 1:
            return
        own = str(trainer.ckpt_path or "")
        first = trainer.strategy.broadcast(own)
        if not trainer.strategy.reduce_boolean_decision(own == first):
            raise FileNotFoundError(
                f"rank {trainer.global_rank} would begin from {own or 'nothing'}, the first rank from "
                f"{first or 'nothing'}: run.folder must lie on a file system that all machines share"
            )
