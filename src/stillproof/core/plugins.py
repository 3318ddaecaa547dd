"""The table of names: what a SPEC can name, built in or installed by another package.

A package adds a thief with an entry point in the group `stillproof.thief`; the other kinds likewise.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import InitVar
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, get_type_hints

from pydantic import TypeAdapter, ValidationError

from stillproof.core.spec import Spec, file_digest
from stillproof.errors import InputError, StillproofError, nearest

Kind = Literal["source", "model", "objective", "attack", "thief", "hardening", "response", "trigger", "compression"]

BUILT_IN: Mapping[Kind, Mapping[str, str]] = {
    "source": {
        "digits": "stillproof.core.sources.digits:Digits",
    },
    "model": {
        "cnn": "stillproof.core.zoo.cnn:cnn",
        "resnet18": "stillproof.core.zoo.resnet:resnet18",
        "resnet50": "stillproof.core.zoo.resnet:resnet50",
        "preresnet20": "stillproof.core.zoo.preresnet:preresnet20",
        "preresnet32": "stillproof.core.zoo.preresnet:preresnet32",
        "shufflenetv2": "stillproof.core.zoo.shufflenet:shufflenetv2",
        "vit": "stillproof.core.zoo.vit:vit",
    },
    "objective": {
        "kd": "stillproof.core.distillation:Distillation",
        "dkd": "stillproof.core.distillation:DKD",
        "logit-std": "stillproof.core.distillation:StandardisedDistillation",
        "fitnets": "stillproof.core.feature_distillation:FitNets",
        "attention": "stillproof.core.feature_distillation:AttentionTransfer",
        "rkd": "stillproof.core.feature_distillation:RKD",
        "crd": "stillproof.core.feature_distillation:CRD",
        "ard": "stillproof.evasion.hardening.ard:ARD",
        "rslad": "stillproof.evasion.hardening.rslad:RSLAD",
    },
    "attack": {
        "fgsm": "stillproof.attacks.gradient:FGSM",
        "pgd": "stillproof.attacks.gradient:PGD",
        "apgd": "stillproof.attacks.gradient:APGD",
        "cw": "stillproof.attacks.carlini_wagner:CarliniWagner",
        "fmn": "stillproof.attacks.minimal:FMN",
        "ddn": "stillproof.attacks.minimal:DDN",
        "square": "stillproof.attacks.square:Square",
        "random-draws": "stillproof.attacks.random_draws:RandomDraws",
        "hop-skip-jump": "stillproof.attacks.hop_skip_jump:HopSkipJump",
    },
    "thief": {
        "kd": "stillproof.theft.thieves.kd:KD",
        "kd-unlabelled": "stillproof.theft.thieves.kd_unlabelled:KDUnlabelled",
        "label-only": "stillproof.theft.thieves.label_only:LabelOnly",
        "top": "stillproof.theft.thieves.top:Top",
        "dkd": "stillproof.theft.thieves.dkd:DKD",
        "logit-std": "stillproof.theft.thieves.logit_std:LogitStd",
        "htc": "stillproof.theft.thieves.htc:HTC",
        "scm": "stillproof.theft.thieves.scm:SCM",
        "skeptical": "stillproof.theft.thieves.skeptical:Skeptical",
        "markov-kd": "stillproof.theft.thieves.markov_kd:MarkovKD",
        "repeat-averaging": "stillproof.theft.thieves.repeat_averaging:RepeatAveraging",
        "jacobian": "stillproof.theft.thieves.jacobian:Jacobian",
        "active": "stillproof.theft.thieves.active:Active",
        "knockoff": "stillproof.theft.thieves.knockoff:Knockoff",
        "recovery": "stillproof.theft.thieves.recovery:Recovery",
    },
    "hardening": {
        "ast": "stillproof.theft.hardening.sparse_teacher:SparseTeacher",
        "nasty": "stillproof.theft.hardening.nasty:NastyTeacher",
        "cmim": "stillproof.theft.hardening.cmim:CMIM",
        "identity": "stillproof.theft.hardening.identity:Identity",
    },
    "response": {
        "top": "stillproof.serving.responses.top:Top",
        "stingy": "stillproof.serving.responses.stingy:Stingy",
        "round": "stillproof.serving.responses.rounding:Round",
        "label-only": "stillproof.serving.responses.label_only:LabelOnly",
        "power": "stillproof.serving.responses.power:Power",
        "reverse-sigmoid": "stillproof.serving.responses.reverse_sigmoid:ReverseSigmoid",
        "mad": "stillproof.serving.responses.mad:MAD",
        "adaptive-misinformation": "stillproof.serving.responses.adaptive_misinformation:AdaptiveMisinformation",
        "modelguard-w": "stillproof.serving.responses.modelguard_w:ModelGuardW",
        "modelguard-s": "stillproof.serving.responses.modelguard_s:ModelGuardS",
    },
    "trigger": {
        "patch": "stillproof.poison.triggers:Patch",
        "blend": "stillproof.poison.triggers:Blend",
        "sinusoid": "stillproof.poison.triggers:Sinusoid",
        "picture": "stillproof.poison.triggers:PictureFile",
        "moving-patch": "stillproof.poison.triggers:MovingPatch",
    },
    "compression": {
        "prune": "stillproof.core.compression:Prune",
        "int8": "stillproof.core.compression:Int8",
    },
}


@cache
def table(kind: Kind) -> Mapping[str, str]:
    """All names of a kind, with where each is found. A built-in name cannot be taken over."""
    installed = {point.name: point.value for point in entry_points(group=f"stillproof.{kind}")}
    return installed | dict(BUILT_IN[kind])


def build(kind: Kind, spec: Spec, name: str | None = None, **given: object) -> Any:
    """What a SPEC names, called with its options and with what is `given`.

    Raises InputError for an unknown name or option, or a value of the wrong type.
    """
    return call_with_options(factory_of(kind, name or spec.name), spec, **given)


def factory_of(kind: Kind, name: str) -> Callable[..., Any]:
    """What a name of this kind stands for. Raises InputError for an unknown one."""
    known = table(kind)
    if name not in known:
        raise InputError(f"there is no {kind} named {name!r}.", nearest(name, known))
    found: Callable[..., Any] = resolve(known[name])
    return found


def call_with_options(factory: Callable[..., Any], spec: Spec, **given: object) -> Any:
    """Call `factory` with the SPEC's options, and with what is `given` and it takes.

    Raises InputError if an option does not fit, or if the factory fails.
    """
    options = read_options(factory, spec, tuple(given))
    parameters = inspect.signature(factory).parameters
    wanted = given if _takes_any(parameters) else {name: value for name, value in given.items() if name in parameters}
    try:
        return factory(**wanted, **options)
    except StillproofError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may do anything
        raise InputError(f"{spec.name} fails: {type(error).__name__}: {error}", "Mend the factory.") from error


def read_options(factory: Callable[..., Any], spec: Spec, given: Collection[str] = ()) -> dict[str, object]:
    """The SPEC's options, each converted to the type that the factory's parameter asks for. Raises InputError."""
    if not callable(factory) or (hasattr(factory, "state_dict") and not inspect.isclass(factory)):
        raise InputError(
            f"{spec.name} is a {type(factory).__name__}, not a factory.", "Name a function that makes and returns it."
        )
    parameters = inspect.signature(factory).parameters
    open_to_user = [name for name in parameters if name not in given]
    try:
        hints = get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    except Exception:  # annotations that only a type checker can follow
        hints = {}
    options: dict[str, object] = {}
    for option, text in spec.options.items():
        if option not in open_to_user and not _takes_any(parameters):
            raise InputError(f"{spec.name!r} has no option {option!r}.", nearest(option, open_to_user))
        try:
            hint = hints.get(option, str)
            options[option] = TypeAdapter(hint.type if isinstance(hint, InitVar) else hint).validate_python(text)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise InputError(f"{option}={text} in the SPEC {spec!s}: {reason}.", "Mend that option.") from None
        if isinstance(options[option], float) and not math.isfinite(options[option]):  # type: ignore[arg-type]
            raise InputError(f"{option}={text} in the SPEC {spec!s} is not finite.", "Give a number.")
    return options


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def resolve(place: str) -> Any:
    """The object at `package.module:attribute`. Raises InputError where it cannot be reached."""
    module_name, _, attribute = place.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:
        raise InputError(
            f"{place!r} cannot be loaded: {type(error).__name__}: {error}.",
            "It must be importable (is its folder on PYTHONPATH?) and must name a factory: package.module:factory.",
        ) from error
    return found


def user_code(spec: Spec) -> Any:
    """The factory that a `module:factory` SPEC names; the working directory is searched as `python -m` does."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    return resolve(spec.name)


