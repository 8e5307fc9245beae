import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import torch

from revdeq_lightning.data.images.augmentation import AugmentationConfig
from revdeq_lightning.data.images.module import ImageDataModule
from tests.helpers.data import SaveAt, assert_same_splits, encoded, fit, make_folder, recorded, refused, split, whole

EVERYTHING = AugmentationConfig(
    crop_padding=2, flip=True, randaugment_ops=2, erasing_probability=0.5, mixup_alpha=0.4, cutmix_alpha=1.0
)


# Cache


def test_images_are_decoded_once_and_read_as_a_memory_map(module, monkeypatch):
    first = module()
    first.setup("fit")
    monkeypatch.setattr(ImageDataModule, "_decode_all", lambda *_: pytest.fail("decoded twice"))
    again = module(batch_size=2, seed=3, augmentation=EVERYTHING)
    assert_same_splits(again, first)
    assert isinstance(again._dataset("train").images.array, np.memmap)
    assert again.preprocessing_state() == first.preprocessing_state()


def count_stored(cache):
    return len(list(cache.glob("*.arrays")))


def test_other_settings_are_other_stored_images(module, tmp_path):
    sizes = [{"image_size": 17}, {"crop_fraction": 0.5}, {"channels": 1}, {"undecodable": "skip"}]
    splits = [{"max_train_images": 20}, {"max_eval_images": 2}, {"validation_fraction": 0.2}, {"split_seed": 1}]
    for number, change in enumerate([{}, *sizes, *splits], 1):
        module(**change).setup("fit")
        assert count_stored(tmp_path / "cache") == number, change


def test_other_content_is_decoded_anew(module, tmp_path):
    root = make_folder(tmp_path / "other", {"train": 4}, suffix="bmp")
    file = root / "train/ant/000.bmp"
    content = file.read_bytes()
    changes = [
        lambda: None,
        lambda: file.write_bytes(content[:-200] + bytes([content[-200] ^ 255]) + content[-199:]),  # of the same length
        lambda: file.rename(root / "train/ant/z.bmp"),
        lambda: (root / "train/bee/added.bmp").write_bytes(content),
        lambda: (root / "train/ant").rename(root / "train/wasp"),
    ]
    seen = []
    for change in changes:
        change()
        data = module(root, validation_fraction=0.0)
        data.setup("fit")
        images, labels = split(data, "train")
        seen.append((data.class_names, labels.tolist(), images.tolist()))
        assert count_stored(tmp_path / "cache") == len(seen)
    assert all(a != b for a, b in itertools.pairwise(seen))


def test_statistics_are_those_of_the_training_images(module):
    data = module()
    images = split(data, "train")[0].double() / 255
    state = data.preprocessing_state()
    assert state["mean"] == pytest.approx(images.mean((0, 2, 3)).tolist())
    assert state["std"] == pytest.approx(images.std((0, 2, 3), correction=0).tolist())
    given = module(mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.2]).preprocessing_state()
    assert (given["mean"], given["std"]) == ([0.5, 0.4, 0.3], [0.2, 0.2, 0.2])
    assert module(in_memory=False).preprocessing_state()["mean"] == [0.485, 0.456, 0.406]  # of ImageNet
    assert module(in_memory=False, channels=1).preprocessing_state()["mean"] == pytest.approx([0.449])


# Batches


@pytest.mark.parametrize("in_memory", [True, False])
def test_evaluation_uses_every_image_once_without_randomness(module, in_memory):
    data = module(in_memory=in_memory, augmentation=EVERYTHING, batch_size=4)
    batches = list(data.val_dataloader())
    assert [len(batch.labels) for batch in batches] == [4, 4, 1]
    assert [batch.images.dtype for batch in batches] == [torch.uint8] * 3
    ready = [data.on_after_batch_transfer(batch, 0) for batch in batches]
    state = data.preprocessing_state()
    mean, std = (torch.tensor(state[name]).view(3, 1, 1) for name in ("mean", "std"))
    expected = (split(data, "validation")[0] / 255 - mean) / std
    torch.testing.assert_close(torch.cat([batch.images for batch in ready]), expected)
    for batch in ready:
        assert torch.equal(batch.labels, batch.partner_labels)
        assert batch.weights.tolist() == [1.0] * len(batch.labels)
        assert batch.images.dtype == torch.float32


