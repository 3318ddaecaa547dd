"""A classifier prepared for attack: a frozen copy to climb on, and the original, in fp32, to judge by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from stillproof.core.runtime import Runtime
from stillproof.errors import InputError

PROBES = 4
"""Images that the original and its copy are compared on before an attack."""

STEEPEST = 1e15
"""What stands for an infinite gradient."""

FOLDING_TOLERANCE = 1e-3
"""How much folding may change the differences between logits, as a share of the largest."""

ROUNDING_TOLERANCE = 0.05
"""How much bf16 may: a model that adds 1000 to its logits has nothing left of them in bf16, and runs in fp32."""

Classifier = Callable[[Tensor], Tensor]
"""Images, float32 in [0, 1], (n, C, H, W) -> logits, (n, K). A module, or anything that answers."""

Loss = Callable[[Tensor], Tensor]
"""Logits, (n, K) -> what is ascended, (n,)."""


@dataclass(frozen=True, slots=True)
class Slope:
    """What a pass forward and back showed of some images; float32.

    logits: (n, K); value: the loss, (n,); gradient: of the loss with respect to the image, (n, C, H, W).
    """

    logits: Tensor
    value: Tensor
    gradient: Tensor


@dataclass(frozen=True, slots=True)
class Frozen:
    """A classifier during an attack.

    exact: the original, in eval mode, which judges in fp32; fast: a copy without gradients of its parameters, its
    batch norms folded into the convolutions, in the runtime's precision; folded: how many were; is_random: whether two
    passes of the original differ; draws: its passes that a judgement averages.
    """

    exact: Classifier
    fast: Classifier
    runtime: Runtime
    full: Classifier | None = None
    """That copy in fp32, where norms were folded in it."""
    folded: int = 0
    is_random: bool = False
    draws: int = 1
    needs_two: bool = False
    """Whether it fails on a single image, and is asked about it twice."""
    fills_up: bool = False
    """Whether batches are filled up to one of a few sizes (`room_for`), with images that nobody looks at."""

    @property
    def is_rounded(self) -> bool:
        """Whether what the search sees of an image can differ from what the original says when it judges."""
        return self.fast is not self.exact or self.runtime.precision != "fp32" or self.is_random

    def strict(self) -> Frozen:
        """The original alone, in fp32."""
        return replace(self, fast=self.exact, runtime=replace(self.runtime, precision="fp32"), folded=0)

    def in_fp32(self) -> Frozen:
        """The same, climbing or asking in fp32 too."""
        return replace(self, fast=self.full or self.exact, runtime=replace(self.runtime, precision="fp32"))

    def through(self, other: Frozen) -> Frozen:
        """Climbing on the other's copy, judged by this one's original."""
        return replace(self, fast=other.fast, runtime=other.runtime, folded=other.folded)

    def averaged(self, draws: int) -> Frozen:
        """The same; where the classifier is randomised, the mean of so many passes judges."""
        return replace(self, draws=draws) if self.is_random else self

    def answer(self, images: Tensor) -> Tensor:
        """Logits of the fast copy, (n, K), float32."""
        with torch.no_grad(), self.runtime.autocast():
            logits = self._said(self.fast, images)
        return logits.float()

    def judge(self, images: Tensor) -> Tensor:
        """Logits of the original in fp32, (n, K)."""
        kind = torch.device(self.runtime.device).type
        with torch.no_grad(), torch.autocast(kind, enabled=False), _full_fp32(kind):
            logits = self._said(self.exact, images)
            if self.draws > 1:
                others = [self._said(self.exact, images) for _ in range(self.draws - 1)]
                logits = torch.stack([logits, *others]).mean(0)
        return logits.float()

    def level(self, images: Tensor, loss: Loss) -> Slope:
        """What `slope` shows, without the gradient, which is empty."""
        logits = self.answer(images)
        return Slope(logits, loss(logits), logits.new_empty(0))

    def slope(self, images: Tensor, loss: Loss, *, samples: int = 1) -> Slope:
        """The summed loss's gradient. samples: passes that are averaged, for randomised models (EOT)."""
        found = [self._slope(images, loss) for _ in range(samples)]
        if samples == 1:
            return found[0]
        logits, value, gradient = (
            torch.stack([getattr(one, name) for one in found]).mean(0) for name in ("logits", "value", "gradient")
        )
        return Slope(logits, value, gradient)

    def _slope(self, images: Tensor, loss: Loss) -> Slope:
        probe = images.detach().requires_grad_()
        with torch.enable_grad():
            with self.runtime.autocast():
                logits = self._said(self.fast, probe)
            logits = logits.float()
            value = loss(logits)
            gradient = None
            if value.requires_grad:
                (gradient,) = torch.autograd.grad(value.sum(), probe, allow_unused=True)
        if gradient is None:  # the classifier cuts it off, with no_grad() or detach(): that is a gradient of zero
            return Slope(logits.detach(), value.detach(), torch.zeros_like(images))
        # a root at a black pixel has an infinite gradient; squares of what is put there must stay finite
        gradient = gradient.nan_to_num_(nan=0.0, posinf=STEEPEST, neginf=-STEEPEST)
        return Slope(logits.detach(), value.detach(), gradient)

    def _said(self, model: Classifier, images: Tensor) -> Tensor:
        """Its answers about a copy of the images, as a model may change its input in place."""
        n = len(images)
        size = max(room_for(n) if self.fills_up else n, 2 if self.needs_two else 1)
        if size == n:
            return model(images.clone(memory_format=self.runtime.memory_format))
        filled = torch.cat([images, images[:1].detach().expand(size - n, *images.shape[1:])])
        return model(filled.contiguous(memory_format=self.runtime.memory_format))[:n]


