"""Base class of all data modules: loaders in a reproducible order, with a position to resume from."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import Dataset

from revdeq_lightning.data.loading.files import SPLITS
from revdeq_lightning.data.loading.sampler import ResumableBatchSampler, ResumableLoader
from revdeq_lightning.equilibrium.validation import refuse_unused, require_choice, require_count, require_in_range
from revdeq_lightning.errors import CheckpointError

Split = TypeVar("Split")


class AbstractDataModule(LightningDataModule):
    """Provide loaders split over the ranks; a checkpoint stores the position of the first batch not yet trained.

    Requires the hyperparameters `batch_size`, `num_workers`, and `seed`.
    """

    _items: str
    """Name of the items of a batch, for messages."""

    def __init__(self) -> None:
        super().__init__()
        self._train_loader: ResumableLoader | None = None
        self._open_loaders: dict[str, ResumableLoader] = {}
        self._resumed: dict[str, Any] = {}
        self._shared_batch_size: int | None = None
        self._announced = False

    @abstractmethod
    def _prepared(self) -> Any:
        """The data, prepared by the first call and cached."""

    @abstractmethod
    def _by_split(self) -> Mapping[str, Any]:
        """Prepare the data and return the existing splits."""

    @abstractmethod
    def _evaluation_loader(self, split: str) -> ResumableLoader:
        """The complete split once, in order."""

    @abstractmethod
    def _order_settings(self) -> dict[str, Any]:
        """Settings of the order, except the global batch size, and checksums that need no extra pass over the data."""

    def prepare_data(self) -> None:
        self._prepared()

    def setup(self, stage: str) -> None:
        self._prepared()
        self._announce()

    def found(self) -> dict[str, Any]:
        """What the data holds, for the records of a run: plain containers, with sizes by split and `left_out`."""
        return {"splits": list(self.splits)}

    def check_model(self, **sizes: int) -> None:
        """Raise ValueError if the model was built for other data: its sizes, by name, must be those of the data."""
        for name, there in sizes.items():
            if (here := getattr(self, name)) != there:
                raise ValueError(
                    f"the data ({self._origin()}) has {name} {here}, the model has {there}: use the data that it was "
                    f"built for, or build one for {here}"
                )

    def val_dataloader(self) -> ResumableLoader:
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> ResumableLoader:
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> ResumableLoader:
        return self._evaluation_loader("test")

    def teardown(self, stage: str) -> None:
        self._close_loaders()

    def on_exception(self, exception: BaseException) -> None:  # Lightning does not call `teardown` in that case
        self._close_loaders()

    @property
    def splits(self) -> tuple[str, ...]:
        """Existing splits among "train", "validation", and "test". Prepares the data if necessary."""
        return tuple(split for split in SPLITS if split in self._by_split())

    def state_dict(self) -> dict[str, Any]:
        """Position of the first batch not yet trained, and the settings of the order; plain containers."""
        position = self._train_loader.state_dict() if self._train_loader else self._resumed.get("position")
        world_size = self._rank_and_world_size()[1]
        order = self._order_settings() | {"global_batch_size": self.used_batch_size * world_size}
        return {"position": position, "order": order, "world_size": world_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at this position; CheckpointError if the number of processes does not divide the global batch."""
        self._resumed = dict(state_dict) if state_dict["position"] else {}
        if self._resumed:
            self._keep_global_batch(state_dict)
            if self._train_loader:
                self._train_loader.load_state_dict(self._resumed["position"])

    def __str__(self) -> str:
        # Lightning's version iterates over every batch of a loader that is not a DataLoader.
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.hparams.items())})"

    def _require_counts(self, *names: str, optional: Sequence[str] = ()) -> None:
        """Raise ValueError unless these settings, and those that every data module has, are counts."""
        for name in (*names, "batch_size", *(name for name in optional if self.hparams[name] is not None)):
            require_count(name, self.hparams[name])
        for name in ("num_workers", "seed"):
            require_count(name, self.hparams[name], at_least=0)

    def _refuse_unused(self, needs: str, *names: str) -> None:
        refuse_unused(self.hparams, type(self).__init__, needs, *names)

    def _announce(self) -> None:
        if self._announced:
            return
        self._announced = True
        parts = []
        for name, value in self.found().items():
            if isinstance(value, dict):
                parts.append(f"{', '.join(f'{split} {size:,}' for split, size in value.items())} {name}")
            elif name == "left_out":
                parts += [f"left out: {line}" for line in value]
            else:
                parts.append(f"{len(value)} {name}: {', '.join(value[:10])}{', ...' * (len(value) > 10)}")
        rank_zero_info(f"Data: {'; '.join(parts)}")

    def _of_split(self, by_split: Mapping[str, Split], split: str, advice: str) -> Split:
        require_choice("split", split, SPLITS)
        if split not in by_split:
            raise ValueError(
                f"the data ({self._origin()}) has no {split} split: {advice}, or omit it"
                " (trainer.limit_val_batches=0 trains without validation)."
            )
        return by_split[split]

    def _origin(self) -> str:
        names = [name for name in ("source", "puzzle", "path") if name in self.hparams]
        return ", ".join(f"{name} {self.hparams[name]!r}" for name in names)

    def _training_loader(self, dataset: Dataset[Any], num_items: int, order: Callable[..., Any]) -> ResumableLoader:
        """Loader of complete batches, from the loaded position."""
        self._train_loader = self._loader("train", dataset, num_items, order, drop_last=True)
        if self._resumed:
            self._train_loader.load_state_dict(self._resumed["position"])
            self._warn_if_other_order()
        return self._train_loader

    def _loader(
        self,
        name: str,
        dataset: Dataset[Any],
        num_items: int,
        order: Callable[..., Any] | None = None,
        *,
        drop_last: bool = False,
    ) -> ResumableLoader:
        """Replace the loader of this name, if there is one: `reload_dataloaders_every_n_epochs` asks for it again."""
        rank, world_size = self._rank_and_world_size()
        size = self.used_batch_size if drop_last else self.hparams["batch_size"]
        shares = {"rank": rank, "world_size": world_size}
        sampler = ResumableBatchSampler(num_items, size, order=order, drop_last=drop_last, **shares)
        loader = ResumableLoader(
            dataset,
            sampler,
            num_workers=self.hparams["num_workers"],
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            trainer=self.trainer if drop_last else None,
        )
        if name in self._open_loaders:
            self._open_loaders[name].close()
        self._open_loaders[name] = loader
        return loader

    def _close_loaders(self) -> None:
        while self._open_loaders:
            self._open_loaders.popitem()[1].close()

    @property
    def used_batch_size(self) -> int:
        """Items of a training batch per process: `batch_size`, or less if a resumed run has more processes."""
        return int(self._shared_batch_size or self.hparams["batch_size"])

    def _keep_global_batch(self, state: dict[str, Any]) -> None:
        """Adapt the batch size per process if only the number of processes changed."""
        world_size, then = self._rank_and_world_size()[1], state.get("world_size")
        global_batch_size, own = state["order"]["global_batch_size"], self.hparams["batch_size"]
        if then in (None, world_size) or own * then != global_batch_size:
            return  # as before, or with another batch_size, which `_warn_if_other_order` reports
        share, rest = divmod(global_batch_size, world_size)
        if rest:
            raise CheckpointError(
                f"the checkpoint's batches of {global_batch_size} {self._items} cannot be shared among {world_size} "
                f"processes (it was trained on {then}): use a number that divides {global_batch_size}, or set "
                "data.batch_size to choose another batch"
            )
        if self._train_loader and share != self.used_batch_size:
            raise CheckpointError(
                f"the checkpoint was trained on {then} processes, these are {world_size}: with this strategy the batch "
                f"must be set manually, data.batch_size={share}"
            )
        self._shared_batch_size = share
        rank_zero_warn(
            f"the checkpoint was trained on {then} process(es) with {own} {self._items} each, now {world_size} take "
            f"{share} each: the batches stay the same; the processes' random numbers "
            "(dropout) and the rounding of sums over the processes are no longer identical."
        )

    def _rank_and_world_size(self) -> tuple[int, int]:
        shares = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return (shares["rank"], shares["num_replicas"]) if shares else (0, 1)

    def _warn_if_other_order(self) -> None:
        now, then = self.state_dict()["order"], self._resumed["order"]
        # Older checkpoints lack some keys, which cannot be compared.
        changed = [f"{name} {then[name]} -> {now[name]}" for name in now if name in then and now[name] != then[name]]
        if changed:
            rank_zero_warn(
                f"the training data or its order changed since the checkpoint ({', '.join(changed)}): within this "
                f"epoch {self._items} may occur twice or not at all; to continue exactly, use the checkpoint's data "
                "and values."
            )


def check_fractions(validation_fraction: float, test_fraction: float) -> None:
    """Raise ValueError unless both are fractions and leave something to train on."""
    for name, fraction in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
        require_in_range(name, fraction, "[0, 1)")
    if validation_fraction + test_fraction >= 1:
        raise ValueError(
            "validation_fraction and test_fraction must leave something to train on, "
            f"got {validation_fraction} and {test_fraction}."
        )


def digest(content: Any) -> str:
    """Name of plain containers, identical in every process."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
