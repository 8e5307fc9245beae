import bz2
import gzip
import lzma
import os
import shlex
import subprocess
import tarfile
from io import BytesIO

import pytest

from revdeq_lightning.data.loading.files import list_files, names_of_splits, read_text, split_of
from tests.helpers.data import refused

TEXT = "To be, or not to be: caf\u00e9.\n" * 40

# Listing


def test_what_the_system_made_is_no_file_of_the_user(tmp_path):
    system = [".hidden", "._1.jpg", ".DS_Store", "Thumbs.db", "thumbs.DB", "ehthumbs.db", "desktop.ini", "Desktop.ini"]
    folders = ["@eaDir", "__MACOSX", ".ipynb_checkpoints", "#recycle", "$RECYCLE.BIN", "lost+found", "@Recycle"]
    users = ["1.jpg", "a b", "@home", "#1", "$", "@", "~", "db", "recycled", "lost and found"]
    for name in [*system, *users, *(f"{folder}/1.jpg" for folder in [*folders, "x", "System Volume Information"])]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    listing = list_files(tmp_path)
    assert listing.files == sorted([*users, "x/1.jpg"])
    assert listing.folders == ["x"]
    (line,) = listing.left_out
    assert line.startswith("16 made by the system: #recycle, $RECYCLE.BIN, ")


def test_links_are_followed_but_not_in_circles(tmp_path):
    data = tmp_path / "data"
    for path in (data / "a/1", data / "b/2", tmp_path / "elsewhere/3"):
        path.parent.mkdir(parents=True)
        path.touch()
    (data / "a/outside").symlink_to(tmp_path / "elsewhere")
    for link, target in {"a/up": "..", "a/self": "self", "a/b": "../b", "b/a": "../a", "b/beyond": "../.."}.items():
        (data / link).symlink_to(target)
    listing = list_files(data)
    assert listing.files == ["a/1", "a/b/2", "a/outside/3", "b/2", "b/a/1", "b/a/outside/3"]
    assert sorted(line.partition(":")[0] for line in listing.left_out) == [
        "2 neither file nor folder",  # a link to itself
        "6 link to a folder that contains it",
    ]


def test_pipes_and_links_to_nothing_are_left_out_and_told(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "gone.jpg").symlink_to("nothing")
    (tmp_path / "there.jpg").write_text("")
    assert list_files(tmp_path) == (["there.jpg"], [], ["2 neither file nor folder: gone.jpg, pipe.jpg"])


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    def scandir(folder, real=os.scandir):
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", folder)
        return real(folder)

    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match=r"Permission denied: '\S+/closed'"):
        list_files(tmp_path)


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", "train Train TRAIN training Training trn train_set trainset Training-Set train_data train_images"),
        ("validation", "val VAL valid Valid validation Validation dev DEV development eval evaluation val_set"),
        ("test", "test Test TEST testing Testing test_set Test-Images testset tst"),
        (None, "cat trains bullet_train tester developer trainer value evil contest data set images train2017 _"),
    ],
)
def test_usual_names_of_splits_in_any_case(split, names):
    assert [split_of(name) for name in names.split()] == [split] * len(names.split())
    assert [split_of(f" {name} ") for name in names.split()] == [split] * len(names.split())


def test_names_that_differ_only_in_the_split():
    assert names_of_splits(["wiki.train.raw", "wiki.test.raw", "README"]) == ["wiki.test.raw", "wiki.train.raw"]
    assert names_of_splits(["Train", "DEV"]) == ["DEV", "Train"]
    assert names_of_splits(["training_guide.md", "test_plan.md", "dev", "test", "a.train", "b.test"]) == []


# Text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        *((TEXT.encode(encoding), TEXT) for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32")),
        (TEXT.encode("utf-16").decode("latin-1").encode(), TEXT),  # converted as if it were Latin-1
        (b"a\r\nb\rc\0d\x1a" + b"e" * 400, "a\r\nb\rc\0d\x1a" + "e" * 400),  # a NUL here and there is text
        ("e\ufeff".encode(), "e\ufeff"),
        (b"BZhou is a name", "BZhou is a name"),  # bzip2 begins with BZh and a digit
        (bz2.compress(TEXT.encode(), 1), TEXT),
        (b"", ""),
    ],
)
def test_text_is_not_changed_but_for_its_byte_order_mark(tmp_path, content, text):
    (tmp_path / "text").write_bytes(content)
    assert "".join(read_text(tmp_path / "text")) == text


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "latin-1"])
def test_the_advice_on_another_encoding_gives_the_text(tmp_path, encoding):
    file = tmp_path / "a text"
    file.write_bytes(TEXT.encode(encoding))
    with refused("is not UTF-8: ") as error:
        list(read_text(file))
    command = str(error.value).split("`")[1].replace("NEW_FILE", shlex.quote(str(tmp_path / "new")))
    subprocess.run(command, shell=True, check=True)
    assert (tmp_path / "new").read_text(encoding="utf-8") == TEXT


def tar_of(content: bytes) -> bytes:
    buffer, member = BytesIO(), tarfile.TarInfo("a.txt")
    member.size = len(content)
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(member, BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        (lzma.compress(TEXT.encode()), "xz: unpack it with `unxz "),
        (b"PK\x03\x04\x14\x00\xff", "zip: unpack it with `unzip "),
        (tar_of(TEXT.encode() * 1000), "tar: unpack it with `tar -xf "),
        (b"\x28\xb5\x2f\xfd\x04\x00", "cannot be unpacked .*: it may be cut short"),
        (gzip.compress(TEXT.encode(), mtime=0)[:-9], "cannot be unpacked .*: it may be cut short"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "binary data: use text files only"),
        (b"name\0\0\0\0\0\0\0\0" + bytes(90) + b"text", "104 bytes|binary data"),
        (TEXT.encode("utf-16")[:-1], "is not UTF-16: byte"),
        ("end: é".encode()[:-1], "byte 0xc3 at offset 5: it ends in the middle of a character"),
    ],
)
def test_what_is_no_text_is_told_with_what_it_seems_to_be(tmp_path, content, advice):
    (tmp_path / "text").write_bytes(content)
    with refused(advice):
        list(read_text(tmp_path / "text"))
