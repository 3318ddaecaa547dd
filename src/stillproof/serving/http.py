"""A classifier behind HTTP, as a client: images go out, answers come back; it retries, paces itself, counts, and stops.

One POST holds some images and is answered with one of `logits`, `probabilities` (n, K) or `labels` (n,).

- json: `{"images": [[[[…]]]]}`, float in [0, 1], (n, C, H, W) → `{"logits": [[…]]}`
- npz: a NumPy .npz with `images`, float32 → a .npz with `logits`
"""

from __future__ import annotations

import io
import json
import time
import zipfile
from dataclasses import dataclass
from typing import Literal

import httpx
import numpy as np
import tenacity
import torch
from torch import Tensor

from stillproof.core.adapters import logits_of
from stillproof.core.plugins import read_options
from stillproof.core.spec import Spec
from stillproof.errors import BudgetExceeded, InputError, StillproofError, reason

Format = Literal["json", "npz"]

ANSWERS = ("logits", "probabilities", "labels")
"""What an answer may be called."""

LARGEST_ANSWER = 2**26
"""Bytes that an answer may have, packed or unpacked."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a classifier is served, and how it may be asked.

    url: http:// or https://; format: of questions and answers; batch: images in one request; rate: requests a second
    at the most, 0 for no limit; timeout: seconds until a request is given up; patience: seconds for which failures
    (timeouts, refused connections, statuses 429 and 5xx) are retried, longer and longer apart.
    """

    url: str
    format: Format = "json"
    batch: int = 64
    rate: float = 0.0
    timeout: float = 30.0
    patience: float = 120.0

    def __post_init__(self) -> None:
        if self.batch < 1 or min(self.rate, self.patience) < 0 or self.timeout <= 0:
            raise InputError(f"{self} cannot be asked.", "Give batches of 1 or more, and positive times.")

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """`http://localhost:8000/predict?format=npz&rate=20`. Raises InputError."""
        spec = Spec.parse(text)
        if spec.scheme not in ("http", "https"):
            raise InputError(f"{text!r} is no endpoint.", "Write http://HOST:PORT/PATH?format=npz&rate=20.")
        return cls(url=spec.name, **read_options(cls, spec, ("url",)))  # type: ignore[arg-type]


class Refused(StillproofError):  # noqa: N818
    """The endpoint answered that the question is wrong, or with something that is no answer."""


