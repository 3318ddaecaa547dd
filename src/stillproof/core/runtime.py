"""Where and how to compute: device, precision, threads. Chosen from capability, never from a timing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from stillproof.errors import InputError

Precision = Literal["bf16", "fp32"]


@dataclass(frozen=True, slots=True)
class Runtime:
    """device: a torch device name; precision: of training and attack passes (accuracies are always fp32)."""

    device: str = "cpu"
    precision: Precision = "fp32"
    threads: int = 1

    @classmethod
    def choose(cls, device: str = "auto", precision: str = "auto", threads: int | None = None) -> Runtime:
        """The best this machine can do, or what was asked for. Raises InputError if it cannot be had."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            kind = torch.device(device).type
            if kind == "cpu" and device != "cpu":
                raise RuntimeError("the CPU has no index")
        except RuntimeError as error:
            raise InputError(f"unknown device {device!r}: {error}", "Use auto, cpu or cuda.") from None
        if kind == "cuda" and not torch.cuda.is_available():
            raise InputError("there is no CUDA device here.", "Use --device cpu, or --device auto.")
        if kind not in ("cpu", "cuda"):
            raise InputError(f"the device {device!r} is not supported.", "Use auto, cpu or cuda.")
        if precision == "auto":
            precision = "bf16" if has_fast_bf16(kind) else "fp32"
        if precision not in ("bf16", "fp32"):
            raise InputError(f"unknown precision {precision!r}.", "Use auto, bf16 or fp32.")
        chosen: Precision = "bf16" if precision == "bf16" else "fp32"
        return cls(device, chosen, threads or wanted_threads())

    @property
    def fabric_precision(self) -> Literal["bf16-mixed", "32-true"]:
        """The same precision in Lightning Fabric's words."""
        return "bf16-mixed" if self.precision == "bf16" else "32-true"

    @property
    def memory_format(self) -> torch.memory_format:
        """channels_last everywhere: oneDNN and cuDNN both convolve faster in it."""
        return torch.channels_last

    @property
    def images_at_once(self) -> int:
        """Images in a pass without training: on a CPU few enough that their activations are not mapped anew every time.

        500 images of 32 × 32 through a ResNet of width 16 take 1.3 times as long an image as 256 do.
        """
        return 256 if torch.device(self.device).type == "cpu" else 1024

    def place(self, module: nn.Module) -> nn.Module:
        """The module on this device, in this memory format."""
        placed: nn.Module = module.to(device=self.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        return placed

    def autocast(self) -> torch.autocast:
        """Forward passes in this precision."""
        kind = torch.device(self.device).type
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def apply(self) -> None:
        """Set this process up: its threads; on CUDA fp32 that is fp32, and the same result twice."""
        torch.set_num_threads(self.threads)
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True


def wanted_threads() -> int:
    """As many as OMP_NUM_THREADS names, as everywhere in PyTorch; without it, a thread a core."""
    said = os.environ.get("OMP_NUM_THREADS", "").strip()
    return int(said) if said.isdigit() and int(said) else cores()


def cores() -> int:
    """How many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def has_fast_bf16(device_kind: str) -> bool:
    """Whether the hardware multiplies bfloat16 natively (AVX512-BF16 or AMX; Ampere or later)."""
    if device_kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
