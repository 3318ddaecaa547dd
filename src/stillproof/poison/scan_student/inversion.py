"""M1: is there one change of images that makes the student say a class, while its teacher says what it said?

For a class t, over trusted images x that the teacher T does not take for t, a change A is sought that minimises

    CE(S(A(x)), t) + β · KL(T(x) ‖ T(A(x))) + λ · ‖M‖₁

in one of two families: a mask M with a pattern P, A(x) = (1 − M) ⊙ x + M ⊙ P (Neural Cleanse, Wang et al. 2019, and the
teacher's term), or one bounded change for all images, A(x) = clip(x + δ), ‖δ‖∞ ≤ ε, which has no λ. It is sought on one
half of the images and judged on the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Literal, Protocol, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillproof.attacks.frozen import Frozen, frozen
from stillproof.core.images import batches, check_images
from stillproof.core.noise import derive, permutation
from stillproof.core.runtime import Runtime
from stillproof.errors import InputError
from stillproof.poison.triggers import Shape, Stamp

Family = Literal["mask", "bounded"]

FEWEST = 20
"""Images, halves together, that a change is sought and judged on."""

NORMAL = 1.4826
"""Standard deviations of what is normally distributed in one of its median absolute deviations (MAD)."""

ALIKE = 0.01
"""Share of the median that the MAD is at least, or sizes that are all but equal would have outliers."""

MOMENTA = (0.5, 0.9)
"""Adam's, as in Neural Cleanse's code: with the usual ones a mask of few steps is larger."""

GREY = 0.3
"""Standard deviation of the noise, before the tanh, that a grey pattern starts with."""


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """How a change is sought.

    batch_size: small, for many steps on few images; beta: β; epsilon: ε, of the bounded family alone. Of the mask
    family alone: success, the share of the optimised images that the student must take for the class; weight: λ · H · W
    at first, so that images of every size start alike (it is Neural Cleanse's λ of .001 at 32×32). λ rises by `factor`
    after `patience` epochs in a row that succeed, and falls by factor^1.5 after as many that do not.
    """

    family: Family = "mask"
    epochs: int = 40
    batch_size: int = 32
    learning_rate: float = 0.1
    beta: float = 1.0
    epsilon: float = 8 / 255
    success: float = 0.9
    weight: float = 1.0
    factor: float = 2.0
    patience: int = 2

    def __post_init__(self) -> None:
        if self.family not in get_args(Family):
            raise InputError(f"unknown family {self.family!r}.", f"Use {' or '.join(get_args(Family))}.")
        if min(self.epochs, self.batch_size, self.patience) < 1:
            raise InputError(f"{self} cannot run.", "Give epochs, batch size and patience of 1 or more.")
        if not (min(self.learning_rate, self.weight) > 0 and self.beta >= 0 and self.factor > 1):
            raise InputError(
                f"{self} cannot run.", "Give a positive learning rate and weight, beta ≥ 0 and a factor above 1."
            )
        for what, value in (("epsilon", self.epsilon), ("success", self.success)):
            if not 0 < value <= 1:
                raise InputError(f"{what}={value:g} cannot be reached.", f"Give {what} in (0, 1].")


@dataclass(frozen=True, slots=True)
class Inverted:
    """The change that was found for a class, and what it does to the held-out images.

    student_hits, teacher_hits: bool, (m,), on the CPU: which held-out images, in their order, each takes for the target
    under the change; the teacher takes none of them for it as they are. size: ‖M‖₁ in pixels, or the largest |δ|.
    """

    family: Family
    target: int
    stamp: Stamp
    student_hits: Tensor
    teacher_hits: Tensor
    size: float

    @property
    def gap(self) -> float:
        """The student's rate less the teacher's, in [−1, 1]."""
        return float(self.student_hits.double().mean() - self.teacher_hits.double().mean())


def invert(
    student: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    target: int,
    settings: Inversion,
    *,
    runtime: Runtime,
    seed: int,
) -> Inverted:
    """Seek a change that makes the student alone say `target`.

    images: trusted ones, float32 in [0, 1], (n, C, H, W), whose labels do not matter. Half of those that the teacher
    does not take for the target are optimised on, the others judged in fp32; which are which does not depend on the
    seed. The models are left as they were found, but for their memory format. Raises InputError.
    """
    check_images(images, "the trusted images")
    if len(images) < FEWEST:
        raise _too_few(len(images), target)
    with torch.inference_mode(mode=False), torch.enable_grad():
        images = (images.clone() if images.is_inference() else images.detach()).to(runtime.device)
        with _prepared(student, images, runtime) as inspected, _prepared(teacher, images, runtime) as trusted:
            clean = _judged(trusted, images, settings.batch_size)
            _check_classes(clean, inspected.judge(images[:1]), target)
            order = permutation(len(images), derive(0, "halves"))
            usable = order[(clean.argmax(dim=1) != target).cpu()[order]]
            if len(usable) < FEWEST:
                raise _too_few(len(usable), target)
            optimised = usable[: len(usable) // 2].to(images.device)
            held_out = usable[len(usable) // 2 :].sort().values.to(images.device)
            change = _started(settings, (images.shape[1], images.shape[2], images.shape[3]), images.device, seed)
            search = _Search(inspected, trusted, images[optimised], clean[optimised].log_softmax(dim=1), target)
            best = max(search.iterates(change, settings, seed), key=lambda iterate: iterate.rank)
            changed = best.stamp(images[held_out])
            hits = [_judged(one, changed, settings.batch_size).argmax(dim=1) == target for one in (inspected, trusted)]
    return Inverted(settings.family, target, best.stamp, hits[0].cpu(), hits[1].cpu(), best.size)


def outliers(sizes: Sequence[float]) -> list[float]:
    """How anomalously small each class's mask is: (median − size) / (1.4826 · MAD), and 0 for those above the median.

    Above 2 it is an outlier; of two classes neither can be. Where more than half of the sizes are alike the MAD is
    taken to be a hundredth of the median. Source: Neural Cleanse, Wang et al. 2019 (IEEE S&P).
    """
    if not len(sizes):
        return []
    below = np.median(sizes) - np.asarray(sizes, dtype=np.float64)
    deviation = max(float(np.median(np.abs(below))), ALIKE * float(np.median(sizes)))
    return [float(one) / (NORMAL * deviation) if one > 0 else 0.0 for one in below]


def _too_few(usable: int, target: int) -> InputError:
    return InputError(
        f"{usable} trusted images that the teacher does not take for class {target} are too few to invert it.",
        f"Give {FEWEST} or more, of several classes.",
    )


def _check_classes(teacher: Tensor, student: Tensor, target: int) -> None:
    """teacher, student: logits of some images, (n, K)."""
    classes = teacher.shape[1]
    if student.shape[1] != classes:
        raise InputError(
            f"the student knows {student.shape[1]} classes, and the teacher {classes}.",
            "Give a teacher and its student.",
        )
    if not 0 <= target < classes:
        raise InputError(f"there is no class {target} among {classes}.", f"Give a target from 0 to {classes - 1}.")


@contextmanager
def _prepared(model: nn.Module, images: Tensor, runtime: Runtime) -> Iterator[Frozen]:
    """As `frozen`, and the model goes back to where it was."""
    home = next((tensor.device for tensor in chain(model.parameters(), model.buffers())), None)
    try:
        with frozen(model, images, runtime) as prepared:
            yield prepared
    finally:
        if home is not None:
            model.to(home)


def _judged(model: Frozen, images: Tensor, batch_size: int) -> Tensor:
    """Logits in fp32, (n, K)."""
    return torch.cat([model.judge(images[rows]) for rows in batches(len(images), batch_size)])


class _Change(Protocol):
    """A change of images, by free parameters without bounds."""

    @property
    def free(self) -> list[Tensor]:
        """What is optimised."""

    def stamp(self) -> Stamp:
        """The change as it is; gradients go through it."""

    def size(self) -> Tensor:
        """A scalar."""

    def opacity(self) -> Tensor:
        """What λ · H · W weighs: a scalar."""


@dataclass(frozen=True, slots=True)
class _Painting:
    """mask: (1, H, W); pattern: (C, H, W); before the tanh that takes them to (0, 1)."""

    mask: Tensor
    pattern: Tensor

    @property
    def free(self) -> list[Tensor]:
        return [self.mask, self.pattern]

    def stamp(self) -> Stamp:
        opacity = _level(self.mask)
        return Stamp((1 - opacity).expand_as(self.pattern), opacity * _level(self.pattern))

    def size(self) -> Tensor:
        return _level(self.mask).sum()

    def opacity(self) -> Tensor:
        return _level(self.mask).mean()


@dataclass(frozen=True, slots=True)
class _Shift:
    """share: δ / ε before the tanh that takes it to (−1, 1), (C, H, W)."""

    share: Tensor
    epsilon: float

    @property
    def free(self) -> list[Tensor]:
        return [self.share]

    def stamp(self) -> Stamp:
        return Stamp(torch.ones_like(self.share), self.epsilon * self.share.tanh())

    def size(self) -> Tensor:
        return self.epsilon * self.share.tanh().abs().max()

    def opacity(self) -> Tensor:
        return self.share.new_zeros(())


def _level(free: Tensor) -> Tensor:
    return (free.tanh() + 1) / 2


def _started(settings: Inversion, shape: Shape, device: torch.device, seed: int) -> _Change:
    """No change at all, or a half-opaque mask of a grey pattern: free to go either way in every pixel."""
    if settings.family == "bounded":
        return _Shift(torch.zeros(shape, device=device, requires_grad=True), settings.epsilon)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(derive(seed, "start")))
    mask = torch.zeros(1, *shape[1:], device=device, requires_grad=True)
    return _Painting(mask, (GREY * noise).to(device).requires_grad_())


class _Weight:
    """λ · H · W: higher while the student is deceived more than it must be, lower while less."""

    def __init__(self, settings: Inversion) -> None:
        self.value, self.settings = settings.weight, settings
        self.successes = self.failures = 0

    def see(self, *, succeeded: bool) -> None:
        """Take in an epoch."""
        self.successes = self.successes + 1 if succeeded else 0
        self.failures = 0 if succeeded else self.failures + 1
        if self.successes == self.settings.patience:
            self.successes, self.value = 0, self.value * self.settings.factor
        elif self.failures == self.settings.patience:
            self.failures, self.value = 0, self.value / self.settings.factor**1.5


@dataclass(frozen=True, slots=True)
class _Iterate:
    """The change after an epoch, on the CPU. The one of the highest rank is kept."""

    stamp: Stamp
    size: float
    rank: tuple[bool, float]


@dataclass(frozen=True, slots=True)
class _Search:
    """What is optimised on. images: (n, C, H, W); clean: the teacher's log-probabilities of them, (n, K)."""

    student: Frozen
    teacher: Frozen
    images: Tensor
    clean: Tensor
    target: int

    def iterates(self, change: _Change, settings: Inversion, seed: int) -> Iterator[_Iterate]:
        """The change after each epoch. The smallest mask that succeeds ranks first, and else the largest gap."""
        optimiser = torch.optim.Adam(change.free, lr=settings.learning_rate, betas=MOMENTA)
        weight, steps = _Weight(settings), -(-len(self.images) // settings.batch_size)
        for epoch in range(settings.epochs):
            order = permutation(len(self.images), derive(seed, "order", epoch)).to(self.images.device)
            for rows in order.tensor_split(steps):
                changed = change.stamp()(self.images[rows])
                pull = self._gradient(changed, self.clean[rows], settings.beta)
                loss = (changed * pull).sum() / len(rows) + weight.value * change.opacity()
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            with torch.no_grad():
                stamp, size = change.stamp(), float(change.size())
            rate = self._rate(self.student, stamp, settings.batch_size)
            succeeded = settings.family == "mask" and rate >= settings.success
            weight.see(succeeded=succeeded)
            merit = -size if succeeded else rate - self._rate(self.teacher, stamp, settings.batch_size)
            yield _Iterate(Stamp(stamp.keep.cpu(), stamp.add.cpu()), size, (succeeded, merit))

    def _gradient(self, changed: Tensor, clean: Tensor, beta: float) -> Tensor:
        """Of CE(S(A(x)), t) + β · KL(T(x) ‖ T(A(x))) with respect to A(x), (n, C, H, W)."""

        def entropy(logits: Tensor) -> Tensor:
            return -logits.log_softmax(dim=1)[:, self.target]

        def divergence(logits: Tensor) -> Tensor:
            return F.kl_div(logits.log_softmax(dim=1), clean, reduction="none", log_target=True).sum(dim=1)

        gradient = self.student.slope(changed, entropy).gradient
        return gradient + beta * self.teacher.slope(changed, divergence).gradient if beta else gradient

    def _rate(self, model: Frozen, stamp: Stamp, batch_size: int) -> float:
        """Of the images that the model's fast copy takes for the target."""
        hits = [
            model.answer(stamp(self.images[rows])).argmax(dim=1) == self.target
            for rows in batches(len(self.images), batch_size)
        ]
        return float(torch.cat(hits).double().mean())
