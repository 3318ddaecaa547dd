"""`stillproof steal`: how much of a victim can thieves distil out of its answers, with and without defences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from stillproof.findings import Result, worst
from stillproof.verbs import Verb
from stillproof.verbs.settings import BY_PROFILE, TRAINING, DataSettings, Profile, Words, merged, settings_as_json

if TYPE_CHECKING:  # torch is imported when a plan is made, not when a command line is read
    from stillproof.core.plan import Plan, Stage
    from stillproof.core.runtime import Runtime
    from stillproof.core.store import Artefact
    from stillproof.theft.account import Account
    from stillproof.theft.cast import Cast
    from stillproof.theft.defences import Defence
    from stillproof.theft.lesson import Candidate
    from stillproof.theft.pipeline import Pipeline
    from stillproof.theft.thieves import Prospect


class StealSettings(DataSettings):
    """Settings of `steal`."""

    by_profile: ClassVar[Mapping[Profile, Mapping[str, Any]]] = merged(
        TRAINING,
        {
            "smoke": {"seeds": 1, "thief_epochs": 10},
            "standard": {"seeds": 3, "thief_epochs": 100},
            "thorough": {"seeds": 5, "thief_epochs": 240},
        },
    )

    victim: str = Field(..., description="Model SPEC of the victim; without weights it is trained first.")
    defence: Words = Field((), description="Defences, by SPEC: ast, top?k=3+round, …")
    thief: Words = Field(("all",), description="Thieves, by SPEC, or all.")
    thief_model: str = Field(
        "zoo:cnn",
        description="Model SPEC of the thief's student. With weights it begins with them, and so does the reference.",
    )
    queries: str = Field("50/class", description="How many images a thief asks about: 500, or 50/class.")
    budgets: Words = Field(
        (), description="Further numbers of queries, for a curve: 10/class,200/class. All is stolen anew for each."
    )
    queries_from: Literal["outside", "inside"] = Field(
        "outside", description="Images the victim was not trained on (outside), or those it was (inside)."
    )
    query_data: str | None = Field(None, description="Data SPEC of other people's images, which knockoff asks about.")
    reveal: str = Field("probabilities", description="What an answer holds: logits, probabilities, top-3, label.")
    labels: bool = Field(True, description="Whether the thief knows the true labels of its queries.")
    seeds: int = Field(3, ge=1, description=f"How many seeds. {BY_PROFILE}")
    epochs: int = Field(12, ge=1, description=f"Epochs of victim and hardened teacher. {BY_PROFILE}")
    thief_epochs: int = Field(100, ge=1, description=f"Epochs of thieves and reference. {BY_PROFILE}")
    transfer: str | None = Field(
        None, description="Show what is served adversarial examples of each copy, within this threat: linf:8/255."
    )
    protect: float = Field(0.5, ge=0, le=1, description="Protection that a defence is held to (SP-T2).")
    response_l1: float | None = Field(
        None, gt=0, lt=2, description="Tune each response alone to this mean L1 change of the answers; others as given."
    )
    utility_budget: float = Field(0.02, ge=0, le=1, description="Accuracy that a defence may cost (SP-T3, SP-T4).")

    def of_budget(self, queries: str) -> StealSettings:
        """The same theft with another number of queries, and nothing beside it."""
        return self.model_copy(update={"queries": queries, "budgets": (), "transfer": None})


def cast(settings: StealSettings, prospect: Prospect | None = None) -> Cast:
    """Who takes part. Without a prospect also who cannot work with these classes or this student. Raises InputError for
    what does not exist or cannot work here."""
    from stillproof.serving.oracle import Reveal
    from stillproof.theft.cast import assembled

    return assembled(
        settings.defence,
        settings.thief,
        labelled=settings.labels,
        scores=Reveal.parse(settings.reveal).kind != "label",
        others=settings.query_data is not None,
        calibrated=settings.response_l1 is not None,
        seeds=tuple(range(settings.seed, settings.seed + settings.seeds)),
        prospect=prospect,
    )


def plan(settings: StealSettings, runtime: Runtime) -> Plan:
    """The graph of stages. Looks at files and names; trains nothing. Raises InputError."""
    from stillproof.core.plan import Plan

    outputs = _stages(settings)
    for queries in settings.budgets:
        further = _stages(settings.of_budget(queries))
        outputs |= {f"{queries}: {name}": found for name, found in further.items()}
    return Plan(outputs, runtime)


def _stages(settings: StealSettings) -> dict[str, Stage]:
    """The stages of one budget of queries. Raises InputError."""
    from stillproof.attacks.threats import parse_threat
    from stillproof.core.carving import data_stage
    from stillproof.core.classifiers import Model
    from stillproof.core.sources import open_source
    from stillproof.core.training import Recipe
    from stillproof.serving.oracle import Reveal
    from stillproof.theft.pipeline import Pipeline
    from stillproof.theft.thieves import Prospect
    from stillproof.theft.transfer import Queries

    if settings.transfer is not None:
        parse_threat(settings.transfer)
    others, thief = settings.query_data, Model(settings.thief_model)
    data = data_stage(settings.data, settings.limit)
    made = Pipeline(
        cast=cast(settings, Prospect(data.classes, open_source(settings.data), thief)),
        data=data,
        others=None if others is None else data_stage(others, settings.limit, fewest_classes=1),
        queries=Queries.parse(settings.queries),
        origin=settings.queries_from,
        labelled=settings.labels,
        reveal=Reveal.parse(settings.reveal),
        victim=Model(settings.victim),
        thief=thief,
        recipe=Recipe.standard(settings.epochs),
        thief_recipe=Recipe(epochs=settings.thief_epochs, batch_size=50, learning_rate=0.1),
        response_l1=settings.response_l1,
        transfer=settings.transfer,
    )
    _check_queries(settings, made)
    return made.stages()


def _check_queries(settings: StealSettings, made: Pipeline) -> None:
    """Raise InputError where there are not as many images as queries, or too few to steal with."""
    from stillproof.errors import InputError

    classes, asked, sizes = made.data.classes, made.asked, made.data.sizes
    outside = settings.queries_from == "outside"
    there = sizes.pool if outside else sizes.training
    if 2 * classes <= asked <= there:
        _check_others(made)
        return
    most = there // classes
    advice = f"Ask for 2/class to {most}/class" if most >= 2 else "These are too few to steal with: use more images"
    raise InputError(
        f"{settings.queries} are {asked} queries, and there are {there} images to draw them from.",
        f"{advice} (a thief holds some out to choose by)"
        + (", or use --queries-from inside." if outside and asked > there else "."),
    )


def _check_others(made: Pipeline) -> None:
    """Raise InputError where a thief asks about other people's images, and there are not enough of them."""
    from stillproof.errors import InputError
    from stillproof.theft.asking import ChoosesQueries
    from stillproof.theft.stages import HELD_OUT

    wanted = made.asked - int(HELD_OUT * made.asked)
    for name, thief in made.cast.thieves.items():
        asks = isinstance(thief, ChoosesQueries) and thief.wants_others
        if asks and made.others is not None and made.others.sizes.training < wanted:
            raise InputError(
                f"the thief {name!r} asks about up to {wanted} of other people's images, and --query-data has "
                f"{made.others.sizes.training} to ask about.",
                "Give a larger --query-data, or fewer --queries.",
            )


