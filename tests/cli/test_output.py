"""Whatever standard output and error are connected to, they do not end a command."""

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console

from revdeq_lightning.cli.inference import writing
from revdeq_lightning.loggers.progress import RunProgress
from revdeq_lightning.program import printable, program, say
from revdeq_lightning.runs.output import LastingFile
from tests.helpers.processes import QUICK_PATH
from tests.helpers.runs import run, tiny_config

REPLACED = "from revdeq_lightning.runs.output import make_output_last as m; m(); import os, sys; "


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of the shell, in which `$PY` is Python."""
    own = {**os.environ, "PYTHONPATH": QUICK_PATH, "PY": sys.executable, **environment}
    return subprocess.run(
        ["bash", "-c", command], env=own, capture_output=True, text=True, errors="replace", check=False
    )


def test_a_pipe_without_a_reader_and_a_full_disk_lead_nowhere():
    reader, writer = os.pipe()
    os.close(reader)
    with LastingFile(writer, "w") as file:
        with pytest.raises(BrokenPipeError):
            os.write(writer, b"x")
        for _ in range(2):
            assert file.write(b"text") == 4
        assert os.write(writer, b"x") == 1  # by other libraries, too
    with LastingFile("/dev/full", "w") as file:
        assert file.write(b"text") == 4


def test_a_full_pipe_that_does_not_wait_loses_nothing():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    content, read = os.urandom(1_000_000), io.BytesIO()

    def read_all() -> None:
        while part := os.read(reader, 4096):
            read.write(part)

    thread = threading.Thread(target=read_all)
    thread.start()
    with io.BufferedWriter(LastingFile(writer, "w")) as file:
        file.write(content)
    thread.join()
    os.close(reader)
    assert read.getvalue() == content


@pytest.mark.parametrize("encoding", ["ascii:strict", "cp1252", "utf-8"])
def test_characters_that_cannot_be_shown_are_replaced(encoding):
    program = REPLACED + r"print('a\u2026\udc80\ufffdb'); print('e\u20ac', file=sys.stderr)"
    result = shell(f'"$PY" -c "{program}"', PYTHONIOENCODING=encoding)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("a")
    assert result.stdout.endswith("b\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_other_files(closed, tmp_path):
    program = (
        "print('x'); print('y', file=sys.stderr); f = open(sys.argv[1], 'w'); assert f.fileno() > 2; os.write(1, b'z')"
    )
    result = shell(f'"$PY" -c "{REPLACED}{program}" "$FILE" {closed}', FILE=str(tmp_path / "file"))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("output", [">&-", ">/dev/full", "2>&1 | true"])
def test_help_ends_well_without_its_reader(output):
    result = shell(f'set -o pipefail; "$PY" -m revdeq_lightning --help {output}')
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr


class Broken(io.StringIO):
    """Output in a program of somebody else, which nothing replaced."""

    def __init__(self, error: type[OSError]) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError, OSError])
@pytest.mark.filterwarnings("ignore:writing to the terminal failed")
def test_our_callbacks_endure_the_broken_output_of_another_program(monkeypatch, error):
    monkeypatch.setattr(sys, "stdout", Broken(error))
    say("a line")
    progress = RunProgress(console=Console(file=sys.stdout, force_terminal=True))
    progress.print("a line")
    progress._start("training", 3, 0)
    progress.on_train_end(None, None)


@pytest.mark.slow
def test_a_run_whose_reader_goes_away_trains_to_its_end(tmp_path):
    config = tiny_config(tmp_path)
    result = shell(
        'set -o pipefail; "$PY" -m revdeq_lightning fit --config "$CONFIG" --run.version=v | head -1',
        CONFIG=str(config), PYTHONIOENCODING="ascii",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "standard output is lost (Broken pipe)" in result.stderr
    folder = tmp_path / "runs/tiny/v"
    assert (folder / "report.html").is_file()
    run("test", "--ckpt_path", folder / "checkpoints" / "last.ckpt")


def test_printed_samples_hold_no_control_characters():
    shown = "a\n\t\u00e9\U0001f600\u200d"
    assert printable(shown) == shown
    assert printable("a\r\nb") == "a\nb"
    for control in (*range(0x20), *range(0x7F, 0xA0)):
        if chr(control) not in "\n\t":
            assert printable(f"a{chr(control)}b") == "a\ufffdb"


def test_commands_name_the_interpreter_in_use(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["revdeq_lightning/__main__.py"])
    python = tmp_path / "python"
    python.write_text("")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PATH", "/nowhere")
    assert program() == f"{python} -m revdeq_lightning"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program() == "python -m revdeq_lightning"
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path.parent)
    assert program() == f"{tmp_path.name}/python -m revdeq_lightning"


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    message = r"cannot write /dev/full: No space left on device; choose another --output"
    with pytest.raises(OSError, match=message), writing(Path("/dev/full")), open("/dev/full", "w") as file:
        file.write("x")
    with pytest.raises(FileNotFoundError, match=r"missing.png"), writing(tmp_path / "a.csv"):
        (tmp_path / "missing.png").read_bytes()
