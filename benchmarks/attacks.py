"""The attacks beside those of foolbox, ART, torchattacks, on the same classifiers, images, threads and budgets.

`python benchmarks/attacks.py [PART ...]`, parts: ball, minimal, patient, black-box, idle, memory; all by default.
Needs the extra `peers`; a peer that does not import is left out, and the record says why. Where STILLPROOF_AUTOATTACK
names a checkout of the original AutoAttack, its APGD runs too.

Every contestant gets the same images and labels and gives images back; what is adversarial is then judged in fp32 on
the original classifier, and distances are measured, by one function for all. Contestants take turns, in an order that
rotates, three times (STILLPROOF_ROUNDS), each with a seed of its own; times are medians, strengths means. All in one
process. With one thread (one core) times are seconds of CPU, which another program does not lengthen; with more
they are seconds of the clock. Whoever has no result after STILLPROOF_PATIENCE seconds (600) is left out.
STILLPROOF_CLASSIFIERS ("undefended,distilled") names some of the three, STILLPROOF_CONTESTANTS ("log odds") a part of
the names of contestants; what they reach is added to what is recorded of the others.

- ball: PGD-40 and APGD-100, Linf 8/255, 500 images, three classifiers; cross-entropy, and ours along the log odds too.
- minimal: FMN and DDN, 100 steps; C&W at 5 x 200. patient: C&W at 9 x 1000. 100 images.
- black-box: Square at 1000 queries, HopSkipJump at as many as foolbox's takes in 8 steps, 100 images.
- idle: a batch that never falls, over the bare forward and input-backward passes.
- memory: what an attack on 10 000 images holds, inputs and results excluded, over that on 1 000.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models import Shared, shared
from shared.clock import clock_of
from shared.memory import Peak, held_bytes
from shared.parts import wanted_parts
from shared.peers import Contestant, art_attack, foolbox_attack, importable, original_apgd, torchattacks_attack
from shared.record import record, recorded
from stillproof.attacks.attack import Attack
from stillproof.attacks.carlini_wagner import CarliniWagner
from stillproof.attacks.frozen import frozen
from stillproof.attacks.gradient import APGD, PGD
from stillproof.attacks.hop_skip_jump import HopSkipJump
from stillproof.attacks.losses import cross_entropy
from stillproof.attacks.minimal import DDN, FMN
from stillproof.attacks.square import Square
from stillproof.attacks.threats import NORMS, Linf, NormName
from stillproof.core.runtime import Runtime

EPSILON, STEP = 8 / 255, 2 / 255
IMAGES, FEW = 500, 100
ROUNDS = int(os.environ.get("STILLPROOF_ROUNDS", "3"))
CLASSIFIERS = os.environ.get("STILLPROOF_CLASSIFIERS", "")
CONTESTANTS = os.environ.get("STILLPROOF_CONTESTANTS", "")
LIMIT = int(os.environ.get("STILLPROOF_PATIENCE", "600"))


@dataclass(frozen=True)
class Contest:
    """One attack, ours in two precisions and the peers', on so many images."""

    name: str
    ours: Attack
    peers: Mapping[str, Contestant]
    images: int
    norm: NormName
    variants: Mapping[str, Attack] = field(default_factory=dict)
    """Ours with other settings than the peers', by what they are called."""
    budget_of: str | None = None
    """The peer whose queries, an image on average, are our budget; it has none to set."""

    def contestants(self, runtime: Runtime) -> dict[str, Contestant]:
        """All of them by name."""

        def in_precision(attack: Attack, precision: str) -> Contestant:
            chosen = replace(runtime, precision=precision)  # type: ignore[arg-type]
            return lambda model, images, labels, seed: attack(model, images, labels, seed=seed, runtime=chosen).images

        mine = {
            f"{who}, {precision}": in_precision(attack, precision)
            for who, attack in {"ours": self.ours, **self.variants}.items()
            for precision in ("fp32", "bf16")
        }
        return mine | dict(self.peers)


