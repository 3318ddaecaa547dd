"""What is said of EPD and of the two pairings, as properties."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from stillproof.attacks.gradient import PGD
from stillproof.core.carving import Carving, carve, load_data
from stillproof.core.classifiers import Model
from stillproof.core.distillation import Batch
from stillproof.core.images import ImageSet, as_float, as_uint8
from stillproof.core.measurement import Cost
from stillproof.core.noise import Noise
from stillproof.core.plan import Context
from stillproof.core.plugins import build
from stillproof.core.runtime import Runtime
from stillproof.core.sources.digits import Digits
from stillproof.core.spec import Spec
from stillproof.core.stages import classifier_artefact, classifier_of
from stillproof.core.store import Artefact
from stillproof.errors import InputError
from stillproof.theft.hardening.normalised_pgd import NormalisedPGD, channel_statistics
from stillproof.theft.hardening.sparse_teacher import TWIN, SparseTeacher, epd, normalised_twins, sparse

SIZES = st.tuples(st.integers(1, 5), st.integers(2, 8), st.integers(0, 10_000))


def distributions(n: int, classes: int, seed: int, how_many: int = 2) -> Tensor:
    """Random probabilities, (how_many, n, classes), some nearly one-hot."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = 6 * torch.rand(how_many, n, 1, generator=generator, dtype=torch.float64)
    logits = torch.randn(how_many, n, classes, generator=generator, dtype=torch.float64)
    return (sharpness * logits).softmax(dim=2)


@given(SIZES)
def test_epd_is_its_equation_and_the_field_s_kl_div_in_log_target_mode(sizes: tuple[int, int, int]) -> None:
    p, q = distributions(*sizes)
    by_hand = [
        sum(torch.tensor(a).exp() * (a - b) for a, b in zip(row_p, row_q, strict=True))
        for row_p, row_q in zip(p.tolist(), q.tolist(), strict=True)
    ]
    assert float(epd(p, q)) == pytest.approx(float(sum(by_hand)) / len(p), abs=1e-6)
    # the reference code computes it so: probabilities handed to a loss that takes logarithms
    assert torch.allclose(epd(p, q), F.kl_div(q, p, reduction="batchmean", log_target=True))


@given(SIZES, st.floats(0, 1))
def test_epd_is_linear_in_the_output(sizes: tuple[int, int, int], share: float) -> None:
    p, q, r = distributions(*sizes, how_many=3)
    assert torch.allclose(epd(p, share * q + (1 - share) * r), share * epd(p, q) + (1 - share) * epd(p, r))


@given(SIZES)
def test_epd_is_zero_on_the_diagonal_and_smallest_at_the_one_hot_of_the_largest(sizes: tuple[int, int, int]) -> None:
    p, q = distributions(*sizes)
    one_hot = F.one_hot(p.argmax(1), p.shape[1]).double()
    assert float(epd(p, p)) == pytest.approx(0, abs=1e-12)
    assert float(epd(p, one_hot)) <= float(epd(p, q)) + 1e-12
    assert float(epd(p, one_hot)) <= 1e-12


def test_epd_is_no_divergence() -> None:
    value = epd(torch.tensor([[0.6, 0.4]]), torch.tensor([[1.0, 0.0]]))
    assert float(value) == pytest.approx(-0.13, abs=0.005)


def output_gradient(targets: Tensor, logits: Tensor) -> Tensor:
    probe = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(epd(targets, probe.softmax(1).expand_as(targets)), probe)
    return gradient


def test_with_random_pairs_the_expected_gradient_vanishes_over_class_permutations() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(1, 4, generator=generator, dtype=torch.float64)
    answer = (2 * torch.randn(4, generator=generator, dtype=torch.float64)).softmax(0)
    permuted = torch.stack([answer[list(order)] for order in itertools.permutations(range(4))])
    assert float(output_gradient(permuted, logits).abs().max()) < 1e-12
    assert float(output_gradient(answer[None], logits).abs().max()) > 1e-3


def test_balanced_labels_alone_are_not_enough_for_it_to_vanish() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64)
    # every class is the largest once, yet the runner-up is always the next class and never another, and one
    # class is answered with less certainty: outputs are not exchangeable over the classes
    answers = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.9, 0.1], [0.4, 0.0, 0.6]], dtype=torch.float64)
    assert answers.argmax(1).tolist() == [0, 1, 2]
    assert float(output_gradient(answers, logits).abs().max()) > 1e-3