def code_identity(spec: Spec) -> str:
    """A digest of the code of a `module:factory` (see `_code_digest`)."""
    return _code_digest(user_code(spec), spec.name.partition(":")[0])


@cache  # it is in the key of every stage that has such a setting
def plugin_identity(factory: Any) -> Mapping[str, str]:
    """The digest of the code of a class or function that another package brings; nothing of our own, whose stages have
    versions."""
    module = str(getattr(factory, "__module__", ""))
    return {} if module.partition(".")[0] in OURS else {"code": _code_digest(factory, module)}


OURS = ("stillproof", "builtins")


def _code_digest(factory: Any, module: str) -> str:
    """Of the file that holds this, and of what that imports from its folder or package, and so on, so that an edited
    file is a different stage."""
    try:
        own = Path(inspect.getfile(factory)).resolve()
    except (TypeError, OSError):
        return "no source file"
    depth = module.count(".") + (own.name == "__init__.py")
    root = own.parents[min(depth, len(own.parents) - 1)]
    # what is installed beside an installed package has versions of its own
    package = root / module.partition(".")[0] if "site-packages" in root.parts else root
    files, waiting = set[Path](), [own]
    while waiting:
        file = waiting.pop()
        if file not in files:
            files.add(file)
            waiting += [one for one in _imported_by(file, root) if package in one.parents]
    digests = [f"{file_digest(file)}\n" for file in sorted(files)]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _imported_by(file: Path, root: Path) -> list[Path]:
    """The files below a folder that a file of Python names in its imports, wherever in it they stand."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    names: list[tuple[Path, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(root, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = file.parents[node.level - 1] if 0 < node.level <= len(file.parents) else root
            base = f"{node.module}." if node.module else ""
            names += [(start, base + alias.name) for alias in node.names]
    found: list[Path] = []
    for start, name in names:
        parts = name.split(".")
        for upto in range(1, len(parts) + 1):
            place = start.joinpath(*parts[:upto])
            found += [one for one in (place.with_suffix(".py"), place / "__init__.py") if one.is_file()]
    return [one for one in found if "site-packages" in root.parts or "site-packages" not in one.parts]