def room_for(n: int) -> int:
    """The next of a few batch sizes, at most an eighth more.

    On a CPU every size has kernels of its own (oneDNN), which take time to be made and memory to be kept; an active set
    that shrinks image by image would have hundreds.
    """
    step = 1 << max(0, n.bit_length() - 4)
    return -(-n // step) * step


@contextmanager
def frozen(classifier: nn.Module, images: Tensor, runtime: Runtime) -> Iterator[Frozen]:
    """Prepare a classifier; it is left as it was found, but for its device.

    images: some of those to be attacked, float32, (n, C, H, W): the copy must answer them as the original does, or
    the original is attacked itself.
    """
    modes = [(module, module.training) for module in classifier.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in classifier.parameters()]
    # a library that views gradients fails on those of weights that lie channels last
    dense = [tensor for tensor in (*classifier.parameters(), *classifier.buffers()) if tensor.is_contiguous()]
    try:
        classifier.eval()
        runtime.place(classifier)
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        some = torch.linspace(0, len(images) - 1, min(PROBES, len(images))).long()
        yield _prepared(classifier, images[some].to(runtime.device), runtime)
    finally:
        for module, training in modes:
            module.training = training
        for parameter, before in wanted:
            parameter.requires_grad_(before)
        for tensor in dense:
            if not tensor.is_contiguous():
                tensor.data = tensor.data.contiguous()


def asked(answer: Classifier, classes: int, runtime: Runtime) -> Frozen:
    """Something that answers, as it is: a remote model, an oracle, a function. It is asked in fp32, without gradients.

    Answers of shape (n,), labels alone, become logits of 0 and 1, of at least so many classes.
    """

    def logits(images: Tensor) -> Tensor:
        found = answer(images)
        if not isinstance(found, Tensor):
            raise InputError(f"the classifier answers with a {type(found).__name__}.", "It must return a tensor.")
        if found.ndim != 1:
            return found.to(images.device)
        labels = found.to(images.device, torch.int64)
        known = max(2, classes, int(labels.max()) + 1)
        if bool((labels < 0).any()):  # a refusal to name one is a class of its own
            labels, known = torch.where(labels < 0, known, labels), known + 1
        return (labels[:, None] == torch.arange(known, device=images.device)).float()

    return Frozen(logits, logits, replace(runtime, precision="fp32"))


def _full_fp32(kind: str) -> AbstractContextManager[None]:
    """On CUDA, convolutions in fp32 that are not rounded to TF32."""
    if kind != "cuda":
        return nullcontext()
    found: AbstractContextManager[None] = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    return found


def _prepared(classifier: nn.Module, probe: Tensor, runtime: Runtime) -> Frozen:
    full = replace(runtime, precision="fp32")
    plain = Frozen(classifier, classifier, full, fills_up=torch.device(runtime.device).type == "cpu")
    try:
        plain.judge(probe[:1])
    except Exception:  # whatever the user's module raises
        plain = replace(plain, needs_two=True)
    try:
        expected = plain.judge(probe)
    except Exception as error:
        raise InputError(
            f"the classifier fails on images of shape {tuple(probe.shape)}: {type(error).__name__}: {error}",
            "It must take float32 images of that shape and return logits, (n, K).",
        ) from error
    if not torch.equal(expected, plain.judge(probe)):
        return replace(plain, is_random=True)  # nothing can be compared with it
    made = _copied(plain, expected, probe, full, fold=True) or _copied(plain, expected, probe, full)
    if made is None:
        return plain
    copy, folded = made
    if runtime.precision == "bf16":
        narrow = _copied(replace(plain, fast=copy), expected, probe, runtime)
        if narrow is not None:
            return replace(plain, fast=narrow[0], full=copy if folded else None, runtime=runtime, folded=folded)
    return replace(plain, fast=copy, full=copy, folded=folded) if folded else plain


def _copied(
    plain: Frozen, expected: Tensor, probe: Tensor, runtime: Runtime, *, fold: bool = False
) -> tuple[nn.Module, int] | None:
    """A copy of what is climbed, in this precision, and how many norms were folded in it; None where it cannot be made,
    or does not answer as expected."""
    try:
        original = cast(nn.Module, plain.fast)
        copy = deepcopy(original)
        if _share(copy, original):
            return None
        folded = _fold(copy, probe) if fold else 0
        if runtime.precision == "bf16":
            _narrow(copy)
        answers = replace(plain, fast=copy, runtime=runtime).answer(probe)
        tolerance = ROUNDING_TOLERANCE if runtime.precision == "bf16" else FOLDING_TOLERANCE
        return (copy, folded) if _agree(answers, expected, tolerance) else None
    except Exception:  # a module that cannot be copied, or whose copy does not run: it is attacked as it is
        return None


def _share(copy: nn.Module, original: nn.Module) -> bool:
    """Whether a copy is none: its own __deepcopy__ kept something of the original."""
    kept = {id(part) for part in (*original.modules(), *original.parameters())}
    return any(id(part) in kept for part in (*copy.modules(), *copy.parameters()))


def _agree(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether the differences between logits, which decide, are the same to within a share of the largest."""
    spread = expected - expected.mean(dim=1, keepdim=True)
    error = found - found.mean(dim=1, keepdim=True) - spread
    return bool(error.abs().max() <= tolerance * spread.abs().max())


def _fold(model: nn.Module, probe: Tensor) -> int:
    """Fold each batch norm into the convolution whose output it alone takes; how many were.

    Which follow which is seen in a pass and in its autograd graph, so that a model's own control flow stays as it is.
    What takes an output without gradient cannot be seen so; who folds compares the answers.
    """
    names = {module: name for name, module in model.named_modules()}
    shared = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    calls: Counter[nn.Module] = Counter()
    outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d, Tensor]] = []

    def watch(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        calls[module] += 1
        if isinstance(module, nn.Conv2d):
            outputs[id(output)] = (module, output)
        elif isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and id(given[0]) in outputs:
            convolution, between = outputs[id(given[0])]
            pairs.append((convolution, module, between))

    watched = [module for module in names if _is_plain(module) and not _has_hooks(module)]
    hooks = [module.register_forward_hook(watch) for module in watched]
    try:
        with torch.enable_grad():
            uses = _uses(model(probe.clone().requires_grad_()))
    finally:
        for hook in hooks:
            hook.remove()
    folded = 0
    for convolution, norm, between in pairs:
        if (
            all(calls[part] == 1 and shared[id(part)] == 1 for part in (convolution, norm))
            and uses[between.grad_fn] == 1
        ):
            model.set_submodule(names[convolution], fuse_conv_bn_eval(convolution, norm))
            model.set_submodule(names[norm], nn.Identity())
            folded += 1
    return folded


def _uses(output: Tensor) -> Counter[object]:
    """How often each node of the graph under `output` is used by another."""
    uses: Counter[object] = Counter()
    waiting: list[Any] = [output.grad_fn]
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None:
                uses[node] += 1
                if uses[node] == 1:
                    waiting.append(node)
    return uses


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a convolution or a batch norm that does what these do."""
    return any(
        isinstance(module, kind) and type(module).forward is kind.forward for kind in (nn.Conv2d, nn.BatchNorm2d)
    )


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def _narrow(model: nn.Module) -> None:
    """The weights that autocast would turn into bf16 in every pass, turned once."""
    for module in model.modules():
        if type(module) in (nn.Conv2d, nn.Linear):
            module.to(torch.bfloat16)
