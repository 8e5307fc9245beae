"""Samples are what the trained model says, asked by itself."""

import json

import pytest
import torch

from revdeq_lightning.callbacks import samples
from revdeq_lightning.callbacks.samples import ImageSamples, TextSamples
from revdeq_lightning.models.generation import generate
from tests.helpers.modules import classifier, fit_whole_set as fit, language, state


def test_the_text_is_that_of_a_plain_generation_from_the_validated_weights(tmp_path):
    callback = TextSamples(["a b", "c"], max_new_tokens=15, temperature=0.0, every_n_validations=2)
    _, run = fit(tmp_path, language, lambda task: [callback], max_steps=6, val_check_interval=1)
    path = tmp_path / "run" / "samples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in rows] == [(s, p) for s in (1, 3, 5) for p in ("a b", "c")]
    task, data = language(tmp_path)
    task.load_state_dict(state(run)["state_dict"])  # the average
    prompt = torch.tensor([data.tokenizer.encode("a b")])
    tokens = generate(task.model, prompt, 15, temperature=0.0, use_cache=False)[0, 3:]
    assert rows[-2]["text"] == data.tokenizer.decode(tokens.tolist())
    readable = (tmp_path / "run" / "samples.txt").read_text()
    assert readable.count("--- after step 6\na b") == 1
    assert f"a b{rows[-2]['text']}\n" in readable
    # A validation by itself is none of the training's.
    run.validate(task, data, verbose=False)
    assert len(path.read_text().splitlines()) == len(rows)


def test_the_sheet_shows_the_first_images_and_what_the_model_says(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(samples, "draw_sheet", lambda entries, *_, **__: drawn.append(entries))
    monkeypatch.setattr(samples, "log_picture", lambda *_: None)
    _, run = fit(tmp_path, classifier, lambda task: [ImageSamples(num_images=5)], val_check_interval=2, max_steps=2)
    (entries,) = drawn
    task, data = classifier(tmp_path)
    task.load_state_dict(state(run)["state_dict"])
    data.setup("validate")
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    probabilities = task.eval()(batch.images).logits_BV.softmax(-1)[:5]
    assert [entry.label for entry in entries] == batch.labels[:5].tolist()
    assert [entry.prediction for entry in entries] == probabilities.argmax(-1).tolist()
    assert [entry.probability for entry in entries] == pytest.approx(probabilities.amax(-1).tolist(), rel=1e-5)
    assert all(torch.equal(entry.image_CHW, image) for entry, image in zip(entries, batch.images, strict=False))
    data.teardown("validate")
