"""A classifier behind HTTP: a real server that fails, restarts and counts."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from torch import Tensor

from stillproof.errors import BudgetExceeded, InputError
from stillproof.serving.http import Endpoint, HttpClassifier, Refused


def scores(images: np.ndarray) -> np.ndarray:
    """Three logits: of each image's means of rows."""
    means = images.mean(axis=(1, 3))
    return np.stack([means[:, 0], means[:, 1], 1 - means.sum(axis=1)], axis=1).astype(np.float32)


class Server:
    """Counts the images that arrive; `faults` are used up, one a request: a status, `hang`, `garbage`."""

    def __init__(self, port: int = 0) -> None:
        self.images, self.requests, self.faults = 0, list[float](), list[str]()
        self.kind = "logits"
        self.scores = scores
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                is_json = self.headers["content-type"] == "application/json"
                images = (
                    np.asarray(json.loads(body)["images"], np.float32)
                    if is_json
                    else np.load(io.BytesIO(body))["images"]
                )
                outer.images += len(images)
                outer.requests.append(time.monotonic())
                fault = outer.faults.pop(0) if outer.faults else ""
                if fault == "hang":
                    time.sleep(1.0)
                    return
                found = outer.scores(images)
                answer = {
                    "logits": found,
                    "labels": found.argmax(1),
                    "probabilities": np.exp(found) / np.exp(found).sum(1, keepdims=True),
                }[outer.kind]
                if is_json:
                    content = json.dumps({outer.kind: answer.tolist()}).encode()
                else:
                    stream = io.BytesIO()
                    np.savez(stream, **{outer.kind: answer})
                    content = stream.getvalue()
                self.send_response(int(fault) if fault.isdecimal() else 200)
                content = b"no answer" if fault == "garbage" else content
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.handler = Handler
        self.port = port
        self.start()

    def start(self) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), self.handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def restart(self) -> None:
        self.stop()
        time.sleep(0.5)
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/predict"

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.stop()


def images(n: int) -> Tensor:
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", ["json", "npz"])
@pytest.mark.parametrize("kind", ["logits", "probabilities", "labels"])
def test_every_form_and_kind_is_read(server: Server, form: str, kind: str) -> None:
    server.kind = kind
    client = HttpClassifier(Endpoint.parse(f"{server.url}?format={form}&batch=4"))
    found = client(images(10))
    expected = torch.from_numpy(scores(images(10).numpy()))
    assert client.queries == server.images == 10
    assert len(server.requests) == 3
    if kind == "labels":
        assert torch.equal(found, expected.argmax(1))
    else:
        assert torch.allclose(found.softmax(1), expected.softmax(1), atol=1e-5)


@pytest.mark.parametrize("fault", ["500", "503", "429", "hang"])
def test_failures_are_retried_and_counted(server: Server, fault: str) -> None:
    server.faults = [fault, fault]
    client = HttpClassifier(Endpoint(server.url, timeout=0.3))
    assert client(images(5)).shape == (5, 3)
    assert client.queries == server.images == 15  # what the server has seen, failed or not


def test_a_restart_is_survived() -> None:
    first = Server()
    port = first.port
    client = HttpClassifier(Endpoint(first.url, batch=2, patience=20))
    client(images(2))
    first.stop()
    second = list[Server]()
    threading.Timer(0.7, lambda: second.append(Server(port))).start()
    assert client(images(4)).shape == (4, 3)
    assert client.queries == first.images + second[0].images == 6
    second[0].stop()


def test_the_budget_is_never_exceeded_and_counts_failures(server: Server) -> None:
    client = HttpClassifier(Endpoint(server.url, batch=4), budget=12)
    server.faults = ["500"]
    client(images(4))
    with pytest.raises(BudgetExceeded, match="8 of 12 queries are spent, and 5 more are needed"):
        client(images(5))  # the first four are answered, the fifth would be the thirteenth
    assert server.images == client.queries <= 12


def test_the_rate_is_kept(server: Server) -> None:
    client = HttpClassifier(Endpoint(server.url, batch=1, rate=20))
    began = time.monotonic()
    client(images(5))
    # a busy machine notes a request late, never early
    assert all(noted - began >= number / 20 - 1e-3 for number, noted in enumerate(server.requests))


@pytest.mark.parametrize(
    ("prepare", "match"),
    [
        (lambda server: server.faults.append("404"), "answers 404"),
        (lambda server: server.faults.append("garbage"), "cannot be read as json"),
    ],
)
def test_what_is_no_answer_is_refused(server: Server, prepare: Callable[[Server], None], match: str) -> None:
    prepare(server)
    with pytest.raises(Refused, match=match):
        HttpClassifier(Endpoint(server.url))(images(2))
    assert len(server.requests) == 1


def test_nobody_there_is_told_in_one_line() -> None:
    with pytest.raises(InputError, match="does not answer"):
        HttpClassifier(Endpoint("http://127.0.0.1:9/predict", patience=0.3))(images(2))


@pytest.mark.parametrize("text", ["ftp://host/x", "http://host?rate=-1", "http://host?batch=0", "http://host?rats=1"])
def test_what_is_no_endpoint_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        Endpoint.parse(text)
