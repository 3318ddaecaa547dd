"""A defence SPEC: a hardening, a response, or a hardened classifier behind a response: `ast+round?decimals=2`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stillproof.core.plan import Stage
from stillproof.core.plugins import build, table
from stillproof.core.spec import Spec
from stillproof.core.training import Recipe
from stillproof.errors import InputError, nearest
from stillproof.serving.responses import Response
from stillproof.serving.responses.joined import parts_of, response_of
from stillproof.theft.hardening import Hardening
from stillproof.theft.hardening.identity import Identity


@dataclass(frozen=True, slots=True)
class Defence:
    """What stands between a victim and its thieves."""

    text: str
    hardening: Hardening | None
    hardening_text: str
    """The SPEC of the hardening alone; empty where there is none."""
    response: Response | None

    @classmethod
    def parse(cls, text: str) -> Defence:
        """At most one hardening, first; then responses, in the order in which they are applied. Raises InputError."""
        specs = Spec.parse_joined(text)
        known = {*table("hardening"), *table("response")}
        for number, spec in enumerate(specs):
            if spec.name not in known:
                raise InputError(f"there is no defence named {spec.name!r}.", nearest(spec.name, known))
            if number and spec.name not in table("response"):
                raise InputError(
                    f"{spec.name!r} trains a classifier, and stands second in the defence {text!r}.",
                    f"A hardening comes first, and alone: {spec.name}+round?decimals=2.",
                )
        trains = specs[0].name in table("hardening")
        hardening: Hardening | None = build("hardening", specs[0]) if trains else None
        responses = specs[1:] if trains else specs
        return cls(text, hardening, str(specs[0]) if trains else "", response_of(responses) if responses else None)

    @property
    def trains(self) -> bool:
        """Whether the classifier that is served is another than the victim."""
        return self.hardening is not None and not isinstance(self.hardening, Identity)


@dataclass(frozen=True, slots=True)
class Served:
    """The stages behind what a thief asks: the classifier, and the response before it with its helpers."""

    classifier: Stage
    response: Response | None = None
    helpers: tuple[Stage, ...] = ()
    calibration: Stage | None = None

    @property
    def asked(self) -> Mapping[str, object]:
        """What the jobs that ask it are given besides the classifier. Nothing where there is no response: what is
        served as it is keeps its keys."""
        if self.response is None:
            return {}
        more = {"helpers": self.helpers} if self.helpers else {}
        tuned = {"calibration": self.calibration} if self.calibration is not None else {}
        return {"response": self.response, **more, **tuned}


def served_by(defence: Defence, victim: Stage, data: Stage, *, recipe: Recipe, images: int, seed: int) -> Served:
    """The stages that make a defence. recipe, images, seed: as Hardening.stage has them."""
    common = {"recipe": recipe, "images": images, "seed": seed}
    classifier = victim
    if defence.hardening is not None:
        classifier = defence.hardening.stage(victim, data, **common)  # type: ignore[arg-type]
    if defence.response is None:
        return Served(classifier)
    made = (part.prepare(classifier, data, **common) for part in parts_of(defence.response))  # type: ignore[arg-type]
    return Served(classifier, defence.response, tuple(helper for helper in made if helper is not None))
