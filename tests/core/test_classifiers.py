"""Classifiers: the zoo, the door's facts, saving and loading, hostile weights."""

import importlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stillproof.core.adapters import FromProbabilities, normalised
from stillproof.core.classifiers import Model, admit, look, predict, reinitialise
from stillproof.core.images import ImageSet, as_float
from stillproof.core.plugins import BUILT_IN
from stillproof.core.runtime import Runtime
from stillproof.core.sources import DataSource
from stillproof.core.sources.source import Split, opened
from stillproof.core.weights import save_classifier
from stillproof.errors import InputError


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(sorted(BUILT_IN["model"])),
    st.sampled_from([1, 3]),
    st.integers(8, 64),
    st.integers(2, 12),
    st.integers(1, 5),
)
def test_every_zoo_model_maps_images_to_logits(name: str, channels: int, size: int, classes: int, width: int) -> None:
    width *= {"vit": 3, "shufflenetv2": 2}.get(name, 1)  # a multiple of its heads, of its halves
    model = Model(f"zoo:{name}?width={width}").build((channels, size, size), classes)
    facts = look(model, torch.rand(3, channels, size, size))
    assert (facts.classes, facts.finite, facts.outputs) == (classes, True, "logits")
    assert facts.deterministic
    assert facts.differentiable


@pytest.mark.parametrize(
    ("spec", "shape", "said"),
    [
        ("zoo:cnn", (3, 7, 7), "8×8 to 64×64"),
        ("zoo:cnn", (2, 8, 8), "1 or 3 channels"),
        ("zoo:cnn", (3, 8, 16), "square"),
        ("zoo:cnn?width=0", (3, 8, 8), "width=0"),
        ("zoo:resnet81", (3, 8, 8), "Did you mean 'resnet18'"),
        ("zoo:cnn?widht=3", (3, 8, 8), "Did you mean 'width'"),
        ("zoo:cnn?width=100000", (3, 8, 8), "Use 1 to 1024"),
        ("zoo:vit?heads=5", (3, 8, 8), "multiple of the heads"),
        ("zoo:shufflenetv2?width=115", (3, 8, 8), "even width"),
        ("timn:resnet18", (3, 8, 8), "cannot be loaded"),
        ("zoo:cnn?weights=nowhere.pt", (3, 8, 8), "no file nowhere.pt"),
    ],
)
def test_a_model_that_cannot_be_built_says_why(spec: str, shape: tuple[int, int, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Model(spec).build(shape, 3)


class Scaled(nn.Module):
    """A linear classifier, and what its outputs go through."""

    def __init__(self, through: object = None) -> None:
        super().__init__()
        self.linear = nn.Linear(192, 3)
        self.through = through

    def forward(self, images: Tensor) -> Tensor:
        logits = self.linear(images.flatten(1))
        return self.through(logits) if callable(self.through) else logits


@pytest.mark.parametrize(
    ("through", "fact", "value"),
    [
        (None, "outputs", "logits"),
        (lambda z: z.softmax(1), "outputs", "probabilities"),
        (lambda z: z.log_softmax(1), "outputs", "log-probabilities"),
        (lambda z: z + torch.rand_like(z), "deterministic", False),
        (lambda z: z.round(), "differentiable", True),  # autograd has a gradient: it is 0, and that is finite
        (lambda z: z.detach(), "differentiable", False),
        (lambda z: z * torch.nan, "finite", False),
    ],
)
def test_the_door_reports_facts(through: object, fact: str, value: object) -> None:
    assert getattr(look(Scaled(through), torch.rand(8, 3, 8, 8)), fact) == value


def test_the_door_refuses_what_cannot_be_looked_at() -> None:
    with pytest.raises(InputError, match="look normalised"):
        look(Scaled(), torch.randn(4, 3, 8, 8))
    with pytest.raises(InputError, match=r"returns \(4, 3, 8\)"):
        look(Scaled(lambda z: z[..., None].expand(-1, -1, 8)), torch.rand(4, 3, 8, 8))
    with pytest.raises(InputError, match="fails on images of shape"):
        look(Scaled(), torch.rand(4, 3, 9, 9))


def test_admission_refuses_nan_and_a_wrong_number_of_classes(toy: ImageSet) -> None:
    with pytest.raises(InputError, match="the victim returns NaN"):
        admit(Scaled(lambda z: z * torch.nan), toy, "the victim")
    five = ImageSet(toy.images, toy.labels, ("a", "b", "c", "d", "e"), "five")
    with pytest.raises(InputError, match="returns 3 classes, and 'five' has 5"):
        admit(Scaled(), five, "the victim")


def test_probabilities_become_logits_with_the_same_softmax(toy: ImageSet, runtime: Runtime) -> None:
    model = Scaled(lambda z: z.softmax(1))
    admitted, facts = admit(model, toy, "it")
    assert facts.outputs == "probabilities"
    assert isinstance(admitted, FromProbabilities)
    with torch.no_grad():
        assert torch.allclose(predict(admitted, toy, runtime).softmax(1), model(as_float(toy.images)), atol=1e-6)


def test_normalised_undoes_what_the_model_expects() -> None:
    images = torch.rand(5, 3, 8, 8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    model = Scaled()
    by_hand = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    assert torch.allclose(normalised(model, mean, std)(images), model(by_hand), atol=1e-6)
    with pytest.raises(InputError):
        normalised(model, (0.5,), (0.0,))
    with pytest.raises(InputError, match="takes 3 channels, and the images have 1"):  # it would be broadcast
        normalised(model, (0.5,) * 3, (0.25,) * 3)(images[:, :1])
    assert torch.equal(normalised(model, (0.5,), (0.25,))(images), normalised(model, (0.5,) * 3, (0.25,) * 3)(images))


def test_saved_weights_say_which_model_they_are(tmp_path: Path, toy: ImageSet, runtime: Runtime) -> None:
    model = reinitialise(Model("zoo:cnn?width=3").build(toy.shape, 3), 5)
    file = tmp_path / "it.safetensors"
    save_classifier(file, model.state_dict(), spec="zoo:cnn?width=3", shape=toy.shape, classes=toy.classes)
    for text in (str(file), f"zoo:cnn?width=3&weights={file}"):
        assert Model(text).is_trained
        assert torch.equal(predict(Model(text).build(toy.shape, 3), toy, runtime), predict(model, toy, runtime))
    assert Model(str(file)).identity()["model"] == "zoo:cnn?width=3"
    with pytest.raises(InputError, match="do not fit the model"):
        Model(f"zoo:cnn?width=4&weights={file}").build(toy.shape, 3)
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(InputError, match="not a readable safetensors"):
        Model(str(file)).build(toy.shape, 3)


class Loud:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("executed"),))


def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Loud()}, "evil.pt")
    with pytest.raises(InputError, match="nothing in it was executed"):
        Model("zoo:cnn?weights=evil.pt").build((3, 8, 8), 3)
    assert not Path("executed").exists()
    for content in (b"", b"garbage", b"PK\x03\x04broken"):
        Path("bad.pt").write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.pt"):
            Model("zoo:cnn?weights=bad.pt").build((3, 8, 8), 3)
    torch.save({0: torch.zeros(1)}, "numbered.pt")
    with pytest.raises(InputError, match="no state dict"):
        Model("zoo:cnn?weights=numbered.pt").build((3, 8, 8), 3)
    torch.save([1, 2], "list.pt")
    with pytest.raises(InputError, match="no state dict"):
        Model("zoo:cnn?weights=list.pt").build((3, 8, 8), 3)


