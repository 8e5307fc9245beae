"""Programs in processes of their own, a SLURM cluster, and two machines on this one."""

import contextlib
import functools
import gc
import multiprocessing
import os
import pickle
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

# Groups of processes as torchrun makes them, forked: a script imports Lightning once for all of them.


def run_group(world_size: int, function: Callable[..., Any], *args: Any, seconds: float = 120) -> None:
    """Call `function(*args)` in so many processes, with the environment that torchrun gives.

    Raises:
        RuntimeError: If one of them fails, or takes too long; all are ended.
    """
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    processes = [
        context.Process(target=_member, args=(rank, world_size, port, function, args)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise RuntimeError(f"{function}{args} ended with {codes}")


def _member(rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "TORCHELASTIC_RUN_ID": "tests",
    }
    function(*args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# Programs in processes of their own, which see what the tests see; imports that take seconds are made once.


class Output(NamedTuple):
    """What a program wrote."""

    out: str
    err: str


def run_apart(
    function: Callable[..., object], *args: object, seconds: float = 300, code: int = 0, cwd: object = "."
) -> Output:
    """Call `function(*args)` in a process with one thread, where it must end with this code; what it wrote.

    The process is a fork of one that has imported PyTorch, Lightning, and the command line. It has ended when this
    returns, and so have all processes that it started. `function` must be a module's own.
    """
    server, pipes = _server(), [os.pipe(), os.pipe()]
    request = pickle.dumps((os.path.abspath(str(cwd)), _environment(), function, args))
    socket.send_fds(server, [request], [theirs for _, theirs in pipes])
    for _, theirs in pipes:
        os.close(theirs)
    pid = int(server.recv(100))
    written = {ours: b"" for ours, _ in pipes}
    open_, end = [*written], time.monotonic() + seconds
    while open_ and (ready := select.select(open_, [], [], max(0.0, end - time.monotonic()))[0]):
        for pipe in ready:
            written[pipe] += (more := os.read(pipe, 1 << 16))
            if not more:  # nobody is left who could write
                open_.remove(pipe)
    if open_:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    ended = int(server.recv(100))
    for pipe in written:
        os.close(pipe)
    output = Output(*(text.decode(errors="replace") for text in written.values()))
    if open_ or ended != code:
        how = f"did not end within {seconds} s" if open_ else f"ended with {ended}"
        raise AssertionError(f"{function.__name__}{args} {how}:\n{output.out[-3000:]}\n{output.err[-4000:]}")
    return output


def run_python(*words: object, **settings: Any) -> Output:
    """Run `python WORDS` (see `run_apart`)."""
    return run_apart(_python, *map(str, words), **settings)


def run_on_ranks(
    worker: Callable[..., Any], world_size: int, folder: Path, *args: Any, seconds: float = 100
) -> list[Any]:
    """What `worker(rank, *args)` returns on every rank of a gloo group; `worker` must be a module's own function."""
    run_apart(run_group, world_size, _save_result, folder, worker, args, seconds=seconds)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _save_result(folder: Path, worker: Callable[..., Any], args: tuple[Any, ...]) -> None:
    dist.init_process_group("gloo")
    result = worker(dist.get_rank(), *args)
    dist.barrier()
    torch.save(result, folder / f"{dist.get_rank()}.pt")


def _python(first: str, *rest: str) -> None:
    if first == "-m":
        sys.argv = [*rest]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, os.path.dirname(first))
        runpy.run_path(first, run_name="__main__")


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}


@functools.cache
def _server() -> socket.socket:
    """The connection to the process that forks; it ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.set_inheritable(True)
    code = f"from {__name__} import _serve; _serve({theirs.fileno()})"
    os.posix_spawn(sys.executable, [sys.executable, "-W", "ignore", "-c", code], _environment())
    theirs.close()
    return ours


def _serve(descriptor: int) -> None:
    """Fork for each request, and tell the process and how it ended."""
    import revdeq_lightning.cli.image
    import revdeq_lightning.cli.language  # noqa: F401

    control = socket.socket(fileno=descriptor)
    gc.freeze()  # no search through all of that, in each process
    while message := (received := socket.recv_fds(control, 1 << 20, 2))[0]:
        pid = os.fork()
        if not pid:
            os.setsid()
            control.close()
            for pipe, number in zip(received[1], (1, 2), strict=True):
                os.dup2(pipe, number)
                os.close(pipe)
            folder, environment, function, args = pickle.loads(message)
            os.environ.clear()
            os.environ |= environment
            os.chdir(folder)
            function(*args)
            return
        for pipe in received[1]:
            os.close(pipe)
        control.send(str(pid).encode())
        control.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())


def pids_with(*words: str) -> list[int]:
    """Of the Python processes whose command holds these words; none of one that ended, and is not waited for."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace")
        except OSError:  # it ended just now
            continue
        if "python" in command.split("\0")[0] and all(word in command for word in words):
            found.append(int(path.parent.name))
    return sorted(found)


# A SLURM of two nodes on this machine: its own daemons, ports and folders, nothing of the system's.


PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")


def slurm_is_missing() -> str | None:
    """Why there can be none here."""
    missing = [program for program in PROGRAMS if find(program) is None]
    if os.geteuid() != 0:
        return "SLURM's daemons start jobs, which needs root"
    return f"not installed: {', '.join(missing)} (apt-get install {' '.join(PACKAGES)})" if missing else None


PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")


def find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


