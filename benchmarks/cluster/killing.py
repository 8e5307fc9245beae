"""Kill runs of the command line at random moments and resume them. The process imports once and forks.

    python -m benchmarks.cluster.killing --config FILE --folder FOLDER --kills 30 --seed 0 \
        [--processes 2] [--report FILE]

Half of the kills come from outside, at a random moment of training; the other half occur while writing, before the n-th
write, fsync, link, rename, or removal. Every finished run is compared with an undisturbed one. With several processes
(FSDP2, sharded checkpoints), a random one is killed; the others must end by themselves.
"""

import argparse
import csv
import itertools
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

EVENTS = {"write": 500, "fsync": 12, "replace": 12, "link": 6, "unlink": 20}
"""Calls before which a kill occurs, and among how many of them it chooses."""
SHARDED_EVENTS = {"fsync": 40, "rename": 25, "unlink": 45, "rmdir": 7}, {"fsync": 10}
"""The same if a checkpoint is a folder: for the first process, which moves it, and for any other."""
PATIENCE = 60.0
"""Seconds within which a process must notice that another one has ended."""

FSDP2 = ("--config", "configs/trainer/fsdp2.yaml", "--trainer.strategy.sharded_checkpoints=true")


def run(
    arguments: Sequence[str],
    log: Path,
    *,
    event: tuple[str, int] | None = None,
    after: float | None = None,
    disturb: tuple[int, Callable[[], Any]] | None = None,
    num_processes: int = 1,
    struck: int = 0,
) -> int:
    """Run one command in forked processes and return its exit code, negative if one was killed.

    Args:
        arguments: Arguments of the command line.
        log: File for its output.
        event: Kill it before the n-th call of this kind.
        after: Kill it this many seconds after the start of training.
        disturb: A training step, and a function called in the process after it.
        num_processes: Number of processes, started in the environment of torchrun.
        struck: Index of the process to kill or disturb.

    Raises:
        RuntimeError: If a process continues without the killed one; it is terminated.
    """
    log.write_text("")
    running, port = {}, _free_port()
    for rank in range(num_processes):
        pid = os.fork()
        if pid == 0:
            if num_processes > 1:
                _join_group(rank, num_processes, port)
            _child(arguments, log, event if rank == struck else None, disturb if rank == struck else None)
        running[pid] = rank
    target = next(pid for pid, rank in running.items() if rank == struck)
    kill_at = give_up_at = float("inf")
    codes = []
    while running:
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del running[pid]
                codes.append(os.waitstatus_to_exitcode(status))
                give_up_at = min(give_up_at, time.monotonic() + PATIENCE)
        if after is not None and kill_at == float("inf") and "Run (" in log.read_text():
            kill_at = time.monotonic() + after
        if time.monotonic() >= kill_at and target in running:
            os.kill(target, signal.SIGKILL)
        if time.monotonic() >= give_up_at:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise RuntimeError(f"other processes continued for {PATIENCE:.0f} s after one ended with {codes[0]}")
        time.sleep(0.002)
    return min(codes) if min(codes) < 0 else max(codes)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _join_group(rank: int, num_processes: int, port: int) -> None:
    """Set the environment that torchrun would set."""
    import torch

    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": num_processes, "GROUP_RANK": 0}
    group |= {"LOCAL_WORLD_SIZE": num_processes, "RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_RUN_ID": "killing"}
    os.environ |= {name: str(value) for name, value in group.items()}
    torch.set_num_threads(1)


def _child(arguments: Sequence[str], log: Path, event: Any, disturb: Any) -> None:
    code = 1
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 1)
        os.dup2(1, 2)
        sys.stdout, sys.stderr = open(1, "w", 1, closefd=False), open(2, "w", 1, closefd=False)  # noqa: SIM115
        if event:
            _kill_before(*event)
        if disturb:
            _disturb_at(*disturb)
        from revdeq_lightning.cli.main import main

        main(list(arguments))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(code)


