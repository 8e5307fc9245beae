"""Processes of several machines that wait for one that does not come."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.processes import QUICK_PATH, free_ports, pids_with
from tests.helpers.runs import tiny_config

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("early", [True, False], ids=["during the imports", "while they wait"])
def test_sigterm_ends_the_wait_and_all_processes_of_this_machine(tmp_path, early):
    config, log = tiny_config(tmp_path, num_nodes=2, devices=2), tmp_path / "log"
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "NODE_RANK": "0"}
    settings = {**os.environ, **meeting, "PYTHONPATH": QUICK_PATH}
    command = [sys.executable, "-m", "revdeq_lightning", "fit", "--config", str(config)]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=settings, start_new_session=True)
    try:
        begin = time.monotonic()
        while not ("GLOBAL_RANK: 1" in log.read_text() or (early and time.monotonic() > begin + 1)):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < begin + 120, log.read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75, log.read_text()
        time.sleep(0.5)
        assert pids_with(str(config)) == []
    finally:
        for pid in pids_with(str(config)):
            os.kill(pid, signal.SIGKILL)
        process.wait()
