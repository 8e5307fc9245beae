import hashlib
import pickle
import shutil
import tarfile
import time

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from scipy import stats
from sklearn.datasets import load_digits
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2 as transforms

from revdeq_lightning.data.images.batches import ImageTable, split_images, stratified_subset
from revdeq_lightning.data.images.sources import KNOWN_STATISTICS, published_cifar
from tests.helpers.data import IMAGE_CLASSES as CLASSES, assert_same_splits, make_archive, make_folder, refused, split
from tests.helpers.runs import limited_file_sizes

# Sources and splits


def test_digits_are_those_of_scikit_learn_each_in_one_split(module):
    data = module(source="digits", image_size=8)
    sizes = {name: data.num_images(name) for name in data.splits}
    assert sizes == {"train": 1350, "validation": 150, "test": 297}
    assert (data.num_classes, data.num_channels, data.class_names[3]) == (10, 1, "3")
    reference = load_digits()
    expected = sorted(
        (np.rint(image * 255 / 16).astype(int).ravel().tolist(), int(target))
        for image, target in zip(reference.images, reference.target, strict=True)
    )
    ours = [split(data, name) for name in data.splits]
    assert expected == sorted(
        (image.flatten().tolist(), int(label)) for part in ours for image, label in zip(*part, strict=True)
    )
    assert set(torch.bincount(ours[1][1]).tolist()) <= {14, 15, 16}


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_wrapped_folder_has_the_images_and_classes_that_image_folder_finds(module, folder, tmp_path, in_memory):
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "inner").symlink_to(folder)
    data = module(tmp_path / "outer", in_memory=in_memory)
    assert data.splits == ("train", "validation", "test")
    assert (data.class_names, data.num_classes, data.num_channels) == (list(CLASSES), 3, 3)
    resize = transforms.Resize(16, transforms.InterpolationMode.BICUBIC)
    transform = transforms.Compose([resize, transforms.CenterCrop(16), transforms.PILToTensor()])
    for name, where in (("train", "train"), ("validation", "val"), ("test", "test")):
        reference = ImageFolder(folder / where, transform)
        images, labels = split(data, name)
        assert torch.equal(images, torch.stack([image for image, _ in reference]))
        assert labels.tolist() == reference.targets


def test_validation_images_are_split_off_if_there_are_none(module, tmp_path):
    for number, (layout, sizes) in enumerate(
        [
            ({"train": 8, "validation": 2}, {"train": 24, "validation": 6}),
            ({"train": 8, "test": 2}, {"train": 19, "validation": 5, "test": 6}),
            ({"": 10}, {"train": 24, "validation": 6}),
        ]
    ):
        data = module(make_folder(tmp_path / str(number), layout), validation_fraction=0.2)
        assert {name: data.num_images(name) for name in data.splits} == sizes


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("a.tar", "some/wrapper/"), ("a.tar.gz", "./"), ("a.tar.xz", ""), ("a.tar.bz2", "./"), ("a.TGZ", "")],
)
def test_an_archive_equals_the_folder_that_it_holds(module, folder, tmp_path, name, prefix):
    suffix = {".TGZ": ".gz"}.get(name[1:], name[1:])
    archive = make_archive(folder, tmp_path / f"images{suffix}", prefix).rename(tmp_path / name)
    assert_same_splits(module(archive), module())
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name != "cache"]


def test_workers_decode_from_an_uncompressed_archive_and_not_from_a_compressed_one(module, folder, tmp_path):
    archive = make_archive(folder, tmp_path / "images.tar")
    assert_same_splits(module(archive, in_memory=False, num_workers=1), module())
    compressed = make_archive(folder, tmp_path / "images.tar.gz")
    with refused(r"compressed archive cannot be decoded .*set in_memory to true"):
        module(compressed, in_memory=False).setup("fit")


def test_max_images_cut_each_split_and_keep_the_shares_of_the_classes(module):
    data = module(max_train_images=9, max_eval_images=3)
    counts = {name: torch.bincount(split(data, name)[1]).tolist() for name in data.splits}
    assert counts == {"train": [3] * 3, "validation": [1] * 3, "test": [1] * 3}


def test_the_validation_split_depends_on_names_and_split_seed_only(module, tmp_path):
    root = make_folder(tmp_path / "other", {"train": 10})
    validation = split(module(root), "validation")[0]
    assert torch.equal(split(module(root, seed=5), "validation")[0], validation)
    assert not torch.equal(split(module(root, split_seed=5), "validation")[0], validation)
    flat = split(module(root / "train", validation_fraction=0.1), "validation")[0]
    assert len(flat) == len(validation) == 3


