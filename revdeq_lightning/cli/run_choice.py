"""Which run a command belongs to, and with which checkpoint or weights it begins."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.utilities import rank_zero_only

from revdeq_lightning.checkpoints.files import Found, try_folder
from revdeq_lightning.checkpoints.names import is_sharded_checkpoint
from revdeq_lightning.cli.errors import fail, setting_errors
from revdeq_lightning.distributed.strategies import is_fsdp2
from revdeq_lightning.runs.folder import (
    CONFIG,
    RunConfig,
    checkpoint_to_resume,
    date_and_time,
    describes_run,
    find_checkpoint,
    job_version,
    new_version,
    run_of_checkpoint,
)
from revdeq_lightning.runs.lock import LOCK


def choose_run(
    config: Any, subcommand: str, run_class: type[RunConfig], options: Sequence[str] = ()
) -> tuple[RunConfig, str | None]:
    """Return the run and the file of exported weights with which it begins, if any.

    `run` and `ckpt_path` of the parsed settings are completed.
    """
    run = config.run
    naming = [path for path in map(Path, map(str, config.get("config") or [])) if describes_run(path)]
    run.name = run.name or (naming[-1].stem if naming else "run")
    for key in ("name", "version"):  # each is one folder
        if run[key] is not None and (run[key] == ".." or Path(run[key]).name != run[key]):
            fail(f"run.{key} must be a name without '/', got {run[key]!r}: set run.folder to store runs elsewhere")
    checkpoint, weights = config.get("ckpt_path"), None
    if checkpoint in ("last", "best"):
        with setting_errors():
            checkpoint = config.ckpt_path = _chosen(find_checkpoint(checkpoint, run_class(**run.as_dict())))
    if checkpoint and Path(checkpoint).suffix == ".safetensors":  # of `export`: a new run begins with them
        weights, checkpoint, config.ckpt_path = checkpoint, None, None
        if is_fsdp2(config.trainer.strategy):
            fail(f"--ckpt_path={weights}: a run cannot begin with weights alone and fsdp2: use ddp")
    if subcommand != "fit" and checkpoint is None:
        fail(f"{subcommand} needs a checkpoint: set --ckpt_path to a file, last or best")
    if checkpoint and is_sharded_checkpoint(checkpoint) and not is_fsdp2(config.trainer.strategy):
        fail(
            f"{checkpoint} is a sharded checkpoint (a folder): add --trainer.strategy=fsdp2, on any number of"
            " processes, or export only its weights: export --ckpt_path"
        )
    with setting_errors():
        chosen = run_class(**run.as_dict())
    folder = run_of_checkpoint(checkpoint) if checkpoint else None
    if folder and run.version is None:
        runs, name = str(folder.parent.parent), folder.parent.name
        chosen = replace(chosen, folder=runs, name=name, version=folder.name)
        if folder.parent.resolve() != Path(run.folder, run.name).resolve():  # another name, or a moved folder
            if named := [option for option in options if option.startswith(("--run.name", "--run.folder"))]:
                fail(f"{named[0]}: with --ckpt_path the run goes on in {folder}: add --run.version for a new run")
            run.folder, run.name = runs, name
    if subcommand != "fit":
        chosen.version = chosen.version or date_and_time()
    elif chosen.resume == "auto":
        chosen.version = chosen.version or job_version()
        with setting_errors():
            newest = checkpoint_to_resume(chosen)
        if newest:
            is_first = cast(Any, rank_zero_only).rank == 0
            if is_first and (given := weights or checkpoint) and Path(given) != newest.path:
                print(f"run.resume=auto: {chosen.path} has begun, --ckpt_path={given} is not read again", flush=True)
            config.ckpt_path = _chosen(newest)
    elif chosen.version and chosen.path != folder and (chosen.path / CONFIG).is_file():
        fail(
            f"{chosen.path} already contains a run: choose another run.version, or continue it with --ckpt_path or "
            "--run.resume=auto"
        )
    return chosen, weights


def _chosen(found: Found) -> str:
    """Path of the found checkpoint; the first process warns of unusable newer ones."""
    if cast(Any, rank_zero_only).rank == 0:
        for path, fault in found.faults.items():
            print(f"warning: {path} {fault}: continuing from {found.path}", file=sys.stderr, flush=True)
    return str(found.path)


def take_folder(run: RunConfig, made: list[Path]) -> None:
    """Create the run's folder, of a new version if it has none; only the first process.

    `made` receives the folders that were created, the innermost first.
    """
    folder = run.path if run.version else run.path.parent
    if cast(Any, rank_zero_only).rank:
        run.version = run.version or date_and_time()
        return
    made += [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        try_folder(folder)
        if not run.version:
            run.version = new_version(folder)
            made.insert(0, run.path)
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror or error}; choose another run.folder") from None


@contextmanager
def without_a_trace(run: RunConfig, made: list[Path]) -> Iterator[None]:
    """If the start is refused, remove the folders that it made, unless something is in them."""
    try:
        yield
    except SystemExit:
        if made and not (run.path / CONFIG).exists():
            with suppress(OSError):
                (made[0] / LOCK).unlink(missing_ok=True)
                for folder in [*sorted(made[0].rglob("*"), reverse=True), *made]:
                    folder.rmdir()
        raise
