"""Which attack comes next, and why: the rungs of the ladder, from the ground up.

It starts with what most evaluations run, and goes on to what does not need the deployed output's gradient. What ran, on
how many images, what fell, what it cost, and why the next was tried or left out, is the audit trail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from stillproof.attacks.attack import Attack
from stillproof.attacks.frozen import Classifier
from stillproof.attacks.gradient import APGD, FGSM, PGD
from stillproof.attacks.hop_skip_jump import HopSkipJump
from stillproof.attacks.losses import Loss
from stillproof.attacks.minimal import FMN
from stillproof.attacks.random_draws import RandomDraws
from stillproof.attacks.square import Square
from stillproof.attacks.surrogate import Transfer
from stillproof.attacks.threats import L2, Linf
from stillproof.errors import InputError
from stillproof.evasion.indicators import DEAD_SHARE
from stillproof.evasion.ladder import Effort, Ladder, Rung


def rungs(
    classifier: Classifier,
    threat: Linf | L2,
    effort: Effort,
    *,
    samples: int = 1,
    through: nn.Module | None = None,
    twins: Sequence[nn.Module] = (),
    adaptive: object = None,
    starts: Tensor | None = None,
    labels_only: bool = False,
) -> Iterator[Rung]:
    """The ladder from the ground up.

    samples: passes a look, for a randomised classifier; through: a way through its steps that have no gradient; twins:
    undistilled surrogates; adaptive: the user's own attack, loss, or module to climb through; starts: images for
    HopSkipJump to start from; labels_only: whether a black box answers with labels.
    """
    module = classifier if isinstance(classifier, nn.Module) else None
    ball: dict[str, Any] = {"threat": threat}
    white: dict[str, Any] = ball | {"samples": samples}
    norm: Any = "linf" if isinstance(threat, Linf) else "l2"
    if module is not None:
        yield Rung("FGSM", "one step", FGSM(**white), "right", "the cheapest look")
        pgd = PGD(**white, steps=effort.pgd)
        yield Rung(f"PGD-{effort.pgd}, cross-entropy", "deployed", pgd, "right", "what most evaluations stop at")
        apgd = APGD(**white, steps=effort.apgd)
        why = "converged on the deployed output: the robustness that is claimed"
        yield Rung(f"APGD-{effort.apgd}, cross-entropy", "deployed", apgd, "watched survivors", why)
    why = "luck: where it beats a gradient attack, the gradients mislead"
    on: Any = "standing" if module is None else "watched survivors"
    yield Rung("random draws", "gradient-free", RandomDraws(**ball, queries=effort.draws), on, why)
    why = "asks for scores only: where it beats a gradient attack, the gradients mislead"
    probe = Square(**ball, queries=effort.probing)
    name = f"Square, {effort.probing} queries"
    without_scores: Callable[[Ladder], str] = lambda _: "labels alone are no scores" if labels_only else ""  # noqa: E731
    yield Rung(name, "gradient-free", probe, on, why, skip=without_scores)
    if module is not None:
        why = "the scale of the logits cannot hide the gradient from it"
        for loss in ("standardised", "margin"):
            apgd = APGD(**white, steps=effort.apgd, loss=loss)
            yield Rung(f"APGD-{effort.apgd}, {loss}", "white box", apgd, "standing", why, skip=_without_gradient)
        targeted = APGD(**white, steps=effort.targeted, loss="dlr", targets=effort.targets)
        why = f"goes to each of up to {effort.targets} likely classes in turn"
        name = f"APGD-T-{effort.targeted}, DLR"
        yield Rung(name, "white box", targeted, "standing", why, skip=_without_gradient)
        nearest = FMN(norm=norm, steps=effort.nearest, samples=samples)
        why = "follows the boundary instead of filling the ball"
        yield Rung(f"FMN-{effort.nearest}", "white box", nearest, "standing", why, skip=_without_gradient)
        anew = APGD(**white, steps=effort.apgd, restarts=2)
        why = "what others took and cross-entropy did not may be luck: they were several searches, and it was one"
        name = f"APGD-{effort.apgd}, cross-entropy, two more starts"
        yield Rung(name, "deployed again", anew, "hidden", why, skip=_starts_are_no_help)
        anew = replace(anew, loss="margin")
        why = "whether a gradient that the scale of the logits cannot hide finds what fell otherwise"
        name = f"APGD-{effort.apgd}, margin, what fell otherwise"
        yield Rung(name, "white box", anew, "hidden from all", why)
        # where this is the only way, it has to be tried as hard as the front door
        climbing = {
            f"APGD-{effort.apgd}, margin": replace(apgd, loss="margin"),
            f"APGD-{effort.apgd}, cross-entropy": replace(apgd, loss="cross-entropy"),
            f"APGD-T-{effort.targeted}, DLR": targeted,
            f"FMN-{effort.nearest}": nearest,
        }
        why = "takes the logits before any softmax, and passes gradients through rounding, comparisons and the like"
        no_way = "no step without a derivative was found that can be passed through, and hides a gradient"
        for name, attack in climbing.items() if through is not None else ((f"APGD-{effort.apgd}", apgd),):
            yield Rung(
                f"{name}, straight through",
                "straight through",
                attack,
                "standing",
                why,
                through=through,
                skip=lambda _: no_way if through is None else "",
            )
    if adaptive is not None and module is not None:
        yield _adaptive(adaptive, white, effort)
    if twins:
        transfer = Transfer(**ball, surrogates=tuple(twins))
        yield Rung(
            "transfer from twins", "transfer", transfer, "standing", "what fools an undistilled twin, shown once"
        )
    calm = "nothing beat the gradients in the white box so far, and every image has one"

    def patience(ladder: Ladder) -> str:
        return "" if module is None or ladder.is_suspicious() else calm

    if module is not None:
        why = "gradients mislead here: what stands of the images it was not given above"
        again = f"Square, {effort.probing} queries, again"
        yield Rung(again, "gradient-free", probe, "standing, unwatched", why, skip=patience)
    square = Square(**ball, queries=effort.square)
    why = "gradients mislead here, so queries decide" if module is not None else "asks for scores only"
    name = f"Square, {effort.square} queries"
    skip: Callable[[Ladder], str] = without_scores if labels_only else patience
    yield Rung(name, "gradient-free", square, "standing", why, skip=skip, few=True)
    hop = HopSkipJump(norm=norm, queries=effort.hop, starts=starts)
    why = "needs labels only: neither scores nor gradients can hide from it"
    name = f"HopSkipJump, {effort.hop} queries"
    yield Rung(name, "gradient-free", hop, "standing", why, skip=patience, few=True)


def _without_gradient(ladder: Ladder) -> str:
    standing = int(ladder.standing.sum())
    return "no image that stands has a gradient" if int((ladder.dead & ladder.standing).sum()) == standing else ""


def _starts_are_no_help(ladder: Ladder) -> str:
    """Where it begins matters little to cross-entropy where it has no gradient."""
    dead, right = int(((ladder.first.ce == 0) & ladder.right).sum()), int(ladder.right.sum())
    return "too many images have no gradient, wherever it starts" if dead > DEAD_SHARE * right else ""


def _adaptive(given: object, white: dict[str, Any], effort: Effort) -> Rung:
    why = "yours, written for this defence"
    if isinstance(given, Attack):
        return Rung("adaptive attack", "adaptive", given, "standing", why)
    apgd = APGD(**white, steps=effort.apgd, loss="margin")
    if isinstance(given, nn.Module):
        return Rung("adaptive, through your module", "detour", apgd, "standing", why, through=given)
    if callable(given):
        loss: Loss = given
        return Rung("adaptive loss", "adaptive", APGD(**white, steps=effort.apgd, loss=loss), "standing", why)
    raise InputError(
        f"the adaptive attack is a {type(given).__name__}.",
        "Its factory must return an attack, a loss (logits, labels, target) -> (n,), or a torch.nn.Module.",
    )
