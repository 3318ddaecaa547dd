"""Compression: what is pruned stays pruned, and INT8 answers on a grid, the same every time."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stillproof.core.classifiers import Model, predict
from stillproof.core.compression import Int8, Prune, Quantised, calibration_of
from stillproof.core.distillation import CrossEntropy
from stillproof.core.images import ImageSet, as_float
from stillproof.core.runtime import Runtime
from stillproof.core.training import Recipe, fit
from stillproof.core.weights import save_classifier
from stillproof.errors import InputError

FP32 = Runtime(precision="fp32", threads=1)


def made(toy: ImageSet) -> nn.Module:
    model = Model("zoo:cnn?width=8").fresh(toy.shape, 3, 0)
    fit(model, CrossEntropy(), toy, recipe=Recipe.standard(4), runtime=FP32, seed=0)
    return model


def kernels(model: nn.Module) -> Tensor:
    return torch.cat([part.weight.flatten() for part in model.modules() if isinstance(part, nn.Conv2d | nn.Linear)])


def test_the_smallest_weights_are_pruned_and_stay_so(toy: ImageSet) -> None:
    model = made(toy)
    before, names = kernels(model).detach().abs(), sorted(model.state_dict())
    pruning = Prune(share=0.75)
    pruning.begin(model)
    fit(model, CrossEntropy(), toy, recipe=Recipe.standard(3), runtime=FP32, seed=1)
    pruning.end(model)
    after = kernels(model).detach()
    assert sorted(model.state_dict()) == names
    gone = after == 0
    assert float(gone.double().mean()) == pytest.approx(0.75, abs=0.001)
    assert before[gone].max() <= before[~gone].min()
    assert not torch.equal(after[~gone].abs(), before[~gone])  # the rest was tuned


def test_weights_that_are_read_without_calling_their_layer_are_pruned_as_well(toy: ImageSet) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, images: Tensor) -> Tensor:
            rows = images.mean(1)
            found, _ = self.attention(rows, rows, rows, need_weights=False)
            return self.head(found.mean(1))

    model, pruning = Attending(), Prune(share=0.5)
    pruning.begin(model)
    fit(model, CrossEntropy(), toy, recipe=Recipe.standard(2), runtime=FP32, seed=0)
    pruning.end(model)
    weights = torch.cat([model.attention.out_proj.weight.flatten(), model.head.weight.flatten()])
    assert float((weights == 0).double().mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_all_or_nothing_is_not_pruned(share: float) -> None:
    with pytest.raises(InputError, match="cannot be pruned"):
        Prune(share=share)


def test_int8_answers_on_a_grid_and_the_same_every_time(toy: ImageSet) -> None:
    model = made(toy)
    Int8().begin(model)
    expected = predict(model, toy, FP32)
    first, second = (Quantised(model, toy.images[:32]).eval() for _ in range(2))
    found = predict(first, toy, FP32)
    error = (found - expected).abs().max() / (expected.amax() - expected.amin())
    assert 1e-5 < error < 0.1
    assert torch.equal(found, predict(second, toy, FP32))
    assert torch.allclose(found, predict(first, toy, FP32, batch_size=7), atol=1e-5)
    assert torch.allclose(first(as_float(toy.images[:1])), found[:1], atol=1e-5)


def test_gradients_of_int8_are_those_of_the_model_within(toy: ImageSet) -> None:
    model = made(toy)
    deployed = Quantised(model, toy.images[:32]).eval()
    slopes = []
    for one in (model, deployed, deepcopy(deployed)):
        images = as_float(toy.images[:8]).requires_grad_()
        (slope,) = torch.autograd.grad(one(images)[:, 0].sum(), images)
        slopes.append(slope)
    assert slopes[0].abs().max() > 0
    assert torch.equal(slopes[0], slopes[1])
    assert torch.equal(slopes[1], slopes[2])
    images = as_float(toy.images[:8])
    assert torch.allclose(deployed(images.clone().requires_grad_()), deployed(images), atol=1e-5)
    assert not deployed(images).requires_grad
    before = deployed(images)
    assert torch.equal(deployed.to(torch.float64)(images), before)  # what moves the model leaves the graph alone


def test_a_file_of_a_classifier_in_int8_is_one_in_int8_again(toy: ImageSet, tmp_path: Path) -> None:
    model, file = made(toy), tmp_path / "deployed.safetensors"
    deployed = Quantised(model, toy.images[:32]).eval()
    save_classifier(
        file,
        model.state_dict(),
        spec="zoo:cnn?width=8",
        shape=toy.shape,
        classes=toy.classes,
        calibration=deployed.calibration,
    )
    again = Model(str(file)).build(toy.shape, 3)
    assert calibration_of(again) is not None
    assert torch.equal(predict(again, toy, FP32), predict(deployed, toy, FP32))


def test_a_file_in_int8_is_for_images_of_its_size(toy: ImageSet, tmp_path: Path) -> None:
    spec, file = "zoo:preresnet20?width=4", tmp_path / "deployed.safetensors"
    state = Model(spec).fresh(toy.shape, 3, 0).state_dict()
    save_classifier(file, state, spec=spec, shape=toy.shape, classes=toy.classes, calibration=toy.images[:8])
    with pytest.raises(InputError, match="images of"):
        Model(str(file)).build((3, 16, 16), 3)


def test_what_a_file_is_calibrated_on_has_to_be_images(toy: ImageSet, tmp_path: Path) -> None:
    file = tmp_path / "deployed.safetensors"
    save_classifier(
        file,
        made(toy).state_dict(),
        spec="zoo:cnn?width=8",
        shape=toy.shape,
        classes=toy.classes,
        calibration=torch.zeros(3),
    )
    with pytest.raises(InputError, match="no images"):
        Model(str(file)).build(toy.shape, 3)


def test_what_cannot_be_exported_is_refused(toy: ImageSet) -> None:
    class Choosing(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3)) if float(images.mean()) > 0.5 else images.amax((2, 3))

    with pytest.raises(InputError, match="INT8"):
        Quantised(Choosing(), toy.images[:8])
