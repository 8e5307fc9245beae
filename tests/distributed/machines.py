"""Two "machines" on this one: network namespaces with addresses of their own, joined by a cable that can be cut."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
