"""Numbers with their uncertainty: accuracy, agreement, calibration, distances, paired tests. NumPy alone.

Shares are fractions everywhere (0.05, not 5). Predictions are int arrays (N,), logits float arrays (N, K).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stillproof.core.measurement import LEVEL, Measurement

Array = npt.NDArray[Any]

_Z = 1.959963984540054
"""The normal quantile of LEVEL, two-sided."""


def unmeasured(why: str, *, n: int = 0, unit: str = "fraction") -> Measurement:
    """A Measurement without a value; `method` says why."""
    return Measurement(value=None, n=n, unit=unit, method=why)


def share(hits: int, n: int) -> Measurement:
    """hits / n with Wilson's score interval (Wilson 1927); n = 0 has no value."""
    if n == 0:
        return unmeasured("no cases")
    z = _Z
    p, zz = hits / n, z * z / n
    centre = (p + zz / 2) / (1 + zz)
    half = z / (1 + zz) * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    return Measurement(
        value=p,
        low=max(0.0, min(p, centre - half)),
        high=min(1.0, max(p, centre + half)),
        n=n,
        method="Wilson",
    )


def accuracy(predictions: Array, labels: Array) -> Measurement:
    """Share of predictions that are right."""
    return share(int((predictions == labels).sum()), len(labels))


def agreement(first: Array, second: Array) -> Measurement:
    """Share of images on which two predictions are the same."""
    return share(int((first == second).sum()), len(first))


def agreement_on_mistakes(student: Array, teacher: Array, labels: Array) -> Measurement:
    """Of the images that the teacher gets wrong, the share on which the student says the same wrong class."""
    wrong = teacher != labels
    return share(int((student[wrong] == teacher[wrong]).sum()), int(wrong.sum()))


def log_softmax(logits: Array, temperature: float = 1.0) -> Array:
    """log softmax(z/T) of every row, float64."""
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    result: Array = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
    return result


def mean(values: Array, unit: str) -> Measurement:
    """Mean over images with a normal interval; for quantities that are not shares."""
    n = len(values)
    if n == 0:
        return unmeasured("no cases", unit=unit)
    centre = float(values.mean())
    half = _Z * float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    low, high = (None, None) if math.isnan(half) else (centre - half, centre + half)
    return Measurement(value=centre, low=low, high=high, n=n, unit=unit, method="normal, over images")


def negative_log_likelihood(logits: Array, labels: Array) -> Measurement:
    """Mean of −log p(label), in nats."""
    return mean(nll_per_image(logits, labels), "nats")


def nll_per_image(logits: Array, labels: Array) -> Array:
    """−log p(label) of every row, (N,), in nats."""
    result: Array = -log_softmax(logits)[np.arange(len(labels)), labels]
    return result


def kl_divergence(reference: Array, other: Array, temperature: float = 1.0) -> Measurement:
    """Mean of KL(softmax(reference/T) ‖ softmax(other/T)), in nats."""
    return mean(kl_per_image(reference, other, temperature), "nats")


def kl_per_image(reference: Array, other: Array, temperature: float = 1.0) -> Array:
    """KL of every row, (N,), in nats."""
    p, q = log_softmax(reference, temperature), log_softmax(other, temperature)
    result: Array = (np.exp(p) * (p - q)).sum(axis=1)
    return result


def l1_per_image(first: Array, second: Array) -> Array:
    """L1 distance of the probabilities of every row, (N,)."""
    result: Array = np.abs(np.exp(log_softmax(first)) - np.exp(log_softmax(second))).sum(axis=1)
    return result


def entropy_per_image(logits: Array, temperature: float = 1.0) -> Array:
    """Entropy of softmax(z/T), (N,), in nats."""
    p = log_softmax(logits, temperature)
    result: Array = -(np.exp(p) * p).sum(axis=1)
    return result


def entropy(logits: Array, temperature: float = 1.0) -> Measurement:
    """Mean entropy of softmax(z/T), in nats."""
    return mean(entropy_per_image(logits, temperature), "nats")


def expected_calibration_error(logits: Array, labels: Array, bins: int = 15) -> Measurement:
    """ECE with bins of equal width (Guo et al. 2017, arXiv 1706.04599), with a bootstrap interval over images."""
    p = np.exp(log_softmax(logits))
    confidence, right = p.max(axis=1), p.argmax(axis=1) == labels
    place = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    gap = right - confidence

    def value(weights: Array) -> float:
        return float(np.abs(np.bincount(place, gap * weights, minlength=bins)).sum() / weights.sum())

    n = len(labels)
    generator = np.random.default_rng(0)
    drawn = [value(np.bincount(generator.integers(0, n, n), minlength=n)) for _ in range(200)]
    low, high = (float(edge) for edge in np.quantile(drawn, [0.025, 0.975]))
    point = value(np.ones(n))
    return Measurement(
        value=point,
        low=min(low, point),
        high=max(high, point),
        n=n,
        method=f"{bins} bins, bootstrap over images",
    )


def mcnemar(first_right: Array, second_right: Array) -> float:
    """Two-sided exact p-value that two classifiers are right equally often on the same images."""
    from scipy.stats import binomtest  # half a second to import

    only_first = int((first_right & ~second_right).sum())
    only_second = int((~first_right & second_right).sum())
    discordant = only_first + only_second
    return 1.0 if discordant == 0 else float(binomtest(only_first, discordant, 0.5).pvalue)