def conclude(settings: StealSettings, values: Mapping[str, Artefact]) -> Result:
    """Findings, tables and curves from the artefacts; touches no model."""
    from stillproof.theft.curves import curves, over_budgets
    from stillproof.theft.tables import tables

    who = cast(settings).who_left(values)
    account = _account(settings, who, values)
    drawn = curves(account)
    if settings.budgets:
        everyone = [account]
        for queries in settings.budgets:
            mark = f"{queries}: "
            of_these = {key.removeprefix(mark): value for key, value in values.items() if key.startswith(mark)}
            everyone.append(_account(settings.of_budget(queries), who, of_these))
        drawn.append(over_budgets(everyone))
    findings = account.findings(promised=settings.protect, utility_budget=settings.utility_budget)
    return Result(
        verb="steal",
        status=worst(finding.status for finding in findings),
        summary=account.summary(),
        findings=findings,
        tables=tables(account),
        curves=drawn,
        settings=settings_as_json(settings),
    )


def models(settings: StealSettings, values: Mapping[str, Artefact]) -> dict[str, Artefact]:
    """The classifiers that are left in the run directory: the victim, plain and hardened. A response has none."""
    from stillproof.theft.outcome import divergence_of

    who = cast(settings)
    hardened = {defence.hardening_text: name for name, defence in who.defences.items() if defence.hardening_text}
    found = {
        f"{kept}-seed{seed}": values[f"{seed}/{name}/model"]
        for seed in who.seeds
        for kept, name in {"victim": "victim", **hardened}.items()
    }
    return {name: artefact for name, artefact in found.items() if divergence_of(artefact) is None}


