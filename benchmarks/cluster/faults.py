"""What a run does when something fails, and what is lost. Writes `results/faults.md`.

    python -m benchmarks.cluster.faults                 # make bench-faults; a few minutes
    python -m benchmarks.cluster.faults --kills 4       # a smoke run

Each fault is injected into a run of a small language model or image classifier on this machine. The run is then resumed
as its message says, and its result (curves, weights, files) is compared bit for bit with that of an undisturbed run.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import part
from benchmarks.cluster.disturbances import (
    cut,
    fill,
    flip_a_bit,
    kill_children,
    kill_logger,
    make_read_only,
    malice,
    poison,
    small_disk,
)
from benchmarks.cluster.fault_runs import EVERY, STEPS, write_image_config, write_language_config
from benchmarks.cluster.killing import differences, kill_and_go_on, last_logged_step, newest_step, run
from benchmarks.report import table
from benchmarks.requirements import Requirement
from revdeq_lightning.errors import RecordWarning


class Row(NamedTuple):
    """One fault."""

    fault: str
    done: str
    said: str
    lost: str
    seconds: str
    is_met: bool


class Bench:
    """A folder with data, configurations, and undisturbed runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        self.rows: list[Row] = []
        self.configs = {"lm": write_language_config(folder), "image": write_image_config(folder)}

    def arguments(self, kind: str, version: str, *options: str) -> list[str]:
        words = ["fit"] if kind == "lm" else ["image", "fit"]
        runs = [f"--run.folder={self.folder}", f"--run.name={kind}", f"--run.version={version}", "--run.test=false"]
        return [*words, "--config", str(self.configs[kind]), *runs, *options]

    def path(self, kind: str, version: str) -> Path:
        return self.folder / kind / version

    def whole(self, kind: str) -> Path:
        """The undisturbed run, made on the first call."""
        path = self.path(kind, "whole")
        if not path.exists() and (code := run(self.arguments(kind, "whole"), self.log)):
            raise RuntimeError(f"the undisturbed run failed with code {code}: {self.log.read_text()}")
        return path

    def strike(
        self,
        fault: str,
        done: str,
        *,
        kind: str = "lm",
        disturb: Callable[[], Any] | None = None,
        step: int = 40,
        between: Callable[[Path], Any] = lambda path: None,
        fails: bool = True,
        options: tuple[str, ...] = (),
    ) -> None:
        """Inject one fault into a run, repair the damage, and resume the run.

        Args:
            fault: Name of the fault.
            done: Description of the fault.
            kind: Kind of the run, `lm` or `image`.
            disturb: Called in the run's process after `step`.
            step: Step after which `disturb` is called.
            between: Called with the run's folder before the run is resumed.
            fails: Whether the run must fail; otherwise it must finish.
            options: Options of the disturbed run.
        """
        reference, version = self.whole(kind), f"struck-{len(self.rows)}"
        path = self.path(kind, version)
        struck = (step, disturb) if disturb else None
        code = run(self.arguments(kind, version, *options), self.log, disturb=struck)
        said = message(self.log)
        logged = last_logged_step(path)
        between(path)
        newest = newest_step(path)
        begin = time.monotonic()
        again = run(self.arguments(kind, version, "--ckpt_path=last"), self.log)
        seconds = time.monotonic() - begin
        said = said or message(self.log)
        found = differences(path, reference) if again == 0 else [message(self.log)]
        lost = f"nothing; {logged - newest} step(s) since step {newest} repeated" if not found else "; ".join(found)
        is_met = (code != 0) == fails and again == 0 and not found and bool(said)
        is_met = is_met and min(logged, step) - newest <= EVERY  # nothing is saved once the disk is full
        self.rows.append(Row(fault, done, said, lost, f"{seconds:.1f}", is_met))
        print(self.rows[-1], flush=True)


def message(log: Path) -> str:
    """The first warning, error, or reason for stopping that a run printed, without paths of the machine."""
    lines = [line for line in log.read_text().splitlines() if line.startswith(("error: ", "warning: ", "Stopped by"))]
    lines += re.findall(r"\.py:\d+: (?:\w*Warning: )?(.+)", log.read_text())
    line = re.sub(r"; largest magnitude.*?\)\. ", " ... ", lines[0]) if lines else ""
    return re.sub(r"/\S*/", "", line).replace("|", "\\|")


def disk_faults(bench: Bench) -> None:
    """Faults of a small separate file system; skipped without root."""
    with small_disk(bench.folder / "disk") as mounted:
        if not mounted:
            print("cannot mount a tmpfs: skipping the disk faults (they require root)", file=sys.stderr)
            return
        disk = Bench.__new__(Bench)
        disk.__dict__ = bench.__dict__ | {"folder": bench.folder / "disk"}
        disk.strike(
            "disk full",
            f"a file system of 8 MB filled up after step 40 of {STEPS}; emptied before resuming",
            disturb=lambda: fill(disk.folder),
            between=lambda path: (disk.folder / "filler").unlink(),
        )
        disk.strike(
            "folder read-only",
            f"mounted read-only after step 40 of {STEPS}; writable again before resuming",
            disturb=lambda: make_read_only(disk.folder),
            between=lambda path: subprocess.run(["umount", "-l", str(disk.folder)], check=True),
        )