def contests(part: str, left_out: dict[str, str]) -> list[Contest]:
    """What is compared in a part."""
    ball = {"eps": EPSILON, "batch_size": IMAGES, "verbose": False}
    if part == "ball":
        pgd = {
            "foolbox": lambda: foolbox_attack("LinfPGD", EPSILON, abs_stepsize=STEP, steps=40),
            "ART": lambda: art_attack(
                "ProjectedGradientDescent", eps_step=STEP, max_iter=40, num_random_init=1, **ball
            ),
            "torchattacks": lambda: torchattacks_attack("PGD", eps=EPSILON, alpha=STEP, steps=40),
        }
        apgd = {
            "torchattacks": lambda: torchattacks_attack("APGD", norm="Linf", eps=EPSILON, steps=100, loss="ce"),
            "AutoAttack": lambda: original_apgd(norm="Linf", eps=EPSILON, n_iter=100, loss="ce"),
        }
        threat = Linf(EPSILON)
        forty, hundred = PGD(threat=threat, steps=40, step=0.25), APGD(threat=threat, steps=100)
        odds = {attack: {"ours, log odds": replace(attack, loss="log-odds")} for attack in (forty, hundred)}
        return [
            Contest("PGD-40", forty, importable(pgd, left_out), IMAGES, "linf", odds[forty]),
            Contest("APGD-100", hundred, importable(apgd, left_out), IMAGES, "linf", odds[hundred]),
        ]
    if part in ("minimal", "patient"):
        searches, steps = (5, 200) if part == "minimal" else (9, 1000)
        carlini = {
            "foolbox": lambda: foolbox_attack("L2CarliniWagnerAttack", binary_search_steps=searches, steps=steps),
            "ART": lambda: art_attack(
                "CarliniL2Method",
                binary_search_steps=searches,
                max_iter=steps,
                initial_const=1e-3,
                batch_size=FEW,
                verbose=False,
            ),
        }
        if part == "patient":
            del carlini["ART"]  # it has no result within the limit at a ninth of these steps
        wagner = CarliniWagner(searches=searches, steps=steps)
        found = [Contest(f"C&W {searches} x {steps}", wagner, importable(carlini, left_out), FEW, "l2")]
        if part == "patient":
            return found
        for name, ours, peer, norm in (
            ("FMN L2", FMN(), "L2FMNAttack", "l2"),
            ("FMN Linf", FMN(norm="linf"), "LInfFMNAttack", "linf"),
            ("DDN", DDN(), "DDNAttack", "l2"),
        ):
            peers = {"foolbox": lambda peer=peer: foolbox_attack(peer, steps=100)}
            found.append(Contest(name, ours, importable(peers, left_out), FEW, norm))  # type: ignore[arg-type]
        return found
    square = {
        "ART": lambda: art_attack(
            "SquareAttack", norm=np.inf, eps=EPSILON, max_iter=1000, batch_size=FEW, verbose=False
        ),
        "torchattacks": lambda: torchattacks_attack("Square", norm="Linf", eps=EPSILON, n_queries=1000),
    }
    hop = {"foolbox": lambda: foolbox_attack("HopSkipJumpAttack", steps=8, max_gradient_eval_steps=300)}
    return [
        Contest("Square", Square(threat=Linf(EPSILON), queries=1000), importable(square, left_out), FEW, "linf"),
        Contest("HopSkipJump L2", HopSkipJump(steps=100), importable(hop, left_out), FEW, "l2", budget_of="foolbox"),
    ]


def judged(model: nn.Module, found: Tensor, images: Tensor, labels: Tensor, contest: Contest) -> dict[str, Any]:
    """Robust accuracy and median distance, of images that were right to begin with; fp32, on the original."""
    with torch.no_grad():
        right = model(images).argmax(1) == labels
        inside = found.detach().clamp(0, 1)
        if isinstance(contest.ours, PGD | APGD | Square):
            inside = images + (inside - images).clamp(-EPSILON - 1e-6, EPSILON + 1e-6)
        fell = model(inside).argmax(1) != labels
    distance = NORMS[contest.norm].distance(inside, images)
    hit = distance[right & fell]
    return {
        "robust_accuracy": float((right & ~fell).double().mean()),
        "success": float(fell[right].double().mean()),
        "median_distance": float(hit.median()) if len(hit) else None,
    }


def mean(values: list[float | None]) -> float | None:
    """Over the seeds; None where one has none."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if len(known) == len(values) else None


class Counting(nn.Module):
    """A classifier that counts the images it is asked about."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.asked = model, 0

    def forward(self, images: Tensor) -> Tensor:
        self.asked += len(images)
        return self.model(images)


