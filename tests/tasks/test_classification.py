import pytest
import torch
from torch.nn.functional import cross_entropy

from revdeq_lightning.data.images.batches import ImageBatch
from revdeq_lightning.equilibrium.function import is_compiled
from revdeq_lightning.models import ClassifierConfig
from revdeq_lightning.models.build import SolverConfig
from revdeq_lightning.tasks.classification import ClassificationTask
from revdeq_lightning.tasks.optimizers import OptimizerConfig

NUM = 6


def make_task(num_classes=7, **settings):
    torch.manual_seed(0)
    network = ClassifierConfig(num_classes=num_classes, channels=[16])
    task = ClassificationTask(network, SolverConfig(max_steps=2, mismatch="raise"), OptimizerConfig(), **settings)
    torch.nn.init.normal_(task.model.head.weight)
    return task.eval()  # BatchNorm by its running statistics: images do not depend on their neighbours


def make_batch(labels, partners=None, weights=None):
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor(labels)
    return ImageBatch(
        torch.randn(len(labels), 3, 8, 8, generator=generator),
        labels,
        labels if partners is None else torch.tensor(partners),
        torch.ones(len(labels)) if weights is None else torch.tensor(weights),
        torch.zeros(len(labels), 0, dtype=torch.int64),
    )


def loss_of(task, batch):
    task.log = lambda *_, **__: None
    return task.training_step(batch, 0)["loss"]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_of_mixed_images_is_the_cross_entropy_with_soft_targets(smoothing):
    task = make_task(label_smoothing=smoothing)
    batch = make_batch([0, 1, 2, 3, 4, 5], [5, 1, 0, 6, 4, 2], [0.25, 1.0, 0.5, 0.9, 0.3, 0.0])
    weights = batch.weights[:, None]
    soft = torch.eye(7)[batch.labels] * weights + torch.eye(7)[batch.partner_labels] * (1 - weights)
    expected = cross_entropy(task(batch.images).logits_BV, soft, label_smoothing=smoothing)
    torch.testing.assert_close(loss_of(task, batch), expected)


def test_an_image_that_could_not_be_decoded_does_not_count():
    task = make_task()
    whole = make_batch([0, 1, 2, -100])
    part = ImageBatch(*(field[:3] for field in whole))
    torch.testing.assert_close(loss_of(task, whole), loss_of(task, part))
    assert loss_of(task, make_batch([-100, -100])) == 0


def test_evaluation_counts_every_image_once_and_padding_never():
    task = make_task()
    images, labels = make_batch([0, 1, 2, 3, 4, 5])[:2]
    logits = task(images).logits_BV
    logged = {}
    task.log_dict = lambda values, **_: logged.update(values)
    for indices in ([0, 1, 2, 3], [4, 5]):
        padded = [*indices, *[0] * (4 - len(indices))]
        targets = [int(labels[i]) for i in indices] + [-100] * (4 - len(indices))
        batch = make_batch(targets)._replace(images=images[padded])
        task.test_step(batch, 0)
    task.on_test_epoch_end()
    top5 = (logits.topk(5).indices == labels[:, None]).any(1).float().mean()
    expected = {"loss": cross_entropy(logits, labels), "accuracy": (logits.argmax(1) == labels).float().mean()}
    for key, value in (expected | {"top5_accuracy": top5}).items():
        torch.testing.assert_close(logged[f"test/{key}"], value)
    sums = task.evaluation_sums(make_batch([0, 1, 2, 3, 4, 5])._replace(images=images))
    assert sums["count"] == NUM
    torch.testing.assert_close(sums["loss"] / NUM, expected["loss"])
    torch.testing.assert_close(sums["accuracy"] / NUM, expected["accuracy"])


def test_figures_are_of_the_predicted_class_in_float32():
    """Of equal logits, those of a model that has not begun to learn, the first class is predicted."""
    task = make_task(num_classes=10)
    for parameter in task.model.head.parameters():
        torch.nn.init.zeros_(parameter)
    batch = make_batch([0] * NUM)
    with torch.autocast("cpu", torch.bfloat16):
        assert task.test_step(batch, 0).dtype == torch.float32
        assert task.evaluation_sums(batch)["accuracy"] == NUM


def test_a_loss_that_is_not_finite_is_not_left_out_of_the_mean():
    task, logged = make_task(), {}
    task.log_dict = lambda values, **_: logged.update(values)
    task.validation_step(make_batch([0, 1, 2, 3, 4, 5]), 0)
    task.model.head.bias.data.fill_(float("nan"))
    task.validation_step(make_batch([0, 1, 2, 3, 4, 5]), 1)
    task.on_validation_epoch_end()
    assert torch.isnan(logged["val/loss"])


def test_few_classes_have_no_top_five():
    task = make_task(num_classes=5)
    task.validation_step(make_batch([0, 1]), 0)
    assert task.metrics["val"].compute().keys() == {"loss", "accuracy"}


def test_a_model_without_an_equilibrium_is_compiled_too():
    network, solver = ClassifierConfig(3, architecture="resnet", channels=[16]), SolverConfig(solver="none")
    assert is_compiled(ClassificationTask(network, solver, OptimizerConfig(), compile=True).model)