def _kill_before(kind: str, number: int) -> None:
    """Patch the functions that a save calls, so that the process is killed before the n-th call."""
    calls = itertools.count(1)

    def counted(own: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return own(*args, **kwargs)

        return call

    if kind != "write":
        setattr(os, kind, counted(getattr(os, kind)))
        return
    import torch

    from revdeq_lightning.checkpoints import files as checkpoints

    def save(content: Any, file: Any) -> None:
        torch.save(content, cast(Any, SimpleNamespace(write=counted(file.write), flush=file.flush)))

    cast(Any, checkpoints).torch = SimpleNamespace(**vars(torch) | {"save": save})


def _disturb_at(step: int, what: Callable[[], Any]) -> None:
    """Call a function after a training step of this process."""
    from revdeq_lightning.runs.random_state import ResumableRandomState

    def on_train_batch_end(self: Any, trainer: Any, *_: Any) -> None:
        if trainer.global_step == step:
            what()

    ResumableRandomState.on_train_batch_end = on_train_batch_end  # type: ignore[method-assign]


def curve(folder: Path) -> list[dict[str, str]]:
    """All values in metrics.csv that do not depend on time measurements."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if v and not k.startswith("system/")} for row in csv.DictReader(file)]
    return [row for row in rows if len(row) > 1]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path) -> dict[str, Any]:
    import torch

    from revdeq_lightning.checkpoints.names import is_sharded_checkpoint
    from revdeq_lightning.checkpoints.sharded import TRAINED, WEIGHTS, read_whole

    path = folder / "checkpoints" / "last.ckpt"
    if is_sharded_checkpoint(path):
        states = read_whole(path, WEIGHTS, TRAINED)
        return {f"{name}.{key}": weight for name, state in states.items() for key, weight in state.items()}
    content = torch.load(path, weights_only=True)
    return dict(content.get("trained_weights") or content["state_dict"])


def differences(folder: Path, reference: Path) -> list[str]:
    """Differences between a finished run and the undisturbed one; empty if nothing was lost."""
    import torch

    found = []
    if curve(folder) != curve(reference):
        found.append("the curves differ")
    ours, theirs = weights(folder), weights(reference)
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in ours):
        found.append("the weights differ")
    if files(folder) != files(reference):
        found.append(f"files: {sorted(files(folder) ^ files(reference))}")
    return found


def newest_step(folder: Path) -> int:
    """Step of the newest usable checkpoint; 0 if there is none."""
    from revdeq_lightning.checkpoints.files import newest_good, steps_of

    path = newest_good(folder / "checkpoints").path
    return 0 if path is None else steps_of(path).number


def last_logged_step(folder: Path) -> int:
    """Last step logged before the kill; a truncated line does not count."""
    path = folder / "metrics.csv"
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    rows = [row for row in csv.DictReader(line.decode() for line in lines) if row.get("train/loss")]
    return int(rows[-1]["step"]) + 1 if rows else 0


def kill_and_go_on(config: Path, folder: Path, num_kills: int, seed: int, num_processes: int = 1) -> dict[str, Any]:
    """Kill and resume runs, with FSDP2 and sharded checkpoints if there are several processes."""
    draws = random.Random(seed)
    log = folder / "log"
    common = ["fit", "--config", str(config), "--run.test=false", f"--run.folder={folder}", "--run.name=runs"]
    if num_processes > 1:
        common += [*FSDP2, "--trainer.accelerator=cpu", f"--trainer.devices={num_processes}"]
    begin = time.monotonic()
    if code := run([*common, "--run.version=whole"], log, num_processes=num_processes):
        raise RuntimeError(f"the undisturbed run failed with code {code}: {log.read_text()}")
    seconds = time.monotonic() - begin
    reference = folder / "runs" / "whole"
    result: dict[str, Any] = {"kills": [], "finished": 0, "differences": [], "seconds_undisturbed": seconds}
    current, attempt = folder / "runs" / "0", 0
    while len(result["kills"]) < num_kills or current.exists():
        arguments = [*common, f"--run.version={current.name}"]
        step = newest_step(current)
        if step:
            arguments.append("--ckpt_path=last")
        else:
            shutil.rmtree(current, ignore_errors=True)
        how: dict[str, Any] = {}
        if len(result["kills"]) < num_kills:
            events = EVENTS
            if num_processes > 1:
                how["struck"] = draws.randrange(num_processes)
                events = SHARDED_EVENTS[min(how["struck"], 1)]
            if attempt % 2:
                kind = draws.choice(list(events))
                how["event"] = kind, draws.randint(1, events[kind])
            else:
                how["after"] = draws.uniform(0, seconds / 3)
        attempt += 1
        code = run(arguments, log, num_processes=num_processes, **how)
        if code == -signal.SIGKILL:
            lost = last_logged_step(current) - newest_step(current)
            result["kills"].append({**how, "began_at": step, "newest": newest_step(current), "steps_to_repeat": lost})
            result["kills"][-1]["errors"] = [
                line for line in log.read_text().splitlines() if line.startswith("error: ")
            ]
        elif code == 0:
            result["finished"] += 1
            result["differences"] += differences(current, reference)
            shutil.rmtree(current)
            current = folder / "runs" / str(result["finished"])
        else:
            raise RuntimeError(f"a run failed with code {code}: {log.read_text()}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import revdeq_lightning.cli.tasks  # noqa: F401  before the forks

    result = kill_and_go_on(options.config, options.folder, options.kills, options.seed, options.processes)
    text = json.dumps(result, indent=1)
    if options.report:
        options.report.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