class Affine(nn.Module):
    """Logits linear in the image, with a batch norm that shows which mode it ran in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm2d(1)
        self.linear = nn.Linear(64, 5)

    def forward(self, images: Tensor) -> Tensor:
        return 4 * self.linear(self.norm(images).flatten(1))


def batch(n: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(3)
    index = torch.arange(100, 100 + n)
    twins = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=generator)
    images = torch.rand(n, 1, 8, 8, generator=generator)
    return Batch(images, index % 5, index, {TWIN: twins}, Noise(1, index, 7))


def expected_loss(method: SparseTeacher, teacher: Affine, given_batch: Batch, twins: Tensor) -> Tensor:
    """The objective as the reference code writes it, step by step."""
    output = teacher(given_batch.images)
    teacher.eval()
    with torch.no_grad():
        answer = teacher(twins.float() / 255)
    teacher.train()
    kept = torch.full_like(answer, float("-inf"))
    for row, columns in enumerate(answer.topk(method.keep, dim=1).indices):
        kept[row, columns] = answer[row, columns]
    T, alpha = method.temperature, method.weight
    soft, target = F.softmax(output / T, dim=1), F.softmax(kept / T, dim=1)
    distance = nn.KLDivLoss(reduction="batchmean", log_target=True)(soft, target)
    return alpha * T * T * distance + (1 - alpha) * F.cross_entropy(output, given_batch.known_labels())


def test_the_objective_is_that_of_the_reference_code_with_aligned_pairs() -> None:
    teacher, given_batch, method = Affine().train(), batch(), SparseTeacher()
    loss = method(teacher, given_batch)
    assert teacher.training
    assert torch.allclose(loss, expected_loss(method, Affine().train(), given_batch, given_batch.columns[TWIN]))


def test_kl_may_stand_where_epd_stands() -> None:
    teacher, given_batch, method = Affine().train(), batch(), SparseTeacher(divergence="kl")
    output = teacher(given_batch.images)
    teacher.eval()
    kept = sparse(teacher(given_batch.columns[TWIN].float() / 255), method.keep).detach()
    p, q = ((z / method.temperature).double().softmax(dim=1) for z in (kept, output))
    kl = (torch.special.xlogy(p, p) - p * q.log()).sum(dim=1).mean()
    honest = F.cross_entropy(output, given_batch.known_labels())
    wanted = method.weight * method.temperature**2 * kl + (1 - method.weight) * honest
    found, other = (one(Affine().train(), given_batch).item() for one in (method, SparseTeacher()))
    assert found == pytest.approx(wanted.item(), rel=1e-5)
    assert found != pytest.approx(other, rel=1e-3)


def test_random_pairs_are_a_permutation_of_the_batch_and_not_the_identity() -> None:
    given_batch, method = batch(), SparseTeacher(pairing="random")
    order = given_batch.noise.uniform(stream="pairing").argsort()
    assert order.sort().values.equal(torch.arange(12))
    assert not order.equal(torch.arange(12))
    twins = given_batch.columns[TWIN][order]
    assert torch.allclose(
        method(Affine().train(), given_batch), expected_loss(method, Affine().train(), given_batch, twins)
    )
    assert not torch.allclose(
        method(Affine().train(), given_batch), SparseTeacher()(Affine().train(), given_batch), atol=1e-4
    )


def test_the_answer_to_the_twin_is_no_path_for_the_gradient() -> None:
    teacher, given_batch = Affine().train(), batch()
    before = {name: value.clone() for name, value in teacher.norm.named_buffers()}
    SparseTeacher(weight=1.0)(teacher, given_batch).backward()
    once = Affine().train()
    once(given_batch.images)  # the statistics must have seen the clean images, and them alone
    for name, value in once.norm.named_buffers():
        assert torch.equal(value, dict(teacher.norm.named_buffers())[name])
        assert not torch.equal(value, before[name])


def test_sparse_keeps_the_largest_and_nothing_else() -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0, -2.0]])
    assert sparse(logits, 2).tolist() == [[-torch.inf, 5.0, 3.0, -torch.inf]]
    assert sparse(logits, 2).softmax(1).count_nonzero() == 2


def test_its_options_reach_it_and_its_title_says_what_was_changed() -> None:
    method = build("hardening", Spec.parse("ast?weight=0.035&temperature=30&keep=7&pairing=random&threat=linf:8/255"))
    assert method == SparseTeacher(weight=0.035, temperature=30, keep=7, pairing="random", threat="linf:8/255")
    assert method.title == "ast (weight=0.035, temperature=30.0, keep=7, pairing=random, threat=linf:8/255)"
    assert SparseTeacher().title == "ast"
    attack = method.attack()
    assert isinstance(attack, PGD)
    assert attack.run_to_end
    for bad in (
        "ast?weight=2",
        "ast?keep=0",
        "ast?pairing=sideways",
        "ast?threat=l7:1",
        "ast?attack_steps=0",
        "ast?divergence=js",
    ):
        with pytest.raises(InputError):
            build("hardening", Spec.parse(bad))


# the reference code's own twins


def test_reference_is_short_for_its_attack_and_its_pairing() -> None:
    method = build("hardening", Spec.parse("ast?reference=true&keep=7"))
    assert method == SparseTeacher(pairing="random", threat="normalised:0.3", attack_steps=40, keep=7)
    assert method.attack() == NormalisedPGD(epsilon=0.3, step=0.01, steps=40)
    assert method.title == "ast (keep=7, pairing=random, threat=normalised:0.3, attack_steps=40)"
    assert build("hardening", Spec.parse("ast?reference=false")) == SparseTeacher()
    aligned = build("hardening", Spec.parse("ast?threat=normalised:0.3&attack_steps=40"))
    assert (aligned.pairing, aligned.attack()) == ("aligned", method.attack())
    for bad in ("reference=true&threat=linf:8/255", "reference=true&attack_steps=5", "reference=perhaps"):
        with pytest.raises(InputError):
            build("hardening", Spec.parse(f"ast?{bad}"))
    for bad in ("normalised:0", "normalised:", "normalised:-1", "normalised:x"):
        with pytest.raises(InputError):
            SparseTeacher(threat=bad)


class Sloping(nn.Module):
    """Logits that are a fixed, smooth function of the pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weights = nn.Parameter(torch.randn(3, channels * 16, generator=generator))

    def forward(self, images: Tensor) -> Tensor:
        return torch.tanh(2 * images.flatten(1)) @ self.weights.T


