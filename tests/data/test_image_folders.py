"""Splits and classes of image folders and archives, by the names of files."""

import itertools
import os
import re
import shutil
import tarfile

import numpy as np
import pytest

from revdeq_lightning.data.images.folder import open_folder
from tests.helpers.data import make_archive, make_folder, refused, split


def make_tree(root, *paths):
    """Empty files; a comma separates names: "train,val/ant,bee/1.jpg"; a path that ends in a slash is a folder."""
    for path in paths:
        for *folders, file in itertools.product(*(names.split(",") for names in path.split("/"))):
            folder = root.joinpath(*folders)
            folder.mkdir(parents=True, exist_ok=True)
            if file:
                (folder / file).touch()
    return root


def found(path):
    """Classes, number of images of each class by split, and what was left out."""
    names, tables, left_out = open_folder(path).open()
    return names, {name: np.bincount(table.labels).tolist() for name, table in tables.items()}, left_out


DECOMPOSED, COMPOSED = "cafe\u0301", "caf\u00e9"


@pytest.mark.parametrize(
    ("paths", "names", "counts"),
    [
        ("train,val,test/ant,bee/1.jpg", "ant bee", {"train": [1, 1], "validation": [1, 1], "test": [1, 1]}),
        ("Training,DEV,test_set/ant,bee/1.jpg", "ant bee", {"train": [1, 1], "validation": [1, 1], "test": [1, 1]}),
        ("a/b/ant,bee/1.jpg,2.png a/b/bee/3.gif", "ant bee", {"train": [2, 3]}),
        ("a/train/ant,bee/x/1.jpg", "ant bee", {"train": [1, 1]}),
        ("train/test,train/1.jpg", "test train", {"train": [1, 1]}),
        ("bullet_train,car,test_tube/1.jpg", "bullet_train car test_tube", {"train": [1] * 3}),
        ("A,a/1.jpg", "A a", {"train": [1, 1]}),
        (
            f"train/ant,{COMPOSED}/1.jpg train/{DECOMPOSED}/2.jpg val/ant,{DECOMPOSED}/1.jpg",
            f"ant {DECOMPOSED}",
            {"train": [1, 2], "validation": [1, 1]},
        ),
    ],
)
def test_splits_and_classes_of_a_folder_and_its_archive(tmp_path, paths, names, counts):
    root = make_tree(tmp_path / "images", *paths.split())
    for path in (root, make_archive(root, tmp_path / "images.tar")):
        assert found(path) == (names.split(), counts, [])


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ("train/ant,cat/1.jpg train/bee/", r"class folder train/bee in \S+ has no images \(.bmp, "),
        ("train/ant,cat/1.jpg test/bee/1.jpg", "has the class bee in test but not"),
        ("train,test/ant/1.jpg", "1 class"),
        ("train/ant,cat/1.jpg val/", "folder for validation without class"),
        ("test,val/ant,cat/1.jpg", r"has test/, val/ but no train/: put"),
        ("Testing/ant,cat/1.jpg", "has Testing/ but no train/"),
        ("train,val,valid/ant,cat/1.jpg", "has both val/ and valid/ for validation: remove or rename one"),
        ("Train,train/ant,cat/1.jpg", "has both Train/ and train/ for train"),
        ("train,test,extra/ant,cat/1.jpg", r"has folders of splits \(test/, train/\) and other .* images \(extra\)"),
        ("train,cat,dog/a,b/1.jpg", "if all are classes, move all into one folder train/"),
        ("seg_train,seg_test,seg_pred/a,b/1.jpg", r"look like splits, not like classes \(seg_test, seg_train\)"),
        ("train1,train2/a,b/1.jpg", "look like splits"),
        ("fold1_train,fold1_val/a,b/1.jpg", "look like splits"),
        ("trainA,trainB,testA,testB/1.jpg", "look like splits"),
        ("imagesTr,imagesTs/a,b/1.jpg", r"same folders in each \(a, b in imagesTr, imagesTs\): rename .* train/"),
        ("ant,bee/train,test/1.jpg", r"has splits within its classes \(ant, bee\): move them to train/CLASS"),
        ("train/ant,cat/1.jpg val/Cat/1.jpg", "class folders 'cat' and 'Cat', which differ only in case"),
    ],
)
def test_folders_whose_splits_or_classes_are_not_clear_are_refused(tmp_path, paths, message):
    with refused(message):
        found(make_tree(tmp_path, *paths.split()))