# The validation split


def table(sizes, seed=0):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    labels = np.random.default_rng(seed).permutation(labels)
    places = np.arange(len(labels))
    return ImageTable(np.array([f"image {place}".encode() for place in places]), labels, places, pytest.fail)


def test_a_tenth_of_fifty_thousand_are_five_thousand_five_hundred_of_each_class():
    limits = {"max_train_images": None, "max_eval_images": None}
    splits = split_images({"train": table([5000] * 10)}, validation_fraction=0.1, split_seed=0, **limits)
    assert np.bincount(splits["train"].labels).tolist() == [4500] * 10
    assert np.bincount(splits["validation"].labels).tolist() == [500] * 10
    both = np.concatenate([splits["train"].places, splits["validation"].places])
    assert sorted(both) == list(range(50000))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any), st.floats(0, 1), st.integers(0, 3))
def test_a_subset_has_the_size_asked_for_and_keeps_the_shares(sizes, fraction, seed):
    images = table(sizes)
    count = round(fraction * len(images.labels))
    chosen = stratified_subset(images, count, seed)
    assert len(chosen) == len(set(chosen)) == count
    found = np.bincount(images.labels[chosen], minlength=len(sizes))
    exact = np.array(sizes) * count / len(images.labels)
    assert np.abs(found - exact).max() < 1
    assert (chosen == stratified_subset(images, count, seed)).all()


def test_a_subset_depends_on_the_names_not_on_their_order_and_is_drawn_from_everywhere():
    images = table([20, 40])
    shuffled = images.take(np.random.default_rng(0).permutation(60))
    chosen = set(images.places[stratified_subset(images, 9, 0)])
    assert chosen == set(shuffled.places[stratified_subset(shuffled, 9, 0)])
    assert stats.kstest(stratified_subset(table([4000]), 400, 0) / 4000, "uniform").pvalue > 1e-4


# CIFAR


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request, tmp_path, monkeypatch):
    """The published files' layout with few images, and their checksums in place of the published ones."""
    generator = np.random.default_rng(0)
    classes = 10 if request.param == "cifar10" else 100
    published = published_cifar(request.param)
    root = tmp_path / "data" / published.base_folder
    root.mkdir(parents=True)
    files = {}
    for name, _ in [*published.train_list, *published.test_list]:
        labels = "labels" if classes == 10 else "fine_labels"
        files[name] = {
            "data": generator.integers(0, 256, (20, 3072), dtype=np.uint8),
            labels: generator.integers(0, classes, 20).tolist(),
        }
    files[published.meta["filename"]] = {published.meta["key"]: [f"class {i}" for i in range(classes)]}
    md5 = {}
    for name, content in files.items():
        (root / name).write_bytes(pickle.dumps(content))
        md5[name] = hashlib.md5((root / name).read_bytes()).hexdigest()
    for attribute in ("train_list", "test_list"):
        entries = [[name, md5[name]] for name, _ in getattr(published, attribute)]
        monkeypatch.setattr(published, attribute, entries)
    monkeypatch.setattr(published, "meta", published.meta | {"md5": md5[published.meta["filename"]]})
    archive = tmp_path / published.filename
    with tarfile.open(archive, "w:gz") as stream:
        stream.add(root, published.base_folder)
    monkeypatch.setattr(published, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return request.param, published, files, root.parent, archive


@pytest.mark.parametrize("form", ["folder", "inner folder", "archive", "folder of the archive"])
def test_cifar_is_read_from_what_its_authors_publish(cifar, module, form):
    source, published, files, folder, archive = cifar
    inner = folder / published.base_folder
    places = {"folder": folder, "inner folder": inner, "archive": archive, "folder of the archive": archive.parent}
    if form == "folder of the archive":
        shutil.rmtree(folder)
    data = module(places[form], source=source, image_size=32, validation_fraction=0.0, download=False)
    assert data.splits == ("train", "test")
    assert data.class_names == files[published.meta["filename"]][published.meta["key"]]
    for name, entries in (("train", published.train_list), ("test", published.test_list)):
        contents = [files[file] for file, _ in entries]
        images, labels = split(data, name)
        assert images.flatten(1).tolist() == np.concatenate([content["data"] for content in contents]).tolist()
        assert labels.tolist() == [label for c in contents for key in c if "labels" in key for label in c[key]]
    assert data.preprocessing_state()["mean"] == list(KNOWN_STATISTICS[source][0])


def test_cifar_is_downloaded_whole_or_not_at_all(cifar, module, tmp_path, monkeypatch):
    source, published, _, _, archive = cifar
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, max_hops: url)
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", shutil.copy)
    monkeypatch.setattr(published, "url", str(archive))
    fresh = tmp_path / "fresh"
    data = module(fresh, source=source, image_size=32)
    assert data.num_images("test") == 20
    assert [file.name for file in fresh.iterdir()] == [published.filename]
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(archive.read_bytes()[:-50])
    monkeypatch.setattr(published, "url", str(cut))
    with refused(r"cannot download \S+cut.tar.gz \(.* corrupted.\): put cifar-10\S+ \(MD5", ConnectionError):
        module(tmp_path / "again", source=source, image_size=33).setup("fit")
    assert not list((tmp_path / "again").iterdir())