def colours(n: int = 10, spread: tuple[float, float, float] = (0.3, 0.6, 1.0)) -> ImageSet:
    """Images of three channels of different brightness and contrast."""
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(n, 3, 4, 4, generator=generator) * torch.tensor(spread).view(1, 3, 1, 1)
    return ImageSet(as_uint8(images), torch.arange(n) % 3, ("a", "b", "c"), "colours")


def as_the_reference_attacks(model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, step: float) -> Tensor:
    """The reference's loop, clamp by clamp, on normalised images."""
    origin, current = images.clone(), images.clone()
    for _ in range(40):
        probe = current.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(probe), labels), probe)
        change = torch.clamp(current + step * gradient.sign() - origin, min=-epsilon, max=epsilon)
        current = torch.clamp(origin + change, min=0, max=1)
    return current


def test_the_attack_is_the_reference_s_on_normalised_images() -> None:
    images, model = colours(), Sloping(3).eval()
    mean, std = channel_statistics(images)
    pixels, labels = as_float(images.images), images.known_labels()
    shaped = mean.view(1, 3, 1, 1), std.view(1, 3, 1, 1)

    def normalised_model(normalised: Tensor) -> Tensor:
        return model(shaped[0] + shaped[1] * normalised)  # type: ignore[no-any-return]

    normalised = (pixels - shaped[0]) / shaped[1]
    expected = as_the_reference_attacks(normalised_model, normalised, labels, 0.3, 0.01)  # type: ignore[arg-type]
    found = NormalisedPGD()(model, pixels, labels, mean=mean, std=std, runtime=Runtime(threads=1))
    assert torch.allclose((found - shaped[0]) / shaped[1], expected, atol=1e-4)


def test_channel_statistics_are_those_of_all_pixels() -> None:
    images = colours()
    mean, std = channel_statistics(images)
    pixels = images.images.double().numpy() / 255
    assert mean.numpy() == pytest.approx(pixels.mean(axis=(0, 2, 3)), abs=1e-6)
    assert std.numpy() == pytest.approx(pixels.std(axis=(0, 2, 3)), abs=1e-6)
    flat = ImageSet(torch.full((2, 1, 4, 4), 7, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "b"), "flat")
    assert float(channel_statistics(flat)[1]) > 0


def made_twins(runtime: Runtime) -> tuple[Carving, Tensor, Artefact]:
    context = Context(runtime)
    data = load_data.run(context, source=Digits(), limit=100)
    training = carve(data).training
    model = Model("zoo:cnn?width=4")
    victim = classifier_artefact(model.fresh(training.shape, 10, 0), model, training, cost=Cost())
    made = normalised_twins.run(context, victim, data, attack=NormalisedPGD())
    mean, std = channel_statistics(training)
    pixels = as_float(training.images)
    found = NormalisedPGD()(
        classifier_of(victim, context), pixels, training.known_labels(), mean=mean, std=std, runtime=runtime
    )
    return carve(data), found, made


def test_the_clamp_cuts_all_that_is_below_the_channel_s_mean() -> None:
    parts, exact, made = made_twins(Runtime(threads=1))
    mean, std = channel_statistics(parts.training)
    pixels, twins = as_float(parts.training.images), made.tensors[TWIN]
    assert float((pixels < mean).float().mean()) > 0.4  # of digits, half of an image
    assert float(exact.min()) >= float(mean) - 1e-6
    assert float(exact.max()) <= float(mean + std) + 1e-6
    half_a_level = 0.5 / 255 + 1e-6
    assert float(as_float(twins).min()) >= float(mean) - half_a_level
    assert float((as_float(twins) - exact).abs().max()) <= half_a_level  # what 8 bits lose
    dark = pixels < mean - 0.31 * std  # farther below than the attack reaches: cut to the mean itself
    assert torch.allclose(exact[dark], mean.expand(int(dark.sum())), atol=1e-6)
    assert (made.cost.forwards, made.cost.backwards) == (41 * len(pixels), 40 * len(pixels))


def test_what_lies_above_white_is_white() -> None:
    assert as_uint8(torch.tensor([[[[-0.2, 0.5, 1.3]]]])).flatten().tolist() == [0, 128, 255]
