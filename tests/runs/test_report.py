from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from stillproof.core.measurement import Measurement
from stillproof.errors import InputError, StoreError
from stillproof.findings import Curve, Finding, Picture, Result, Series, Table
from stillproof.runs.directory import read_result
from stillproof.runs.plots import svg
from stillproof.runs.report import render, shown, write_report

from .sample import HOSTILE, NO_VALUE, sample_result

INLINE = {"a", "code", "span", "strong"}


class Page(HTMLParser):
    """What a browser's parser finds: elements with their attributes, and the text outside of style sheets."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[str] = []
        self._in_style = False
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in_style = tag == "style"
        if tag not in INLINE:
            self.parts.append(" ")

    def handle_endtag(self, _tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if not self._in_style:
            self.parts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.parts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def markup() -> str:
    return render(sample_result())


@pytest.fixture(scope="module")
def page(markup: str) -> Page:
    return Page(markup)


def test_the_verdict_stands_first_then_the_findings_then_the_tables(page: Page) -> None:
    order = [
        "Verdict: error",
        sample_result().summary,
        "4 findings: 1 error, 1 fail, 1 inconclusive, 1 pass.",
        "The defence could not be measured",  # error, though its severity is low
        "A thief gains from the answers",
        "cannot be told apart from noise",
        "costs no more accuracy than its budget",
        "Test accuracy of thieves",
        "Accuracy of the thief by temperature",
        "Queries asked of an oracle",
        "recipe.learning_rate 0.1",
        "packages.torch 2.13.0+cpu",
    ]
    places = [page.text.find(part) for part in order]
    assert -1 not in places
    assert places == sorted(places)


def test_the_more_severe_of_two_failures_comes_first() -> None:
    findings = [
        Finding(rule="SP-T1", subject="s", title=f"the {severity} one", status="fail", severity=severity)
        for severity in ("low", "high", "medium")
    ]
    text = Page(render(Result(verb="steal", status="fail", findings=findings))).text
    assert text.find("the high one") < text.find("the medium one") < text.find("the low one")


def test_a_finding_says_its_status_in_words_and_shows_its_numbers_and_evidence(page: Page) -> None:
    finding = "Fail SP-T1 severity high A thief gains"
    assert finding in page.text
    assert "KL to the victim 0.431 nats [0.419, 0.444] in nats, 95 % interval, normal, over images" in page.text
    assert "58.1 % [55.0, 61.1] share, 95 % interval, Wilson, n = 1000" in page.text
    assert "Best thief: KD, T = 4, chosen on its own held-out queries in every seed." in page.text
    assert "Advice Lower the learning rate of the thief and resume." in page.text


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (Measurement(value=0.581, low=0.552, high=0.61, n=9, method="m"), "58.1 % [55.2, 61.0]"),
        (Measurement(value=-0.0001, n=9, method="m"), "0.0 %"),
        (Measurement(value=-0.021, low=-0.1, high=0.05, n=9, method="m"), "−2.1 % [−10.0, 5.0]"),
        (Measurement(value=1.5, low=0.25, high=2, n=9, unit="nats", method="m"), "1.50 nats [0.25, 2.00]"),
        (Measurement(value=0.5, low=0.2, high=math.inf, n=9, method="m"), "50.0 % [20.0, –]"),
        (Measurement(value=None, n=0, method="no cases"), "– no cases"),
        (Measurement(value=math.nan, n=0, method="it diverged"), "– it diverged"),
        (41_250_000, "41\u202f250\u202f000"),
        (500, "500"),
        (0.05, "0.0500"),
        (1.5e-9, "1.50 × 10⁻⁹"),
        (math.nan, "– no value"),
        (-math.inf, "– no value"),
        (None, "– no value"),
        ("ast?keep=2", "ast?keep=2"),
    ],
)
def test_how_a_cell_is_shown(cell: Any, text: str) -> None:
    words = shown(cell)
    assert " ".join(filter(None, (words.value, words.interval, words.why))) == text


def test_what_could_not_be_measured_is_a_dash_with_its_reason(page: Page) -> None:
    assert page.text.count(f"– {NO_VALUE}") == 2  # in a finding and in a table
    assert "limit – (not set)" in page.text
    assert not re.search(r"\b(nan|inf|None|null)\b", page.text, re.IGNORECASE)


def hostile_everywhere() -> Result:
    """The sample with hostile text in every place that takes text."""
    fixed = {"rule", "status", "severity", "kind", "png", "schema_version"}

    def spoil(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            named = key in {"measurements", "levels", "settings", "environment"}
            return {f"{k}{HOSTILE}" if named else k: spoil(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(part, key) for part in value]
        if isinstance(value, str) and key not in fixed:
            return f'{HOSTILE}" onload="alert(2)" x="{{{{ 7*7 }}}}&amp;'
        return value

    return Result.model_validate(spoil(sample_result().model_dump()))


def test_hostile_text_is_text_wherever_it_stands() -> None:
    page = Page(render(hostile_everywhere()))
    assert not page.all("script")
    (image,) = page.all("img")
    assert (image["src"] or "").startswith("data:image/png;base64,")
    assert not [name for _tag, attributes in page.elements for name in attributes if name.startswith("on")]
    assert (
        Counter(tag for tag, _ in page.elements).keys()
        == Counter(tag for tag, _ in Page(render(sample_result())).elements).keys()
    )
    assert page.text.count(HOSTILE) > 60
    assert "{{ 7*7 }}&amp;" in page.text


@pytest.mark.parametrize("number", ["1" + 400 * "0", "-9223372036854775809"])
def test_a_number_that_nothing_can_show_is_refused(number: str, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.write_text(re.sub(r'"n":\d+', f'"n":{number}', sample_result().model_dump_json(), count=1))
    assert number in file.read_text()
    with pytest.raises(InputError, match="is no result of Stillproof"):
        read_result(file)


def test_characters_that_do_not_print_or_that_turn_the_text_round_are_replaced() -> None:
    hidden = "a\x00b\x1bc\u202ed"
    curve = Curve(
        title=hidden, kind="bars", x_label=hidden, y_label=hidden, series=[Series(name=hidden, x=[hidden], y=[1])]
    )
    markup = render(Result(verb="scan", status="pass", summary=hidden, curves=[curve]))
    assert not set(markup) & {"\x00", "\x1b", "\u202e"}
    assert "a\ufffdb\ufffdc\ufffdd" in markup


def test_a_picture_that_is_not_a_png_is_not_shown() -> None:
    picture = Picture(title="t", png='x" onerror="alert(1)')
    page = Page(render(Result(verb="scan", status="pass", images=[picture])))
    assert not page.all("img")
    assert "cannot be shown: it is not a PNG" in page.text


def test_the_page_runs_nothing_and_loads_nothing(markup: str, page: Page) -> None:
    policy = next(m for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert not page.all("script")
    targets = [
        attributes[name] or ""
        for _tag, attributes in page.elements
        for name in ("href", "src", "xlink:href")
        if name in attributes
    ]
    assert targets
    assert all(target.startswith(("#", "data:")) for target in targets)
    assert not re.search(r"url\((?!#)|@import|javascript:", markup)


def test_every_reference_inside_the_page_has_one_target() -> None:
    sample = sample_result()
    twice = sample.model_copy(update={"curves": [*sample.curves, *sample.curves]})
    markup = render(twice)
    page = Page(markup)
    ids = Counter(attributes["id"] for _tag, attributes in page.elements if "id" in attributes)
    assert set(ids.values()) == {1}
    used = re.findall(r"url\(#([^)]+)\)", markup) + re.findall(r'(?:href="#|labelledby=")([^"]+)"', markup)
    assert set(used) <= ids.keys()


def test_the_page_can_be_read_without_seeing_it(page: Page) -> None:
    assert page.all("html")[0]["lang"] == "en"
    assert {"header", "nav", "main", "footer"} <= {tag for tag, _ in page.elements}
    assert all(cell.get("scope") in ("row", "col") for cell in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) == 4  # two tables, and the numbers of two plots
    assert len(page.all("figcaption")) == len(page.all("figure")) == 3
    assert all(plot["role"] == "img" and plot["aria-label"] for plot in page.all("svg"))
    assert all(image["alt"] for image in page.all("img"))


def test_the_numbers_of_a_plot_stand_below_it(page: Page) -> None:
    assert "8 58.3 [57.2, 59.4] – not measured" in page.text
    assert "Dashed: no teacher 50.1; label only 52." in page.text


def test_a_result_read_back_from_json_gives_the_same_page(markup: str) -> None:
    assert render(sample_result()) == markup
    assert render(Result.model_validate_json(sample_result().model_dump_json())) == markup


def test_what_is_not_finite_gives_the_same_page_after_json() -> None:
    rows: list[list[Any]] = [["a", math.nan, Measurement(value=0.5, low=-math.inf, high=math.inf, n=3, method="m")]]
    curve = Curve(title="c", kind="line", x_label="x", y_label="y", series=[Series(name="s", x=[1], y=[math.nan])])
    table = Table(title="t", columns=["a", "b", "c"], rows=rows)
    result = Result(verb="audit", status="inconclusive", tables=[table], curves=[curve])
    read_back = Result.model_validate_json(result.model_dump_json())
    ids = re.compile("plot-[0-9a-f]+")
    assert ids.sub("", render(read_back)) == ids.sub("", render(result))


def test_another_process_gives_the_same_page_and_never_imports_torch(markup: str, tmp_path: Path) -> None:
    given = tmp_path / "result.json"
    given.write_text(sample_result().model_dump_json(), encoding="utf-8")
    script = (
        "import sys; from pathlib import Path; from stillproof.findings import Result;"
        "from stillproof.runs.report import write_report;"
        "write_report(Result.model_validate_json(Path(sys.argv[1]).read_text('utf-8')), Path(sys.argv[2]));"
        "sys.exit('torch' in sys.modules)"
    )
    written = tmp_path / "new" / "report.html"
    command = [sys.executable, "-W", "error", "-c", script, str(given), str(written)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "7"})
    assert written.read_bytes() == markup.encode()


def test_a_killed_writer_leaves_the_old_page(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("the old page")
    script = (
        "import sys; from pathlib import Path; from stillproof.findings import Result;"
        "from stillproof.runs.report import write_report;"
        "write_report(Result(verb='steal', status='pass'), Path(sys.argv[1]))"
    )
    environment = os.environ | {"STILLPROOF_KILL_AT": "report:1"}
    killed = subprocess.run([sys.executable, "-c", script, str(path)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "the old page"
    assert [left for left in tmp_path.iterdir() if not left.name.endswith(".partial")] == [path]
    write_report(Result(verb="steal", status="pass"), path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_report_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        write_report(Result(verb="steal", status="pass"), tmp_path / "file" / "report.html")


def test_an_empty_result_is_a_page() -> None:
    text = Page(render(Result(verb="distill", status="pass"))).text
    assert "Verdict: pass No findings." in text
    assert "Peak memory – (not measured)" in text


# The plots


def plot(kind: str = "line", **changes: Any) -> Curve:
    given = {"title": "t", "x_label": "x", "y_label": "y", "kind": kind, "series": []}
    return Curve.model_validate(given | changes)


def parsed(drawing: str) -> ElementTree.Element:
    return ElementTree.fromstring(drawing)  # noqa: S314 - it is ours; a failure is what is looked for


def texts(drawing: str) -> list[str]:
    return [element.text or "" for element in parsed(drawing).iter() if element.tag.endswith("}text")]


@pytest.mark.parametrize("kind", ["line", "bars"])
@pytest.mark.parametrize(
    "series",
    [
        [],
        [Series(name="s", x=[], y=[])],
        [Series(name="s", x=[1, 2, 3], y=[None, None, None])],
        [Series(name="s", x=[1, 2, 3], y=[1, None, 3], low=[0.5, None], high=[1.5])],
        [Series(name="s", x=["a", "b"], y=[1, 2], low=[1.1, 1], high=[0.9, 3]), Series(name="", x=["c"], y=[-1])],
        [Series(name="_s", x=[5], y=[1e300]), Series(name="s", x=["b"], y=[-1e300])],
        [Series(name=f"{n}", x=[1, 2], y=[n, n]) for n in range(20)],
    ],
)
def test_every_curve_is_well_formed(kind: str, series: list[Series]) -> None:
    drawing = svg(plot(kind, series=series, levels={"one": 1.0, "about one": 1.0001}))
    root = parsed(drawing)
    assert root.get("viewBox")
    assert (root.get("width"), root.get("height")) == ("100%", None)
    assert not re.search(r"\bnan\b|\binf\b", drawing)
    assert {"one", "about one"} <= set(texts(drawing))


@settings(max_examples=15, deadline=None, database=None, derandomize=True, phases=[Phase.generate])
@given(
    st.sampled_from(["line", "bars"]),
    st.text(max_size=40),
    st.lists(st.one_of(st.none(), st.floats()), max_size=4),
    st.floats(),
)
def test_any_names_and_numbers_can_be_drawn(kind: str, name: str, y: list[float | None], level: float) -> None:
    series = [Series(name=name, x=[f"{name}{n}" for n in range(len(y))], y=y, low=y, high=y)]
    curve = plot(kind, title=name, x_label=name, y_label=name, series=series, levels={name: level})
    assert parsed(svg(curve)).get("viewBox")


def test_hostile_names_and_mathematics_stay_text() -> None:
    name = "$x$ </script><img>"
    for kind in ("line", "bars"):
        drawing = svg(plot(kind, y_label=name, series=[Series(name=f"_{name}", x=[name], y=[1])], levels={"$l$": 1}))
        assert "<img" not in drawing
        assert {name, f"_{name}", "$l$"} <= set(texts(drawing))


def test_colours_come_from_the_page() -> None:
    for curve in sample_result().curves:
        drawing = svg(curve)
        assert "var(--series-2, " in drawing
        assert "var(--ink, " in drawing
        assert not re.search(r"#[0-9a-f]{6}", re.sub(r"var\([^)]*\)", "", drawing))


def test_what_was_not_measured_is_a_gap_and_not_a_zero() -> None:
    drawing = svg(plot("bars", series=[Series(name="s", x=["a", "b"], y=[5.0, None])]))
    assert "–" in texts(drawing)
    assert "nothing was measured" not in texts(drawing)
    assert "nothing was measured" in texts(svg(plot("bars", series=[Series(name="s", x=["a"], y=[None])])))


def test_the_style_of_whoever_renders_changes_nothing_and_is_not_changed() -> None:
    curve = sample_result().curves[0]
    before = svg(curve)
    with matplotlib.rc_context({"lines.linewidth": 9, "text.color": "red", "font.size": 20, "svg.fonttype": "path"}):
        mine = dict(matplotlib.rcParams)
        assert svg(curve) == before
        assert dict(matplotlib.rcParams) == mine