def test_unreachable_or_unwanted_download_says_where_to_put_the_file(cifar, module, tmp_path, monkeypatch):
    source, published, _, _, _ = cifar
    monkeypatch.setattr(published, "url", "http://127.0.0.1:9/cifar.tar.gz")
    advice = r"put cifar-100?-python.tar.gz \(MD5 \w+\) into \S+/none/, .* CONFIG=configs/digits/default.yaml"
    start = time.monotonic()
    with refused(advice, ConnectionError):
        module(tmp_path / "none", source=source).setup("fit")
    assert time.monotonic() - start < 5
    with refused(r"\(download is false\): " + advice, FileNotFoundError):
        module(tmp_path / "none", source=source, download=False).setup("fit")


def test_damaged_cifar_files_are_named(cifar, module):
    source, published, _, folder, archive = cifar
    file = folder / published.base_folder / published.test_list[0][0]
    file.write_bytes(file.read_bytes()[:-1])
    with refused(r"test\S* is damaged or a different file \(its MD5 is not \w+\): remove"):
        module(folder, source=source).setup("fit")
    archive.write_bytes(archive.read_bytes()[:-1])
    shutil.rmtree(folder)
    for path in (archive, archive.parent):
        with refused(r"python.tar.gz is damaged or a different file"):
            module(path, source=source).setup("fit")


def test_a_full_temporary_folder_is_not_taken_for_the_cache(cifar, module):
    source, _, _, _, archive = cifar
    says = r"python.tar.gz cannot be unpacked into \S+ \(File too large\): set TMPDIR to another folder"
    with limited_file_sizes() as limit, refused(says):
        limit(30_000)
        module(archive, source=source).setup("fit")


def test_known_statistics_are_those_of_torchvisions_names():
    assert published_cifar("cifar10").tgz_md5 == "c58f30108f718f92721af3b95e74349a"
    assert published_cifar("cifar100").tgz_md5 == "eb9058c3a382ffc7106e4002c42a8d85"


# Hugging Face


def make_dataset(folder, form, label, image_column="image", label_column="label"):
    files = {name: sorted((folder / where).rglob("*.jpg")) for name, where in (("train", "train"), ("test", "test"))}
    parts = {}
    for name, paths in files.items():
        labels = [CLASSES.index(path.parent.name) for path in paths]
        rows = {image_column: [{"bytes": path.read_bytes(), "path": None} for path in paths]}
        rows[label_column] = [CLASSES[i] if label == "names" else 5 + i if label == "numbers" else i for i in labels]
        kind = {"classes": datasets.ClassLabel(names=list(CLASSES)), "numbers": datasets.Value("int64")}
        features = {image_column: datasets.Image(), label_column: kind.get(label, datasets.Value("string"))}
        parts[name] = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    form.mkdir()
    if form.name == "parquet":
        for name, part in parts.items():
            part.to_parquet(form / f"{name}-00000-of-00001.parquet")
    else:
        datasets.DatasetDict(parts).save_to_disk(form)
    return str(form)


@pytest.mark.parametrize(
    ("form", "label", "in_memory"),
    [("parquet", "classes", True), ("disk", "names", False), ("parquet", "numbers", False), ("disk", "classes", True)],
)
def test_a_local_dataset_has_the_images_of_the_folder(module, folder, tmp_path, form, label, in_memory):
    path = make_dataset(folder, tmp_path / form, label)
    data = module(path, source="huggingface", in_memory=in_memory, validation_fraction=0.0, num_workers=1)
    assert data.class_names == (["5", "6", "7"] if label == "numbers" else list(CLASSES))
    assert data.splits == ("train", "test")
    for name in data.splits:
        for ours, expected in zip(split(data, name), split(module(), name), strict=True):
            assert torch.equal(ours, expected)