def over_seeds(
    values: Sequence[float], unit: str = "fraction", *, within: tuple[float, float] = (-math.inf, math.inf)
) -> Measurement:
    """Mean over seeds with Student's interval, cut to `within`; one seed has a value and no interval."""
    n = len(values)
    if n == 0 or not all(math.isfinite(value) for value in values):
        return unmeasured("not finite in every seed", n=n, unit=unit)
    centre = float(np.mean(values))
    if n == 1:
        return Measurement(value=centre, n=1, unit=unit, method="one seed")
    half = _student(n) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Measurement(
        value=centre,
        low=max(centre - half, within[0]),
        high=min(centre + half, within[1]),
        n=n,
        unit=unit,
        method=f"Student t, {n} seeds",
    )


def beyond(value: float, usual: Sequence[float], unit: str = "fraction") -> Measurement:
    """How far a value is above the mean of some others, with the interval within which one more of them would be.

    If the interval lies above 0, the value is no member of theirs (Student's prediction interval).
    """
    distance = value - float(np.mean(usual))
    n = len(usual)
    if n < 2:
        return Measurement(value=distance, n=n, unit=unit, method="one to compare with: no interval")
    half = _student(n) * float(np.std(usual, ddof=1)) * math.sqrt(1 + 1 / n)
    method = f"prediction interval of {n} retrainings"
    return Measurement(value=distance, low=distance - half, high=distance + half, n=n, unit=unit, method=method)


def mean_share(right: Array) -> Measurement:
    """Mean over seeds of a share of the same images: right is bool, (seeds, images). Intervals as `difference`."""
    if len(right) == 1:
        return accuracy(right[0], np.ones(right.shape[1], bool))
    found = difference(right, np.zeros(right.shape))
    if found.low is None or found.high is None:
        return found
    return found.model_copy(update={"low": max(found.low, 0.0), "high": min(found.high, 1.0)})


def difference(first: Array, second: Array, unit: str = "fraction") -> Measurement:
    """Mean of first − second, paired: both (seeds, images), per-image numbers.

    The interval covers the training seeds (Student) and the sampling of the images (normal); with one seed
    the images alone, and it says so.
    """
    centre, covariance = _paired_means(first.astype(np.float64) - second)
    return Measurement(
        value=float(centre),
        low=float(centre - _Z * math.sqrt(covariance)),
        high=float(centre + _Z * math.sqrt(covariance)),
        n=len(first),
        unit=unit,
        method=_paired_method(first),
    )


def ratio(numerator: Array, denominator: Array) -> Measurement:
    """Mean numerator / mean denominator, both (seeds, images), with Fieller's interval (Fieller 1954).

    Unmeasured where the denominator's own interval holds 0: the ratio is then unbounded.
    """
    both = np.stack([numerator, denominator])
    (a, b), covariance = _paired_means(both)
    if b * b <= _Z**2 * covariance[1, 1]:
        return unmeasured("the denominator is inside its noise", n=numerator.shape[0])
    g = _Z**2 * covariance[1, 1] / b**2
    value = a / b
    root = covariance[0, 0] - 2 * value * covariance[0, 1] + value**2 * covariance[1, 1]
    root -= g * (covariance[0, 0] - covariance[0, 1] ** 2 / covariance[1, 1]) if covariance[1, 1] > 0 else 0
    centre = (value - g * covariance[0, 1] / covariance[1, 1]) / (1 - g) if covariance[1, 1] > 0 else value
    half = _Z / abs(b) * math.sqrt(max(root, 0.0)) / (1 - g)
    return Measurement(
        value=float(value),
        low=float(centre - half),
        high=float(centre + half),
        n=numerator.shape[0],
        method=f"Fieller; {_paired_method(numerator)}",
    )


def _paired_means(series: Array) -> tuple[Any, Any]:
    """Means over (seeds, images) of one series or several, and the covariance of these means.

    series: (seeds, images) or (series, seeds, images). The seeds' part is widened from the normal to
    Student's quantile, so that the normal one serves for the sum.
    """
    several = series.astype(np.float64)
    several = several if series.ndim == 3 else several[None]
    seeds, images = several.shape[1:]
    covariance = np.atleast_2d(np.cov(several.mean(axis=1))) / images if images > 1 else np.zeros((len(several),) * 2)
    if seeds > 1:
        widened = (_student(seeds) / _Z) ** 2
        covariance = covariance + widened * np.atleast_2d(np.cov(several.mean(axis=2))) / seeds
    means = several.mean(axis=(1, 2))
    return (means, covariance) if series.ndim == 3 else (means[0], covariance[0, 0])


def _paired_method(series: Array) -> str:
    seeds, images = series.shape
    if seeds == 1:
        return f"one seed: normal over {images} images, training randomness not covered"
    return f"Student t over {seeds} seeds, normal over {images} images"


def _student(n: int) -> float:
    from scipy.special import stdtrit  # Student's quantile, without the weight of scipy.stats

    return float(stdtrit(n - 1, (1 + LEVEL) / 2))


def paired_bootstrap(
    statistic: Callable[[Array], float],
    paired: Array,
    *,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """A percentile interval of a statistic of paired per-image numbers, over seeds and images.

    paired: (seeds, images, series): what belongs together is drawn together. Seeds are drawn with
    replacement, and within each drawn seed the images. statistic: (seeds, series) means -> a number; draws
    in which it is not finite are left out, and if they are more than 5 % the interval is infinite.
    """
    generator = np.random.default_rng(seed)
    seeds, images, _ = paired.shape
    values = np.empty(draws)
    for draw in range(draws):
        means = []
        for chosen in np.atleast_1d(generator.integers(0, seeds, size=seeds)):
            weights = np.bincount(generator.integers(0, images, size=images), minlength=images)
            means.append(weights @ paired[chosen] / images)
        values[draw] = statistic(np.stack(means))
    finite = values[np.isfinite(values)]
    if len(finite) < 0.95 * draws:
        return -math.inf, math.inf
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