def _account(settings: StealSettings, who: Cast, values: Mapping[str, Artefact]) -> Account:
    """What was measured, by the names that the plan gave it."""
    import numpy as np

    from stillproof.core.classifiers import Model
    from stillproof.core.distillation import Distillation
    from stillproof.theft import reference
    from stillproof.theft.account import Account, Response, Reused, Student
    from stillproof.theft.cast import FIXED_KD, LABEL_ONLY
    from stillproof.theft.outcome import divergence_of

    def diverged(name: str) -> list[str]:
        found = {seed: divergence_of(values[f"{seed}/{name}/model"]) for seed in who.seeds}
        return [f"seed {seed}: {how}" for seed, how in found.items() if how is not None]

    def logits(name: str) -> list[Any]:
        return [values[f"{seed}/{name}"].tensors["logits"].numpy() for seed in who.seeds]

    judges = who.judged(labelled=settings.labels)

    def student(name: str, title: str, knows: str, candidates: Sequence[Candidate], *, judged: bool = True) -> Student:
        found = [values[f"{seed}/{name}"].values for seed in who.seeds]
        return Student(
            title=title,
            knows=knows,
            candidates=tuple(str(candidate) for candidate in candidates),
            temperatures=tuple(c.temperature for c in candidates if isinstance(c, Distillation)),
            chosen=[noted["chosen"] for noted in found],
            scores=np.array([noted["scores"] for noted in found]),
            losses=np.array([noted["losses"] for noted in found]),
            logits=logits(name),
            queries=found[0]["queries"],
            bits=found[0]["bits"],
            judged=judged,
            diverged=[f"seed {seed}: {how}" for seed in who.seeds if (how := divergence_of(values[f"{seed}/{name}"]))],
        )

    def response(name: str, defence: Defence) -> Response | None:
        if defence.response is None:
            return None
        noted = [values[f"{seed}/{name}/calibration"].values for seed in who.seeds] if calibrated(name) else []
        return Response(
            title=defence.response.title,
            keeps_argmax=defence.response.keeps_argmax,
            alone=not defence.trains,
            known=who.knows(name),
            tuned=tuple(
                f"{found['option']} = {found['value']:.3g}"
                + (f" (L1 {found['l1']:.3g}: it comes no nearer)" if found["misses"] else "")
                for found in noted
            ),
        )

    def reused(name: str) -> dict[str, Reused]:
        copies = who.copies(labelled=settings.labels)
        made = {copy: [values[f"{seed}/{name}/{copy}/reused"].tensors for seed in who.seeds] for copy in copies}
        return {
            copy: Reused(title, *([one[part].numpy() for one in made[copy]] for part in ("right", "fell", "lucky")))
            for copy, title in copies.items()
        }

    def calibrated(name: str) -> bool:
        return f"{who.seeds[0]}/{name}/calibration" in values

    first = f"{who.seeds[0]}/"
    return Account(
        labels=values[first + "victim/test"].tensors["labels"].numpy(),
        served={name: logits(f"{name}/test") for name in who.served()},
        responses={
            name: found for name, defence in who.defences.items() if (found := response(name, defence)) is not None
        },
        signals={name: logits(f"{name}/signal") for name in who.served()},
        retrained=logits("retrained/signal") if first + "retrained/signal" in values else None,
        thefts={
            name: {
                key: student(f"{name}/{key}", thief.title, thief.knows, thief.candidates(), judged=key in judges)
                for key, thief in who.thieves.items()
            }
            for name in who.served()
        },
        reference=student("reference", "reference", "no answers", reference.candidates()) if settings.labels else None,
        floor=LABEL_ONLY if LABEL_ONLY in who.thieves else None,
        fixed=FIXED_KD if FIXED_KD in who.thieves else None,
        tuned="kd" if "kd" in who.thieves else None,
        deterministic=values[first + "victim/model"].values.get("deterministic", True),
        pretrained=Model(settings.thief_model).is_pretrained,
        brought=Model(settings.victim).is_trained and settings.queries_from == "outside",
        diverged={name: diverged(name) for name in who.defences},
        reused={name: reused(name) for name in who.served()} if settings.transfer is not None else {},
    )


STEAL = Verb("steal", StealSettings, plan, conclude, models)