def budgeted(contest: Contest, model: nn.Module, images: Tensor, labels: Tensor) -> Contest:
    """The contest with as many queries for us as that peer takes."""
    if contest.budget_of not in contest.peers:
        return contest
    counting = Counting(model).eval()
    contest.peers[contest.budget_of](counting, images.clone(), labels.clone(), 0)
    return replace(contest, ours=replace(contest.ours, queries=counting.asked // len(images)))


class TooLongError(Exception):
    """A contestant had no result when its time was up."""


@contextmanager
def time_limit() -> Iterator[None]:
    """Raise TooLongError in here when it takes too long."""

    def stop(_signal: int, _frame: object) -> None:
        raise TooLongError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)


def compete(contest: Contest, of: Shared, runtime: Runtime, names: list[str], left_out: dict[str, str]) -> None:
    """Let all contestants have a go, in turn, and record."""
    clock = clock_of(runtime)
    images, labels = of.some(contest.images)
    for name in names:
        model = of.classifiers[name].eval()
        try:
            known = budgeted(contest, model, images, labels).contestants(runtime)
        except Exception as error:  # a peer may fail in any way
            left_out[f"{contest.name}, {name}"] = f"{contest.budget_of}: {type(error).__name__}: {error}"
            continue
        entries = {entry: contestant for entry, contestant in known.items() if CONTESTANTS in entry}
        times: dict[str, list[float]] = {entry: [] for entry in entries}
        strength: dict[str, list[dict[str, Any]]] = {entry: [] for entry in entries}
        order = list(entries)
        for seed in range(ROUNDS):
            for entry in order:
                torch.manual_seed(seed)
                np.random.seed(seed)
                began = clock()
                try:
                    with time_limit():
                        found = entries[entry](model, images.clone(), labels.clone(), seed)
                except TooLongError:
                    left_out[f"{contest.name}, {name}, {entry}"] = f"no result after {LIMIT} s"
                    del entries[entry]
                    continue
                times[entry].append(clock() - began)
                strength[entry].append(judged(model, found, images, labels, contest))
                print(f"  {contest.name}, {name}, {entry}: {times[entry][-1]:.1f} s, {strength[entry][-1]}", flush=True)
            order = [entry for entry in order[1:] + order[:1] if entry in entries]
        medians = {entry: statistics.median(times[entry]) for entry in entries}
        table = {
            entry: {
                **{key: mean([found[key] for found in strength[entry]]) for key in strength[entry][0]},
                "by seed": [found["robust_accuracy"] for found in strength[entry]],
                "seconds": round(medians[entry], 2),
                "all": [round(t, 2) for t in times[entry]],
            }
            for entry in entries
        }
        title = f"{contest.name}, {name}"
        before = recorded("attacks").get(title, {}) if CONTESTANTS else {}
        settings = {"images": len(images), "rounds": ROUNDS, "threads": runtime.threads}
        record("attacks", **{title: {**before, **settings, **table}})


def bare_passes(model: nn.Module, images: Tensor, labels: Tensor, runtime: Runtime, steps: int) -> float:
    """Seconds of forward and input-backward passes of the prepared classifier, in the attack's batches, and no more."""
    at_once, clock = runtime.images_at_once, clock_of(runtime)
    with frozen(model, images, runtime) as prepared:
        began = clock()
        for some, known in zip(images.split(at_once), labels.split(at_once), strict=True):
            for _ in range(steps):
                prepared.slope(some, lambda logits, known=known: cross_entropy(logits, known))  # type: ignore[misc]
        return clock() - began


def idle(of: Shared, runtime: Runtime) -> None:
    """An attack that cannot succeed over the passes that it needs."""
    images, labels = of.some(IMAGES)
    model, clock = of.classifiers["undefended"].eval(), clock_of(runtime)
    with torch.no_grad():
        labels = model(images).argmax(1)
    found: dict[str, Any] = {}
    for precision in ("fp32", "bf16"):
        chosen = replace(runtime, precision=precision)  # type: ignore[arg-type]
        ratios = []
        for steps, attack in ((40, PGD(threat=Linf(1e-9), steps=40)), (100, APGD(threat=Linf(1e-9), steps=100))):
            for _ in range(ROUNDS):
                began = clock()
                fell = attack(model, images, labels, runtime=chosen).success.any()
                ours = clock() - began
                assert not fell
                ratios.append(ours / bare_passes(model, images, labels, chosen, steps))
            found[f"{type(attack).__name__}-{steps}, {precision}"] = [round(ratio, 3) for ratio in sorted(ratios)]
            ratios = []
    record("attacks", idle=found)


def held_by(n: int) -> int:
    """What PGD on so many images holds at its peak, inputs and results excluded; in this process, which is fresh."""
    runtime = Runtime.choose()
    runtime.apply()
    of = shared(runtime)
    repeats = -(-n // len(of.test))
    images = (of.test.images.repeat(repeats, 1, 1, 1)[:n].float() / 255).contiguous()
    labels = of.test.known_labels().repeat(repeats)[:n]
    before, peak = held_bytes(), Peak()
    peak.start()
    result = PGD(threat=Linf(EPSILON), steps=3)(of.classifiers["undefended"], images, labels, runtime=runtime)
    peak.done.set()
    peak.join()
    return peak.most - before - result.images.nbytes


def memory() -> None:
    """What an attack holds beside its inputs and results, each size in a process of its own."""
    found = {}
    for n in (1000, 10_000):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            found[n] = process.submit(held_by, n).result()
    record("attacks", memory={"1000": found[1000], "10000": found[10_000], "ratio": found[10_000] / found[1000]})


PARTS = ("ball", "minimal", "patient", "black-box", "idle", "memory")


def main() -> None:
    """Run the parts that were asked for."""
    wanted = wanted_parts(list(PARTS))
    runtime = Runtime.choose()
    runtime.apply()
    of = shared(runtime)
    left_out: dict[str, str] = {}
    for part in wanted:
        if part == "idle":
            idle(of, runtime)
        elif part == "memory":
            memory()
        else:
            for contest in contests(part, left_out):
                compete(contest, of, runtime, CLASSIFIERS.split(",") if CLASSIFIERS else list(of.classifiers), left_out)
    record("attacks", left_out=left_out)


if __name__ == "__main__":
    main()
