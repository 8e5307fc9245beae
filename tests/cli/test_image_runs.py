"""The image classifiers' command line, from JPEG files to the sheets of a test."""

import csv
import json
import os
import shutil

import pytest
from PIL import Image

from tests.helpers.data import TINY_CLASSES as CLASSES, image_folder, tiny_image_config
from tests.helpers.runs import error_of, run

pytestmark = pytest.mark.xdist_group("image_runs")


def read(path):
    with path.open(newline="", errors="surrogateescape") as file:
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
    assert float(rows[-1]["test/accuracy"]) == 1.0
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
    environment = json.loads((path / "environment.json").read_text())
    images = {"train": 36, "validation": 12, "test": 48}
    assert environment["data"] == {"images": images, "classes": list(CLASSES), "left_out": []}


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
    run("image", "test", "--ckpt_path", checkpoint, "--model.solver.max_steps=4", "--run.depth_sweep=false")
    out = capsys.readouterr().out
    assert f"accuracy {float(rows[2]['accuracy']):.2%}" in out
    assert f"{float(rows[2]['loss']):.4f} nats per image" in out


def test_without_test_images_the_sheets_are_of_the_validation_images(tmp_path, capsys):
    image_folder(tmp_path, splits=("train",))
    run("image", "fit", "--config", tiny_image_config(tmp_path, max_steps=4))
    assert "Validation (best.ckpt): accuracy" in capsys.readouterr().out
    matrix = read(only_run(tmp_path) / "confusion_matrix.csv")
    assert sum(int(row[name]) for row in matrix for name in CLASSES) == 12  # a quarter of 48
    assert (only_run(tmp_path) / "depth_sweep.png").is_file()
    error = error_of(capsys, "image", "test", "--ckpt_path", only_run(tmp_path) / "checkpoints" / "best.ckpt")
    assert "no test split to evaluate, only train, validation" in error


def test_predict_writes_the_probabilities_of_a_folder(trained, tmp_path, capsys):
    checkpoint = only_run(trained) / "checkpoints" / "best.ckpt"
    output, images = tmp_path / "out.csv", tmp_path / "images"
    shutil.copytree(image_folder(trained) / "test", images)
    odd = os.fsencode(images / "red") + b"/caf\xe9.jpg"  # not UTF-8
    shutil.copy(images / "red" / "00.jpg", odd)
    run("image", "predict", "--ckpt_path", checkpoint, "--images", images, "--output", output)
    assert "49 images" in capsys.readouterr().out
    assert odd in output.read_bytes()
    rows = read(output)
    assert len(rows) == 49
    for row in rows:
        assert f"/{row['prediction']}/" in row["path"]
        assert sum(float(row[name]) for name in CLASSES) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fit", "--model.network.num_classes=5"), "num_classes"),
        (("fit", "--model.network.architecture=resnet"), "needs solver='none'"),
        (("fit", "--model.label_smoothing=1.5"), "label_smoothing must be in [0, 1), got 1.5"),
        (("fit", "--data.path=nowhere"), "nowhere"),
        (("generate", "--ckpt_path", "x"), "no checkpoint x"),
        (("predict", "--images", ".", "--ckpt_path", __file__), "is not a checkpoint, or a truncated one"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, capsys, arguments, message):
    command, *options = arguments
    with pytest.raises(SystemExit) as stop:
        run("image", command, *(("--config", tiny_image_config(tmp_path)) if command == "fit" else ()), *options)
    assert stop.value.code != 0
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not any("Traceback" in line for line in lines)