def test_columns_are_found_or_told(module, folder, tmp_path):
    path = make_dataset(folder, tmp_path / "parquet", "numbers", "photo", "species")
    data = module(path, source="huggingface", label_column="species")
    assert data.num_images("test") == 6
    with refused(r"has the columns \['photo', 'species'\]: say which one with label_column"):
        module(path, source="huggingface").setup("fit")
    with refused(r'has the columns .* image_column "picture" is not among them'):
        module(path, source="huggingface", image_column="picture").setup("fit")


@pytest.fixture
def saved(module, folder, tmp_path):
    """Builds a data module on a `save_to_disk` copy of these splits, made from the splits of `make_dataset`."""
    parts = datasets.load_from_disk(make_dataset(folder, tmp_path / "disk", "classes"))

    def build(make_splits, **arguments):
        where = tmp_path / f"saved{len(list(tmp_path.iterdir()))}"
        datasets.DatasetDict(make_splits(parts["train"], parts["test"])).save_to_disk(where)
        return module(where, source="huggingface", **arguments)

    return build


def relabeled(part, labels):
    return part.remove_columns("label").add_column("label", labels)


def without_labels(part):
    return part.map(lambda _: {"label": -1})


def test_splits_of_a_dataset_have_any_usual_name_and_the_others_are_left_out_with_a_warning(saved):
    data = saved(lambda train, test: {"Training": train, "dev": test, "testing": test.select([]), "raw": test})
    with pytest.warns(UserWarning, match=r"splits that are not used \(raw, test\): they are empty, have no labels"):
        assert data.found()["images"] == {"train": 30, "validation": 6}
    data = saved(lambda train, test: {"train": train, "validation": test, "dev": test, "test": without_labels(test)})
    with pytest.warns(UserWarning, match=r"not used \(dev, test\)"):
        assert data.splits == ("train", "validation")


NAMES = [*CLASSES, *CLASSES]
NO_CLASSES = "train: labels that are neither integers nor names .*row 0 has"


@pytest.mark.parametrize(
    ("make_splits", "message"),
    [
        (
            lambda train, test: {"train": train, "dev": test, "valid": test},
            r"several splits for .* \(dev, valid\): save",
        ),
        (lambda train, test: {"Test": test, "dev": test}, r"has the splits \['Test', 'dev'\], \"train\" is not among"),
        (lambda train, test: {"train": train.select([]), "test": test}, r"the training split of \S+ has no rows"),
        (lambda train, test: {"train": relabeled(test, [["a", "b"]] * 6)}, NO_CLASSES),
        (lambda train, test: {"train": relabeled(test, [[1, 0]] * 6)}, NO_CLASSES),
        (lambda train, test: {"train": relabeled(test, [0.5] * 6)}, NO_CLASSES),
        (
            lambda train, test: {"train": relabeled(test, NAMES), "dev": relabeled(test, ["dog", *NAMES[1:]])},
            r'validation: the class dog, which train lacks \(column "label"\); every row needs a class of train',
        ),
        (
            lambda train, test: {"train": relabeled(test, NAMES), "dev": relabeled(test, [*NAMES[1:], None])},
            r'validation: rows without a label \(column "label"\); every row needs a class of train',
        ),
    ],
)
def test_datasets_that_do_not_fit_are_told(saved, make_splits, message):
    with refused(message):
        saved(make_splits).setup("fit")


def test_rows_without_an_image_are_told_or_skipped(saved):
    def without_one(train, test):
        images = train.cast_column("image", datasets.Image(decode=False))[:]["image"]
        rows = {"image": [*images[:4], None, *images[5:]], "label": train["label"]}
        return {"train": datasets.Dataset.from_dict(rows, features=train.features)}

    with refused(r"cannot decode the image train/00000004 \(the file is empty\)"):
        saved(without_one, validation_fraction=0.0).setup("fit")
    with pytest.warns(UserWarning, match="1 image"):
        assert saved(without_one, validation_fraction=0.0, undecodable="skip").num_images("train") == 29


def test_a_fraction_that_leaves_nothing_to_train_on_is_told(module, tmp_path):
    root = make_folder(tmp_path / "other", {"train": 1})
    with refused(r"no images are left for train \(validation_fraction 0.9\)"):
        module(root, validation_fraction=0.9).setup("fit")