def test_missing_folders_and_damaged_archives_are_told(module, tmp_path, folder):
    with refused(r"no such image folder or archive: \S+/nowhere .*train/CLASS", FileNotFoundError):
        module(tmp_path / "nowhere").setup("fit")
    (tmp_path / "images.zip").write_bytes(b"")
    with refused(r"images.zip is neither a folder nor an archive \(.tar, .tar.gz"):
        module(tmp_path / "images.zip").setup("fit")
    for suffix in (".tar", ".tar.gz", ".tar.xz"):
        archive = make_archive(folder, tmp_path / f"cut{suffix}")
        content = archive.read_bytes()
        with tarfile.open(archive) as members:
            header = members.getmembers()[-1].offset
        archive.write_bytes(content[: header + 100 if suffix == ".tar" else len(content) // 2])
        with refused(rf"cut{suffix} cannot be read as a tar archive .*it is complete"):
            module(archive).setup("fit")


def test_what_is_no_image_is_left_out_and_told(tmp_path):
    root = make_tree(tmp_path / "nas", "train,val/ant,bee/1.jpg", "val/ant/@eaDir/0.jpg", "train/bee/._0.jpg")
    make_tree(
        root, ".ipynb_checkpoints/ant/0.jpg", "__MACOSX/train/ant/0.jpg", "#recycle/0.jpg", "train/lost+found/0.jpg"
    )
    names, counts, (system,) = found(make_archive(root, tmp_path / "nas.tar"))
    assert (names, counts) == (["ant", "bee"], {"train": [1, 1], "validation": [1, 1]})
    assert "made by the system: #recycle, #recycle/0.jpg, .ipynb_checkpoints, " in system
    make_tree(root, "README.txt", "train/ant/list.csv")
    (root / "train/ant/up").symlink_to("..")
    ignored = "2 file(s) are not images of a class and are ignored: README.txt, train/ant/list.csv"
    with pytest.warns(UserWarning, match=re.escape(ignored)):
        names, counts, (links, system, others) = found(root)
    assert (names, counts) == (["ant", "bee"], {"train": [1, 1], "validation": [1, 1]})
    assert (links, others) == ("1 link to a folder that contains it: train/ant/up", ignored)
    assert system.startswith("6 made by the system: #recycle, .ipynb_checkpoints, __MACOSX, train/bee/._0.jpg, ")


@pytest.mark.parametrize("in_memory", [True, False])
def test_names_need_not_be_utf8(module, tmp_path, in_memory):
    root = make_folder(tmp_path / "other", {"train": 4})
    odd = os.fsencode(root / "train/cat") + b"/caf\xe9.jpg"
    os.rename(root / "train/cat/000.jpg", odd)
    os.rename(root / "train/bee", os.fsencode(root / "train") + b"/b\xe9e")
    for path in (root, make_archive(root, tmp_path / "other.tar")):
        data = module(path, in_memory=in_memory, validation_fraction=0.25)
        assert data.class_names == ["ant", r"b\xe9e", "cat"]
        data.setup("fit")
        assert sum(data.found()["images"].values()) == len(split(data, "train")[1]) + 3 == 12
    with open(odd, "wb") as file:
        file.write(b"no image")
    with pytest.warns(UserWarning, match=r"1 image\(s\) that cannot be decoded are skipped: train/cat/caf\\xe9.jpg"):
        module(root, undecodable="skip", validation_fraction=0.0).setup("fit")


def test_what_was_found_is_printed_once_and_kept_with_prepared_images(module, folder, tmp_path, caplog):
    root = shutil.copytree(folder, tmp_path / "other")
    (root / "README.txt").write_text("about")
    line = "1 file(s) are not images of a class and are ignored: README.txt"
    with pytest.warns(UserWarning, match=r"README.txt"):
        module(root).setup("fit")
    data = module(root)  # reads what the first one stored
    caplog.clear()
    with caplog.at_level("INFO", "lightning.pytorch"):
        data.setup("fit")
        data.setup("fit")
    expected = f"Data: train 30, validation 9, test 6 images; 3 classes: ant, bee, cat; left out: {line}"
    # Other libraries' threads may log meanwhile.
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("lightning")]
    assert ours == [expected]
    (root / ".hidden").touch()  # the stored list is not of this folder
    with pytest.warns(UserWarning, match=r"README.txt"):
        assert module(root).found()["left_out"] == ["1 made by the system: .hidden", line]
