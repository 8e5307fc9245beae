"""Weights exported: what is told where that fails, and what it leaves. What they hold: `test_sharded_checkpoint.py`."""

import resource
import signal

import pytest

from tests.helpers.runs import run, tiny_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run("fit", "--config", tiny_config(folder, max_steps=1), "--run.version=v", "--run.test=false")
    return folder / "runs/tiny/v/checkpoints/last.ckpt"


def error(capsys, *arguments):
    """The only line."""
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_it_says_of_a_damaged_checkpoint_what_generate_says(checkpoint, tmp_path, capsys):
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(content)
    capsys.readouterr()
    told = error(capsys, "export", "--ckpt_path", damaged)
    assert told == f"error: {damaged} is damaged (its checksum does not match)"
    assert told == error(capsys, "generate", "--ckpt_path", damaged)


def test_a_folder_that_is_missing_is_told(checkpoint, tmp_path, capsys):
    target = tmp_path / "none/weights.safetensors"
    told = error(capsys, "export", "--ckpt_path", checkpoint, "--output", target)
    assert told == f"error: cannot write {target}: there is no folder {target.parent}"


def test_a_full_disk_is_told_and_leaves_the_file_of_before(checkpoint, tmp_path, capsys):
    target = tmp_path / "weights.safetensors"
    run("export", "--ckpt_path", checkpoint, "--output", target)
    before = target.read_bytes()
    capsys.readouterr()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        told = error(capsys, "export", "--ckpt_path", checkpoint, "--output", target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert told.startswith(f"error: cannot write {target}: ")
    assert "File too large" in told
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
