"""The SPEC grammar and the table of names."""

from dataclasses import dataclass
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillproof.core.plugins import BUILT_IN, Kind, build, call_with_options, resolve, table
from stillproof.core.spec import Spec
from stillproof.errors import InputError, nearest

NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)


@given(NAMES, st.dictionaries(NAMES, st.from_regex(r"[A-Za-z0-9_./:~-]{1,12}", fullmatch=True), max_size=4))
def test_a_spec_survives_being_written_and_read(name: str, options: dict[str, str]) -> None:
    spec = Spec.parse(f"zoo:{name}" + ("?" + "&".join(f"{k}={v}" for k, v in options.items()) if options else ""))
    assert Spec.parse(str(spec)) == spec
    assert (spec.scheme, dict(spec.options)) == ("zoo", options)


@pytest.mark.parametrize("text", ["", "?a=1", "x?a", "x?a=1&a=2", "x?=&"])
def test_a_spec_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        Spec.parse(text)


def test_only_a_module_and_factory_runs_code() -> None:
    assert Spec.parse("package.module:factory?x=1").runs_code
    assert not any(Spec.parse(text).runs_code for text in ("zoo:cnn", "hf:org/name", "digits", "http://host/x"))


@pytest.mark.parametrize("kind", get_args(Kind))
def test_every_built_in_name_leads_somewhere(kind: Kind) -> None:
    assert all(callable(resolve(place)) for place in table(kind).values())
    assert set(BUILT_IN[kind]) <= set(table(kind))


@dataclass(frozen=True, kw_only=True)
class Thing:
    size: int = 1
    rate: float | None = None
    safe: bool = False


def test_options_are_converted_to_the_types_of_their_parameters() -> None:
    made = call_with_options(Thing, Spec.parse("thing?size=3&rate=0.5&safe=true"))
    assert made == Thing(size=3, rate=0.5, safe=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [("thing?siez=3", "Did you mean 'size'"), ("thing?size=big", "size=big"), ("thing?rate=x", "rate=x")],
)
def test_a_wrong_option_is_named_with_the_nearest(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        call_with_options(Thing, Spec.parse(text))


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(InputError, match="Did you mean 'label-only'"):
        build("thief", Spec.parse("label-onyl"))
    assert nearest("zzz", ["a"]) == "Known: a."


def test_code_that_cannot_be_loaded_is_one_clear_error() -> None:
    with pytest.raises(InputError, match="ModuleNotFoundError"):
        resolve("no_such_package_at_all:factory")


@pytest.mark.parametrize("text", ["zoo:cnn?weights=", "round?decimals=&x=1", "a?b=%20"])
def test_an_option_without_a_value_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="has no value"):
        Spec.parse(text)