def data_faults(bench: Bench) -> None:
    images, aside = bench.folder / "images" / "red", bench.folder / "aside"
    bench.strike(
        "data removed",
        "the image files of a class moved away after step 40; moved back before resuming",
        kind="image",
        disturb=lambda: images.rename(aside),
        between=lambda path: aside.rename(images),
    )
    bench.strike(
        "worker killed", "kill -9 of the data-loading process, after step 40", kind="image", disturb=kill_children
    )


def other_faults(bench: Bench) -> None:
    bench.strike(
        "machine preempted",
        "SIGTERM after step 40; saved, exit code 75",
        disturb=lambda: os.kill(os.getpid(), signal.SIGTERM),
    )
    bench.strike("divergence", "a weight set to NaN after step 40", disturb=poison, between=remove("diverged"))
    bench.strike(
        "logger killed",
        "kill -9 of W&B's process after step 40; the run continues to its end",
        disturb=kill_logger,
        between=remove("wandb"),
        fails=False,
        options=("--run.wandb=offline",),
    )


def remove(name: str) -> Callable[[Path], None]:
    """Remove what only the disturbed run has."""
    return lambda path: shutil.rmtree(path / name)


def checkpoint_faults(bench: Bench) -> None:
    def last(what: Callable[[Path], None]) -> Callable[[Path], None]:
        return lambda path: what(path / "checkpoints" / "last.ckpt")

    def foreign(path: Path) -> None:
        path.unlink()
        path.write_text("something else")

    for fault, done, what in (
        ("checkpoint cut short", "last.ckpt cut to half of its length", cut),
        ("bit flipped", "one bit of last.ckpt changed", flip_a_bit),
        ("foreign file", "a text file instead of last.ckpt", foreign),
        ("malicious file", "a pickle that runs a command instead of last.ckpt", malice),
    ):
        # The first run ends at step 50; the resumed one runs to its end.
        bench.strike(fault, done, between=last(what), disturb=lambda: os._exit(137), step=50)
    if list(bench.folder.rglob("malice")):
        raise RuntimeError("code in a checkpoint was run")


def kills(bench: Bench, num_kills: int, num_processes: int = 1) -> None:
    folder = bench.folder / f"kills-{num_processes}"
    folder.mkdir()
    result = kill_and_go_on(bench.configs["lm"], folder, num_kills, seed=0, num_processes=num_processes)
    repeated = [kill["steps_to_repeat"] for kill in result["kills"]]
    written = sum("event" in kill for kill in result["kills"])
    fault, whose, said = "process killed", f"{result['finished']} runs", "none: killed"
    if num_processes > 1:
        fault, whose = "one of two processes killed", f"{whose} of FSDP2 with sharded checkpoints"
        errors = [error for kill in result["kills"] for error in kill["errors"]]
        first = errors[0].split(" (")[0] if errors else ""
        said = f"the other process, {len(errors)} of {len(repeated)} times: {first}"
    done = f"kill -9 at {len(repeated)} random moments of {whose}, {written} of them within a save"
    lost = "; ".join(result["differences"])
    lost = lost or f"nothing; at most {max(repeated)} steps since the last checkpoint repeated"
    seconds = f"{result['seconds_undisturbed']:.1f} (a complete run)"
    is_met = not result["differences"] and max(repeated) <= EVERY
    # A process that has finished is no longer connected to the others.
    in_training = [kill for kill in result["kills"] if kill["newest"] < STEPS]
    is_met = is_met and all(len(kill["errors"]) == num_processes - 1 for kill in in_training)
    bench.rows.append(Row(fault, done, said, lost, seconds, is_met))
    print(bench.rows[-1], flush=True)


def run_all(options: argparse.Namespace) -> part.Result:
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", category=RecordWarning)
    importing = time.monotonic()
    import revdeq_lightning.cli.tasks  # noqa: F401  before the forks

    importing = time.monotonic() - importing
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
        bench = Bench(Path(folder))
        kills(bench, options.kills)
        kills(bench, options.kills, num_processes=2)
        checkpoint_faults(bench)
        disk_faults(bench)
        data_faults(bench)
        other_faults(bench)
    titles = ("fault", "what was done", "message", "lost", "seconds to resume and finish")
    page = [
        f"Runs of {STEPS} steps, a checkpoint every {EVERY} steps and after each validation (every 15). Each run"
        " was then resumed with `--ckpt_path last`, and its curves, weights, and files were compared bit for bit with"
        f" those of an undisturbed run. Starting Python and importing everything takes {importing:.1f} s more.",
        table(titles, [row[:5] for row in bench.rows]),
    ]
    verdict = [Requirement(row.fault, "nothing lost, and a message", row.lost, row.is_met) for row in bench.rows]
    return part.Result({"": [row._asdict() for row in bench.rows]}, verdict, page)


KILLS = {"--kills": {"type": int, "default": 30}}
main = part.command(
    "cluster.faults", "Faults", __doc__, run_all, options=KILLS, needs=lambda options: f"--kills {options.kills}"
)

if __name__ == "__main__":
    sys.exit(main())
