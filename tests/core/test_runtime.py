"""Where and how to compute."""

from __future__ import annotations

import pytest

from stillproof.core.runtime import Runtime, cores


@pytest.mark.parametrize(("said", "threads"), [("3", 3), ("", None), ("0", None), ("4,2", None), ("many", None)])
def test_threads_are_those_that_openmp_is_told_or_one_a_core(
    said: str, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert Runtime.choose().threads == (threads or cores())
    assert Runtime.choose(threads=2).threads == 2
