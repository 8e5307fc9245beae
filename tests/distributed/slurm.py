"""A SLURM of two nodes on this machine: its own daemons, ports and folders, nothing of the system's."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.helpers.processes import free_ports

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
