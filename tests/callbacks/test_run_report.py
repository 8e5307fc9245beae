"""What a run says at its end of the checkpoints that it left."""

import shlex

import pytest

from revdeq_lightning.checkpoints.files import write_checkpoint
from revdeq_lightning.report.at_end import close_run
from revdeq_lightning.runs.folder import LanguageRunConfig


@pytest.mark.parametrize(
    ("steps", "damaged", "go_on", "test"),
    [
        ({"best": 3, "last": 6, "step-3": 3}, (), "last", "best"),
        ({"last": 6}, (), "last", "last"),
        ({"best": 6, "step-3": 3}, (), "step-3", "best"),
        ({"best": 6}, (), "best", "best"),
        ({"best": 3, "step-3": 3, "step-20": 20, "step-100": 100}, (), "step-100", "best"),
        ({"step-20": 20, "step-100": 100}, ("step-100",), "step-20", "step-20"),
        ({"best": 20, "step-3": 3}, ("best",), "step-3", "step-3"),
    ],
)
def test_it_offers_to_go_on_from_the_newest_that_is_there(tmp_path, capsys, steps, damaged, go_on, test):
    checkpoints = tmp_path / "checkpoints"
    for name, step in steps.items():
        write_checkpoint({"global_step": step, "loops": {}}, checkpoints / f"{name}.ckpt")
    for name in damaged:
        path = checkpoints / f"{name}.ckpt"
        path.write_bytes(path.read_bytes()[:-100])
    close_run(tmp_path, LanguageRunConfig())
    lines = capsys.readouterr().out.splitlines()
    for start, command, name in (("Go on", "fit", go_on), ("Test", "test", test), ("Generate", "generate", test)):
        (line,) = [line for line in lines if line.startswith(start)]
        assert shlex.split(line.removeprefix(start))[2:6] == [
            *("revdeq_lightning", command),
            *("--ckpt_path", f"{checkpoints}/{name}.ckpt"),
        ]
    (line,) = [line for line in lines if line.startswith("  checkpoints ")]
    assert set(line.replace(",", "").split()[1:]) == {f"{checkpoints}/{name}.ckpt" for name in (go_on, test)}


def test_it_says_that_there_is_none_or_that_none_can_be_used(tmp_path, capsys):
    close_run(tmp_path, LanguageRunConfig())
    assert "There is no checkpoint yet" in capsys.readouterr().out
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/best.ckpt").write_bytes(b"")
    close_run(tmp_path, LanguageRunConfig())
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"No checkpoint in {tmp_path}/checkpoints can be used: best.ckpt is empty"