class SlurmCluster:
    """Nodes n1 and n2; jobs may share them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def run(self, *command: object) -> str:
        """What a command says."""
        words = [str(word) for word in command]
        result = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        assert result.returncode == 0, f"{' '.join(words)}: {result.stderr}"
        return result.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job."""
        text = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_for(self, number: str, *states: str, seconds: float = 240) -> dict[str, str]:
        """Until the job is in one of these states."""
        end = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < end, f"job {number} is {job['JobState']} ({job['Reason']}), not {states}"
            time.sleep(0.2)
        return job

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log")))


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[SlurmCluster]:
    """Start it; at the end nothing is left. The folder's path must be short: sockets lie in it."""
    cluster = SlurmCluster(folder)
    controller, *nodes = free_ports(3)
    # The processes of a job meet at a port that Lightning makes of its id: not that of another cluster beside this one.
    first_job = os.getpid() % 9000 + 1
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    (folder / "slurm.conf").write_text(
        f"""
ClusterName=test
SlurmctldHost={socket.gethostname()}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
FirstJobId={first_job}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
NodeName=n1 NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={nodes[0]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={nodes[1]} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=10 State=UP
"""
    )
    for name in ("state", "n1", "n2"):
        (folder / name).mkdir()
    munge = ("--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key")
    munge += (f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed")
    with ExitStack() as stack:
        stack.enter_context(daemon(cluster, "munged", *munge))
        until((folder / "munge.socket").exists, "munged does not start", cluster)
        stack.enter_context(daemon(cluster, "slurmctld", "-D", "-i"))
        for node in ("n1", "n2"):
            stack.enter_context(daemon(cluster, "slurmd", "-D", "-N", node, name=node))
        until(lambda: idle_nodes(cluster) == 2, "the nodes do not come up", cluster)
        try:
            yield cluster
        finally:
            subprocess.run(["scancel", "--user=root"], env=cluster.environment, check=False, timeout=30)
            end_jobs(cluster)


def idle_nodes(cluster: SlurmCluster) -> int:
    command = ["sinfo", "--noheader", "--format=%D %t"]
    result = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, check=False, timeout=60)
    return sum(int(line.split()[0]) for line in result.stdout.splitlines() if line.split()[1] == "idle")


def end_jobs(cluster: SlurmCluster) -> None:
    """Wait until no job runs: what it started would outlive the daemons."""
    command = ["squeue", "--noheader"]
    for _ in range(150):
        result = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, check=False)
        if not result.stdout.strip():
            return
        time.sleep(0.2)


@contextmanager
def daemon(cluster: SlurmCluster, program: str, *arguments: str, name: str = "") -> Iterator[None]:
    log = cluster.folder / f"{name or program}.log"
    with log.open("w") as file:
        command = [str(find(program)), *arguments]
        process = subprocess.Popen(command, env=cluster.environment, stdout=file, stderr=file, start_new_session=True)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def until(condition, message: str, cluster: SlurmCluster, seconds: float = 40) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{message}\n{cluster.logs()}"
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


# Two "machines" on this one: network namespaces with addresses of their own, joined by a cable that can be cut.


def namespaces_are_missing() -> str | None:
    """Why there can be none here."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "not installed: ip (apt-get install iproute2)"
    name = f"rdq{os.getpid()}t"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"ip netns add: {made.stderr.strip()}"
    ip("netns", "del", name)
    return None


class Machine:
    """Its commands run in its namespace, and see its network alone."""

    def __init__(self, index: int) -> None:
        self.name = f"rdq{os.getpid()}m{index}"
        self.cable = f"rdq{os.getpid()}c{index}"
        self.address = f"10.77.0.{index + 1}"
        self.processes: list[subprocess.Popen] = []

    def start(self, log: Path, folder: Path, *command: object, **environment: str) -> subprocess.Popen:
        words = ["ip", "netns", "exec", self.name, *map(str, command)]
        settings = {**os.environ, "GLOO_SOCKET_IFNAME": self.cable, **environment}
        with log.open("a") as file:
            process = subprocess.Popen(
                words, cwd=folder, env=settings, stdout=file, stderr=file, start_new_session=True
            )
        self.processes.append(process)
        return process

    def pids(self, *words: str) -> list[int]:
        """Of the processes whose command holds these words, one after the other."""
        wanted = "\0".join(words).encode() + b"\0"
        pids = map(int, ip("netns", "pids", self.name).split())
        return [pid for pid in pids if wanted in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def switch_off(self) -> None:
        """Kill all that runs on it; the others hear nothing of it but silence, if its cable is cut before."""
        for pid in ip("netns", "pids", self.name).split():
            subprocess.run(["kill", "-KILL", pid], capture_output=True, check=False)
        for process in self.processes:
            process.wait(timeout=20)
        self.processes = []

    def plug(self, *, in_: bool) -> None:
        ip("-n", self.name, "link", "set", self.cable, "up" if in_ else "down")


@contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Joined by a cable; at the end nothing is left."""
    machines = Machine(0), Machine(1)
    try:
        for machine in machines:
            ip("netns", "add", machine.name)
        first, second = machines
        ip("link", "add", first.cable, "netns", first.name, "type", "veth", "peer", second.cable, "netns", second.name)
        for machine in machines:
            ip("-n", machine.name, "address", "add", f"{machine.address}/24", "dev", machine.cable)
            ip("-n", machine.name, "link", "set", "lo", "up")
            machine.plug(in_=True)
        yield machines
    finally:
        for machine in machines:
            if machine.name in ip("netns", "list").split():
                machine.switch_off()
                ip("netns", "del", machine.name)


def ip(*words: str) -> str:
    result = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"ip {' '.join(words)}: {result.stderr}"
    return result.stdout
