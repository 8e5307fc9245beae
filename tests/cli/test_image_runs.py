"""The image classifiers' command line, from JPEG files to the sheets of a test."""

import csv
import json
import os
import shutil

import pytest
import torch
from PIL import Image

from tests.helpers.data import TINY_CLASSES as CLASSES, image_folder, tiny_image_config
from tests.helpers.runs import run

pytestmark = pytest.mark.xdist_group("image_runs")


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def only_run(folder):
    (path,) = (folder / "runs" / "tiny").iterdir()
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image")
    run("image", "fit", "--config", tiny_image_config(folder))
    return folder


def test_a_run_learns_colors_and_leaves_what_is_promised(trained):
    path = only_run(trained)
    rows = read(path / "metrics.csv")
    figures = [float(row["val/accuracy"]) for row in rows if row.get("val/accuracy")]
    assert figures[-1] == 1.0
    assert float(rows[-1].get("test/accuracy") or 1.0) == 1.0
    logged = [row for row in rows if row.get("train/loss")]
    assert all(float(row["equilibrium/forward_nfe"]) == 4 for row in logged)  # two stages, two evaluations each
    assert all(float(row["equilibrium/reconstruction_mismatch"]) == 0 for row in logged)
    assert "system/images_per_second" in rows[0]
    for name in ("confusion_matrix.png", "depth_sweep.png"):
        with Image.open(path / name) as image:
            assert image.width > 100
    page = (path / "report.html").read_text()
    assert "accuracy (test)" in page
    assert page.count("data:image/png;base64,") >= 1


def test_the_confusion_matrix_counts_every_test_image(trained):
    matrix = read(only_run(trained) / "confusion_matrix.csv")
    assert [row["true class"] for row in matrix] == list(CLASSES)
    for row in matrix:
        assert sum(int(row[name]) for name in CLASSES) == 16
        assert int(row[row["true class"]]) == 16


def test_the_depth_sweep_is_what_a_test_with_these_steps_gives(trained, capsys):
    rows = read(only_run(trained) / "depth_sweep.csv")
    assert [(int(row["steps"]), int(row["forward_nfe"])) for row in rows] == [(1, 2), (2, 4), (4, 8), (8, 16)]
    checkpoint = only_run(trained) / "checkpoints" / "best.ckpt"
    for row in rows[:3]:
        arguments = ("--ckpt_path", checkpoint, f"--model.solver.max_steps={row['steps']}", "--run.depth_sweep=false")
        run("image", "test", *arguments)
        out = capsys.readouterr().out
        accuracy, nats = float(row["accuracy"]), float(row["loss"])
        assert f"accuracy {accuracy:.2%}" in out
        assert f"{nats:.4f} nats per image" in out


def test_without_test_images_the_sheets_are_of_the_validation_images(tmp_path, capsys):
    image_folder(tmp_path, splits=("train",))
    run("image", "fit", "--config", tiny_image_config(tmp_path, max_steps=4))
    assert "Validation (best.ckpt): accuracy" in capsys.readouterr().out
    matrix = read(only_run(tmp_path) / "confusion_matrix.csv")
    assert sum(int(row[name]) for row in matrix for name in CLASSES) == 12  # a quarter of 48
    assert (only_run(tmp_path) / "depth_sweep.png").is_file()
    with pytest.raises(SystemExit):
        run("image", "test", "--ckpt_path", only_run(tmp_path) / "checkpoints" / "best.ckpt")
    assert "no test split to evaluate, only train, validation" in capsys.readouterr().err


def test_predict_writes_the_probabilities_of_a_folder(trained, tmp_path, capsys):
    checkpoint = only_run(trained) / "checkpoints" / "best.ckpt"
    output = tmp_path / "out.csv"
    run("image", "predict", "--ckpt_path", checkpoint, "--images", image_folder(trained) / "test", "--output", output)
    assert "48 images" in capsys.readouterr().out
    rows = read(output)
    assert len(rows) == 48
    for row in rows:
        assert row["prediction"] in row["path"]
        assert sum(float(row[name]) for name in CLASSES) == pytest.approx(1, abs=1e-5)


def test_predictions_keep_names_that_are_not_utf8(trained, tmp_path, capsys):
    checkpoint = only_run(trained) / "checkpoints" / "best.ckpt"
    odd = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    shutil.copy(image_folder(trained) / "test" / "red" / "00.jpg", odd)
    run("image", "predict", "--ckpt_path", checkpoint, "--images", tmp_path, "--output", tmp_path / "out.csv")
    assert odd in (tmp_path / "out.csv").read_bytes()
    assert "1 images" in capsys.readouterr().out


def test_a_run_records_its_data(trained):
    environment = json.loads((only_run(trained) / "environment.json").read_text())
    images = {"train": 36, "validation": 12, "test": 48}
    assert environment["data"] == {"images": images, "classes": list(CLASSES), "left_out": []}


def test_training_goes_on_from_the_last_checkpoint_bit_for_bit(trained, tmp_path):
    run("image", "fit", "--config", tiny_image_config(tmp_path, max_steps=6), "--run.test=false")
    run("image", "fit", "--ckpt_path", only_run(tmp_path) / "checkpoints" / "last.ckpt", "--trainer.max_steps=12")
    whole, parts = (
        torch.load(only_run(folder) / "checkpoints" / "last.ckpt", weights_only=True) for folder in (trained, tmp_path)
    )
    assert whole["global_step"] == parts["global_step"] == 12
    for kind in ("state_dict", "trained_weights"):
        assert whole[kind].keys() == parts[kind].keys()
        assert all(torch.equal(a, parts[kind][name]) for name, a in whole[kind].items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model.network.channels=[16,24]",), "multiples of it"),
        (("--model.network.chanels=[16,16]",), "did you mean model.network.channels?"),
        (("--model.network.num_classes=5",), "num_classes"),
        (("--model.network.architecture=resnet",), "needs solver='none'"),
        (("--model.network.steps=[1]",), "one entry per stage, got [1]"),
        (("--model.label_smoothing=1.5",), "label_smoothing must be in [0, 1), got 1.5"),
        (("--data.path=nowhere",), "nowhere"),
    ],
)
def test_a_wrong_setting_is_one_line(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        run("image", "fit", "--config", tiny_image_config(tmp_path), *arguments)
    assert stop.value.code != 0
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not any("Traceback" in line for line in lines)


def test_commands_that_do_not_fit_are_refused(trained, capsys):
    for arguments, message in (
        (("image", "generate", "--ckpt_path", "x"), "no checkpoint x"),
        (
            ("image", "predict", "--ckpt_path", image_folder(trained) / "test" / "red" / "00.jpg", "--images", "."),
            "not",
        ),
    ):
        with pytest.raises(SystemExit):
            run(*arguments)
        assert message in capsys.readouterr().err