class HttpClassifier:
    """Asks an endpoint about images, float32 in [0, 1], (n, C, H, W): its logits (or log-probabilities), (n, K), or its
    labels, (n,).

    queries: images sent so far, also those of requests that failed after they were sent; none is sent beyond `budget`:
    a batch that does not fit is refused whole with BudgetExceeded. Raises InputError where nobody answers.
    """

    def __init__(self, endpoint: Endpoint, *, budget: int | None = None) -> None:
        self.endpoint, self.budget = endpoint, budget
        self.queries = 0
        self.kind: str | None = None
        self._client = httpx.Client(timeout=endpoint.timeout)
        self._next_request = 0.0

    def __call__(self, images: Tensor) -> Tensor:
        """The answers."""
        if self.budget is not None and self.queries + len(images) > self.budget:
            raise self._spent(len(images))
        return torch.cat([self._ask(part) for part in images.split(self.endpoint.batch)])  # type: ignore[no-untyped-call]

    def _spent(self, images: int) -> BudgetExceeded:
        return BudgetExceeded(
            f"{self.queries} of {self.budget} queries are spent, and {images} more are needed.",
            "Raise the budget of queries.",
        )

    def close(self) -> None:
        """Let the connection go."""
        self._client.close()

    def _ask(self, images: Tensor) -> Tensor:
        body, headers = self._question(images)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type((httpx.TransportError, httpx.HTTPStatusError)),
            wait=tenacity.wait_exponential(multiplier=0.1, max=10),
            stop=tenacity.stop_after_delay(self.endpoint.patience),
            reraise=True,
        )
        try:
            response = retrying(self._send, body, headers, len(images))
        except httpx.HTTPError as error:
            raise InputError(
                f"{self.endpoint.url} does not answer: {type(error).__name__}: {reason(error)}",
                f"Is it running? It was asked for {self.endpoint.patience:g} s (`patience=` in the SPEC).",
            ) from None
        return self._answer(response, len(images))

    def _send(self, body: bytes, headers: dict[str, str], images: int) -> bytes:
        if self.budget is not None and self.queries + images > self.budget:  # a second try costs as much as the first
            raise self._spent(images)
        if self.endpoint.rate:
            time.sleep(max(0.0, self._next_request - time.monotonic()))
            self._next_request = time.monotonic() + 1 / self.endpoint.rate
        self.queries += images
        try:
            with self._client.stream("POST", self.endpoint.url, content=body, headers=headers) as response:
                content = self._received(response)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout):
            self.queries -= images  # it never left
            raise
        except httpx.InvalidURL as error:
            raise InputError(f"{self.endpoint.url!r} is no URL: {reason(error)}", "Mend the SPEC.") from None
        if response.status_code == 429 or response.status_code >= 500:
            response.raise_for_status()
        if response.status_code >= 300:
            raise Refused(
                f"{self.endpoint.url} answers {response.status_code}: {content[:200]!r}",
                "It must take a POST with images; see docs/audit.md for the format.",
            )
        return content

    def _received(self, response: httpx.Response) -> bytes:
        content = bytearray()
        for part in response.iter_bytes():
            content += part
            if len(content) > LARGEST_ANSWER:
                raise Refused(
                    f"{self.endpoint.url} answers with over {LARGEST_ANSWER:,} bytes.", "Ask for smaller batches."
                )
        return bytes(content)

    def _question(self, images: Tensor) -> tuple[bytes, dict[str, str]]:
        pixels = images.detach().cpu().contiguous().numpy()
        if self.endpoint.format == "json":
            return json.dumps({"images": pixels.tolist()}).encode(), {"content-type": "application/json"}
        content = io.BytesIO()
        np.savez(content, images=pixels)
        return content.getvalue(), {"content-type": "application/octet-stream"}

    def _answer(self, content: bytes, n: int) -> Tensor:
        try:
            kind, array = _read_json(content) if self.endpoint.format == "json" else _read_npz(content)
            values = torch.as_tensor(array)
        except Exception as error:  # what a stranger sends may fail in any way
            raise Refused(
                f"{self.endpoint.url} answers with what cannot be read as {self.endpoint.format}: {reason(error)}",
                f"It must hold one of {', '.join(ANSWERS)}.",
            ) from None
        wanted = 1 if kind == "labels" else 2
        if values.ndim != wanted or len(values) != n or (self.kind or kind) != kind:
            raise Refused(
                f"{self.endpoint.url} answers {n} images with {kind} of shape {tuple(values.shape)}.",
                "Answer every image, in order, always with the same kind.",
            )
        self.kind = kind
        if kind == "labels":
            return values.long()
        values = values.float()
        if not bool(values.isfinite().all()):
            raise Refused(f"{self.endpoint.url} answers with NaN or infinite values.", "Check the classifier.")
        return logits_of(values) if kind == "probabilities" else values


def _read_json(content: bytes) -> tuple[str, np.ndarray]:
    found = json.loads(content)
    kind = next(name for name in ANSWERS if name in found)
    return kind, np.asarray(found[kind])


def _read_npz(content: bytes) -> tuple[str, np.ndarray]:
    """The one member that is an answer; its size is looked at before it is unpacked."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        kind = next(name for name in ANSWERS if f"{name}.npy" in archive.namelist())
        if archive.getinfo(f"{kind}.npy").file_size > LARGEST_ANSWER:
            raise ValueError(f"{kind} unpacks to over {LARGEST_ANSWER:,} bytes")
        return kind, np.lib.format.read_array(io.BytesIO(archive.read(f"{kind}.npy")), allow_pickle=False)
