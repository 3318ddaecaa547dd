"""Stillproof: a security test bench for knowledge distillation in PyTorch.

The public names; each is imported when it is first used, so that `import stillproof` stays cheap.
"""

from __future__ import annotations

import importlib
from typing import Any

_PLACES = {
    "APGD": "attacks.gradient",
    "Artefact": "core.store",
    "AttackResult": "attacks.record",
    "Batch": "core.distillation",
    "CMIM": "theft.hardening.cmim",
    "CarliniWagner": "attacks.carlini_wagner",
    "CrossEntropy": "core.distillation",
    "DDN": "attacks.minimal",
    "DataSource": "core.sources",
    "Distillation": "core.distillation",
    "FGSM": "attacks.gradient",
    "FMN": "attacks.minimal",
    "Finding": "findings",
    "HopSkipJump": "attacks.hop_skip_jump",
    "ImageSet": "core.images",
    "InputError": "errors",
    "L2": "attacks.threats",
    "Linf": "attacks.threats",
    "Measurement": "core.measurement",
    "Model": "core.classifiers",
    "NastyTeacher": "theft.hardening.nasty",
    "Oracle": "serving.oracle",
    "PGD": "attacks.gradient",
    "RandomDraws": "attacks.random_draws",
    "Recipe": "core.training",
    "Response": "serving.responses",
    "Result": "findings",
    "Reveal": "serving.oracle",
    "RunOptions": "runs.options",
    "Runtime": "core.runtime",
    "Source": "core.sources",
    "SparseTeacher": "theft.hardening.sparse_teacher",
    "Square": "attacks.square",
    "StillproofError": "errors",
    "StraightThrough": "attacks.straight_through",
    "Transfer": "attacks.surrogate",
    "calibrated": "serving.calibration",
    "epd": "theft.hardening.sparse_teacher",
    "fit": "core.training",
    "guard": "serving.guard",
    "kd_divergence": "core.distillation",
    "normalised": "core.adapters",
    "open_source": "core.sources",
    "predict": "core.classifiers",
    "render_report": "runs.report",
    "run": "verbs",
}

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("stillproof")
    if name not in _PLACES:
        raise AttributeError(f"module 'stillproof' has no attribute {name!r}")
    attribute = "render" if name == "render_report" else name
    return getattr(importlib.import_module(f"stillproof.{_PLACES[name]}"), attribute)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
