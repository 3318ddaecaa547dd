"""Models of other libraries: prepared as they expect, read without running anything, and broken ones explained."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from stillproof.core.adapters import Answered, Prepared, inner
from stillproof.core.classifiers import Model, admit, predict
from stillproof.core.images import ImageSet, as_float
from stillproof.core.runtime import Runtime
from stillproof.errors import InputError

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A vision transformer for 16×16 images and three classes, as save_pretrained leaves it."""
    transformers = pytest.importorskip("transformers")
    shape = {"image_size": 16, "patch_size": 8, "hidden_size": 12, "intermediate_size": 24, "num_labels": 3}
    config = transformers.ViTConfig(num_hidden_layers=1, num_attention_heads=2, **shape)
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    told = {"image_mean": MEAN, "image_std": STD, "image_processor_type": "ViTImageProcessor"}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(told))
    return tmp_path / "vit"


def test_a_hugging_face_model_answers_as_it_does_at_home(saved: Path, toy: ImageSet, runtime: Runtime) -> None:
    import transformers

    model = Model(f"hf:{saved}")
    assert model.is_trained
    classifier, facts = admit(model.build(toy.shape, 3), toy, "it")
    assert (facts.outputs, facts.differentiable) == ("logits", True)
    home = transformers.ViTForImageClassification.from_pretrained(saved).eval()
    images = nn.functional.interpolate(as_float(toy.images), (16, 16), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        expected = home((images - mean) / std).logits
    assert torch.allclose(predict(classifier, toy, runtime), expected, atol=1e-5)


def test_its_identity_follows_its_files(saved: Path) -> None:
    before = Model(f"hf:{saved}").identity()
    told = {"image_mean": MEAN, "image_std": MEAN}
    (saved / "preprocessor_config.json").write_text(json.dumps(told))
    assert Model(f"hf:{saved}").identity() != before


def test_without_a_preprocessor_the_normalisation_is_asked_for_not_guessed(saved: Path) -> None:
    (saved / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"does not say how its images are normalised(.|\n)*\?mean="):
        Model(f"hf:{saved}").build((3, 16, 16), 3)
    built = Model(f"hf:{saved}?mean=.4,.5,.6&std=.2,.25,.3").build((3, 16, 16), 3)
    assert isinstance(built, Prepared)
    assert built.normalise.mean.flatten().tolist() == pytest.approx(MEAN)
    with pytest.raises(InputError, match="are not 3 numbers each"):
        Model(f"hf:{saved}?mean=.4&std=.2,.25,.3").build((3, 16, 16), 3)


def test_fresh_weights_come_from_the_seed(saved: Path) -> None:
    model = Model(f"hf:{saved}")
    weights = [inner(model.fresh((3, 16, 16), 5, seed)).state_dict() for seed in (1, 1, 2)]
    name = "classifier.weight"
    assert weights[0][name].shape == (5, 12)
    assert weights[0][name].equal(weights[1][name])
    assert not weights[0][name].equal(weights[2][name])


@pytest.mark.parametrize("harm", ["pickle", "code", "missing"])
def test_nothing_of_a_repository_is_executed(saved: Path, harm: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    if harm == "pickle":
        (saved / "model.safetensors").unlink()
        torch.save({"a": torch.zeros(1)}, saved / "pytorch_model.bin")
    elif harm == "code":
        config = json.loads((saved / "config.json").read_text())
        config |= {"model_type": "odd", "auto_map": {"AutoConfig": "odd.Odd"}}
        (saved / "config.json").write_text(json.dumps(config))
        (saved / "odd.py").write_text(f"open({str(marker)!r}, 'w')\n")
    else:
        (saved / "config.json").unlink()
    with pytest.raises(InputError, match="cannot be had"):
        Model(f"hf:{saved}").build((3, 16, 16), 3)
    assert not marker.exists()


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_library_that_is_broken_or_missing_is_explained(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / library).mkdir()
    (tmp_path / library / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, library, raising=False)
    with pytest.raises(InputError, match=r"cannot be imported: RuntimeError: operator(.|\n)*belongs to|zoo:resnet18"):
        Model(f"{library}:resnet18").build((3, 16, 16), 3)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=rf"not installed(.|\n)*pip install {library}"):
        Model(f"{library}:resnet18").build((3, 16, 16), 3)


class Named:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


class Object(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(192, 3)

    def forward(self, images: torch.Tensor) -> Named:
        return Named(self.linear(images.flatten(1)))


def test_a_model_that_answers_with_an_object_is_taken_by_its_logits(toy: ImageSet) -> None:
    made = Model(f"{__name__}:Object").build(toy.shape, 3)
    classifier, facts = admit(made, toy, "it")
    assert isinstance(classifier, Answered)
    assert facts.outputs == "logits"
    assert list(inner(classifier).state_dict()) == ["linear.weight", "linear.bias"]


def test_missing_weights_are_not_made_up(saved: Path) -> None:
    import transformers

    whole = transformers.ViTForImageClassification.from_pretrained(saved)
    whole.vit.save_pretrained(saved)
    with pytest.raises(InputError, match=r"lacks \d+ of its weights"):
        Model(f"hf:{saved}").build((3, 16, 16), 3)


def test_a_preprocessor_is_taken_at_its_word(saved: Path) -> None:
    def prepared(**told: object) -> Prepared:
        content = {"image_mean": MEAN, "image_std": STD, **told}
        (saved / "preprocessor_config.json").write_text(json.dumps(content))
        made = Model(f"hf:{saved}").build((3, 16, 16), 3)
        assert isinstance(made, Prepared)
        return made

    images = torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    assert prepared(do_normalize=False).normalise(images).allclose(images, atol=1e-6)
    twice = prepared(rescale_factor=2 / 255).normalise(images)
    assert twice.allclose((2 * images - mean) / std, atol=1e-5)


def test_a_model_in_half_precision_is_computed_in_fp32(saved: Path) -> None:
    import transformers

    half = transformers.ViTForImageClassification.from_pretrained(saved).bfloat16()
    half.save_pretrained(saved)
    assert {p.dtype for p in Model(f"hf:{saved}").build((3, 16, 16), 3).parameters()} == {torch.float32}