def test_a_weights_file_cannot_name_code_to_run(tmp_path: Path) -> None:
    file = tmp_path / "evil.safetensors"
    save_classifier(file, {"w": torch.zeros(1)}, spec="os:getcwd", shape=(3, 8, 8), classes=("a",))
    with pytest.raises(InputError, match="not a model of the zoo"):
        Model(str(file)).build((3, 8, 8), 3)


def test_fresh_weights_depend_on_the_seed_alone(toy: ImageSet) -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed + 100)  # must not matter
        return reinitialise(Model("zoo:cnn?width=2").build(toy.shape, 3), seed).state_dict()["1.weight"]

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


def test_a_layer_that_cannot_be_reset_is_named() -> None:
    with pytest.raises(InputError, match=r"the layer 1 \(Raw\)"):
        reinitialise(nn.Sequential(nn.Linear(2, 2), Raw()), 0)


def test_the_key_of_user_code_follows_its_imports_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "kept_nets").mkdir()
    (tmp_path / "kept_nets/__init__.py").write_text("")
    (tmp_path / "kept_nets/core.py").write_text("from . import size\n")
    (tmp_path / "kept_nets/size.py").write_text("WIDTH = 3\n")
    (tmp_path / "kept_mine.py").write_text("from kept_nets.core import size\ndef make(): ...\n")
    (tmp_path / "kept_other.py").write_text("")
    before = Model("kept_mine:make").identity()
    importlib.import_module("kept_other")
    assert Model("kept_mine:make").identity() == before
    (tmp_path / "kept_nets/size.py").write_text("WIDTH = 4\n")
    assert Model("kept_mine:make").identity() != before


def test_weights_that_user_code_loads_are_told_apart_and_those_it_draws_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: DataSource
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "kept_loading.py").write_text(
        "import torch\n"
        "def drawn(): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
        "def loaded():\n    made = drawn(); made.load_state_dict(torch.load('w.pt')); return made\n"
    )
    data = opened(split_of(digits.train), split_of(digits.test), digits.train.classes, "digits")
    assert Model("kept_loading:drawn").state(data) == Model("kept_loading:drawn").state(data)
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        torch.save(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).state_dict(), "w.pt")
        states.append(Model("kept_loading:loaded").state(data))
    assert states[0] == states[1] != states[2]
    assert Model("zoo:cnn").state(data) is None


def split_of(images: ImageSet) -> Split:
    return Split(images.known_labels(), images.shape, lambda rows: iter([images.images[rows]]))


@pytest.mark.parametrize("kind", [torch.int64, torch.bool])
def test_answers_that_are_no_numbers_with_a_point_are_refused(kind: torch.dtype) -> None:
    class Counting(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.ones(len(images), 3).to(kind)

    with pytest.raises(InputError, match="must return logits"):
        look(Counting(), torch.rand(4, 3, 8, 8))