@pytest.mark.parametrize("in_memory", [True, False])
def test_training_batches_are_the_shuffled_images_until_they_are_augmented(module, in_memory):
    data = module(in_memory=in_memory, augmentation=EVERYTHING, batch_size=5)
    loader = data.train_dataloader()
    images, labels = split(data, "train")
    first, second = whole(loader), whole(loader)
    for epoch, batch in enumerate((first, second)):
        items = batch.keys[:, 0] - epoch * 30
        assert sorted(items.tolist()) == list(range(30))
        assert torch.equal(batch.images, images[items])
        assert torch.equal(batch.labels, labels[items])
    assert first.keys[:, 0].tolist() != (second.keys[:, 0] - 30).tolist()
    other = whole(module(in_memory=in_memory, seed=1, batch_size=5).train_dataloader())
    assert other.keys.tolist() != first.keys.tolist()


def test_augmentation_is_a_function_of_seed_epoch_and_image(module):
    config = dataclasses.replace(
        EVERYTHING, mixup_alpha=0.0, cutmix_alpha=0.0
    )  # the partner is a neighbor in the batch

    def augmented(**options):
        data = module(augmentation=config, **options)
        loader = data.train_dataloader()
        batches = [data.on_after_batch_transfer(batch, 0) for _ in range(2) for batch in loader]
        data.teardown("fit")
        return {int(k): image for batch in batches for k, image in zip(batch.keys[:, 0], batch.images, strict=True)}

    before = torch.get_rng_state()
    reference = augmented(batch_size=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    for options in ({"batch_size": 3}, {"batch_size": 30}, {"batch_size": 5, "num_workers": 2}):
        again = augmented(**options)
        assert again.keys() == reference.keys()
        assert all(torch.equal(again[key], reference[key]) for key in reference), options
    assert any(not torch.equal(reference[key], reference[key + 30]) for key in range(30))
    other = augmented(batch_size=5, seed=1)
    assert any(not torch.equal(other[key], reference[key]) for key in reference)


def test_random_parts_are_cut_out_of_the_original(module, tmp_path):
    # A fifth of the area, anywhere: the mean over many cuts out of a ramp is that of the ramp, each spans about
    # sqrt(1/5) of it.
    config = AugmentationConfig(random_resized_crop=(0.2, 0.2), flip=True)
    ramp = np.broadcast_to(np.linspace(0, 255, 200).astype(np.uint8)[None, :, None], (200, 200, 3))
    for name in "ab":
        (tmp_path / "ramp" / name).mkdir(parents=True)
        for index in range(200):
            (tmp_path / "ramp" / name / f"{index}.png").write_bytes(encoded(ramp, "png"))
    data = module(tmp_path / "ramp", in_memory=False, augmentation=config, batch_size=40, validation_fraction=0.0)
    images = whole(data.train_dataloader()).images.double()
    assert images.mean() == pytest.approx(127.5, abs=8)  # 400 cuts: a standard error of 2
    spans = (images[:, 0, :, -1] - images[:, 0, :, 0]).mean(1) / 255
    assert spans.mean() == pytest.approx(0.2**0.5 * 15 / 16, abs=0.02)
    assert spans.max() < (0.2 * 4 / 3) ** 0.5
    assert spans.min() > (0.2 * 3 / 4) ** 0.5 * 0.9
    # Cut once: the device mirrors only.
    batch = next(iter(data.train_dataloader()))
    plain, mirrored = (
        data.on_after_batch_transfer(batch._replace(images=i), 0).images for i in (batch.images, batch.images.flip(-1))
    )
    assert torch.equal(plain, mirrored.flip(-1))


# Checkpoints and Lightning


@pytest.mark.parametrize(
    ("in_memory", "num_workers", "augmentation"),
    [(True, 0, EVERYTHING), (False, 2, AugmentationConfig(random_resized_crop=(0.3, 1.0), mixup_alpha=0.2, flip=True))],
    ids=["in memory", "decoded by workers"],
)
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0")
def test_resumed_run_sees_bit_for_bit_the_batches_of_the_uninterrupted_run(
    module, tmp_path, running, in_memory, num_workers, augmentation
):
    def data():
        return module(in_memory=in_memory, augmentation=augmentation, num_workers=num_workers)

    fit(tmp_path, "whole", data=data(), max_epochs=2)
    checkpoint, interrupted = tmp_path / "run.ckpt", data()
    with pytest.raises(InterruptedError):
        fit(tmp_path, "begin", callbacks=[SaveAt("on_train_batch_end", 10, checkpoint)], data=interrupted, max_epochs=2)
    state = torch.load(checkpoint, weights_only=True)["ImageDataModule"]
    assert state["position"] == {"epoch": 1, "batch": 3}
    fit(tmp_path, "rest", ckpt_path=checkpoint, data=data(), max_epochs=2)
    expected = recorded(tmp_path, "whole")
    assert recorded(tmp_path, "begin") + recorded(tmp_path, "rest") == expected
    assert [np.shape(field) for field in expected[-1]] == [(4, 3, 16, 16), (4,), (4,), (4,), (4, 1)]
    assert not running()
    restored = ImageDataModule.load_from_checkpoint(checkpoint)
    assert restored.augmentation == augmentation
    assert dict(restored.hparams) == dict(interrupted.hparams)


def test_resuming_in_another_order_warns_and_with_other_classes_fails(module, tmp_path):
    state = module().state_dict() | {"position": {"epoch": 0, "batch": 1}}
    other = module(seed=7, batch_size=2, max_train_images=20)
    other.load_state_dict(json.loads(json.dumps(state)))
    changes = r"seed 0 -> 7, num_images 30 -> 20, image_checksum .*, global_batch_size 4 -> 2\).* images may occur"
    with pytest.warns(UserWarning, match=changes):
        other.train_dataloader()
    names = [["ant", "bee", f"caf{e}"] for e in ("\u00e9", "e\u0301")]  # the same in two Unicode normalizations
    same = module(make_folder(tmp_path / "same", {"train": 4}, classes=names[0]))
    same.load_state_dict(state | {"class_names": names[1]})
    animals = make_folder(tmp_path / "animals", {"train": 4}, classes=("ant", "bee", "cow"))
    with refused(r'different classes .*\(3 and 3; for example "cat" is in only one'):
        module(animals).load_state_dict(state)


def test_resuming_with_other_images_of_the_same_number_warns(module, folder, tmp_path):
    def resume(root, in_memory, state):
        data = module(root, in_memory=in_memory)
        data.load_state_dict(json.loads(json.dumps(state)))
        data.train_dataloader()

    for number, (in_memory, source, target, changes) in enumerate(
        [
            (True, "train/bee/001.jpg", "train/bee/000.jpg", "image_checksum"),
            (False, "train/bee/001.jpg", "train/bee/100.jpg", "name_checksum"),
            (True, "train/ant/001.jpg", "train/bee/100.jpg", "label_checksum"),
            (False, "train/ant/001.jpg", "train/bee/100.jpg", "label_checksum"),
        ]
    ):
        state = module(in_memory=in_memory).state_dict() | {"position": {"epoch": 0, "batch": 1}}
        root = shutil.copytree(folder, tmp_path / str(number))
        resume(root, in_memory, state)  # a warning is an error here
        content = (root / source).read_bytes()
        if not (root / target).exists():
            (root / source).unlink()
        (root / target).write_bytes(content)
        with pytest.warns(UserWarning, match=rf"training data or its order changed .*{changes} \w{{8}} -> \w{{8}}[,)]"):
            resume(root, in_memory, state)
        state["order"] = {key: value for key, value in state["order"].items() if not key.endswith("_checksum")}
        resume(root, in_memory, state)  # of before there were checksums


def test_a_model_for_other_images_is_refused(module):
    data = module()
    data.check_model(num_classes=3, num_channels=3)
    with refused(r"source 'folder', path '\S+'\) has num_classes 3, the model has 10: use .* or build one for 3"):
        data.check_model(num_classes=10, num_channels=3)
    with refused("has num_channels 3, the model has 1"):
        data.check_model(num_classes=3, num_channels=1)


# Bad input


def test_what_does_not_fit_the_images_is_told(module, tmp_path):
    with refused(r"mean must have a value for each of the 3 channel\(s\): \[0.5\]"):
        module(mean=[0.5], std=[0.5]).setup("fit")
    data = module(make_folder(tmp_path / "other", {"train": 4}), validation_fraction=0.0, batch_size=13)
    with refused("has no validation split: set validation_fraction above 0"):
        data.val_dataloader()
    with refused("has no test split: add one to the data"):
        data.test_dataloader()
    with refused(r"batch_size 13 on 1 rank\(s\) needs 13 items, the data has 12"):
        data.train_dataloader()
