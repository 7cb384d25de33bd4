"""The report is one file, escapes everything, leaves nothing out."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from ekfac_fast import extras, report
from ekfac_fast.cli.terminal import harmless
from ekfac_fast.errors import MissingExtra
from ekfac_fast.report import charts, text
from ekfac_fast.report.contents import QueryResult, RankedSequence, RunFacts, StageTime, beyond

pytest.importorskip("jinja2")

HOSTILE = (
    *("<script>alert(1)</script>", "</style>", "</script>", '"><img src=x onerror=alert(1)>'),
    *("'", "&amp;", "{{ 7 * 7 }}", "{% raw %}", "<!--", "]]>", "https://example.org/?a=1&b=2"),
    *("\x00", "\x1b[31m", "\r\n", "\t", "\x7f", "\x9b", "\udce2\udc82", "\ud83d", "\u202edlrow"),
    *("\ufeff", "", " ", "ordinary", " Ünïcode", "字", "👩‍👩‍👧", "\U000f0000", "\ufffd"),
)
LAYERS = tuple(f"model.layers.{i}.mlp.{part}" for i in range(6) for part in ("up", "down"))


def sequence(index: int, words: int, seed: int, detail: bool = True) -> RankedSequence:
    """Hostile words, with a bump of influence somewhere; the sums agree as the paper's do."""
    rng = np.random.default_rng(seed)
    tokens = tuple(HOSTILE[i] for i in rng.integers(0, len(HOSTILE), words))
    bump = np.exp(-(((np.arange(words) - rng.integers(words)) / 9) ** 2))
    matrix = (bump + rng.normal(0, 0.2, (len(LAYERS), words))) * rng.uniform(-0.3, 1, (12, 1))
    return RankedSequence(
        index=index,
        score=float(matrix.sum()),
        tokens=tokens,
        per_token=matrix.sum(0),
        per_layer=matrix.sum(1),
        per_layer_token=matrix if detail else None,
        source="<b>corpus</b>.jsonl:3" if seed % 2 else "",
        candidate_rank=1234 if seed % 3 == 0 else None,
    )


def lone_peak(index: int) -> RankedSequence:
    """A token-sparse sequence."""
    peak = np.zeros(12)
    peak[5] = 9.0
    return RankedSequence(index, 9.0, HOSTILE[:12], peak, np.full(12, 0.75))


def results() -> tuple[QueryResult, ...]:
    """Three queries: full, without scores, without anything."""
    scores = np.random.default_rng(0).standard_t(2.5, size=1000)
    scores[::7] = np.nan
    ranked = tuple(sequence(i, 90 + 200 * (i % 3 == 0), i) for i in range(7))
    full = QueryResult(
        name="<i>first</i>",
        prompt_tokens=("Who is ", "</blockquote>", "?\n"),
        completion_tokens=(" <mark>", "she\udcff"),
        log_probability=-12.345,
        ranked=(*ranked, lone_peak(99)),
        bottom=(sequence(12, 60, 12, detail=False),),
        scores=scores,
    )
    kept = QueryResult("second", ("a",), ("b",), -1.0, ranked[:2])
    return full, kept, QueryResult("", (), (), -0.5, (), scores=np.zeros(10))


def facts() -> RunFacts:
    """Facts with text that wants to break out."""
    return RunFacts(
        model="<script>model",
        layers=LAYERS,
        damping=tuple(1e-6 * (i + 1) for i in range(12)),
        damping_rule="0.1 × mean(lam) of each layer",
        rank=32,
        factor_sequences=840,
        factor_tokens=107_520,
        train_size=1000,
        scanned=857,
        stages=(StageTime("fit", 95.2, 60.0), StageTime("<scan>", 0.42)),
        settings=(("dtype", "fp32 & <bf16>"),),
        notes=("The model is small: </p> its scores are noisy.",),
    )


class Page(HTMLParser):
    """Text of the token elements, attributes, and whether tags nest."""

    VOID = frozenset({"meta", "link", "br", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tokens: list[str] = []
        self.values: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for key, value in attrs if key == "id"]
        if tag == "b" and any(key == "title" for key, _ in attrs):
            self.tokens.append("")
            self.values.append(dict(attrs)["title"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if "b" in self.open and "p" in self.open and "article" in self.open:
            self.tokens[-1] += data


@pytest.fixture(scope="module")
def html() -> str:
    return report.render(facts(), results())


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def shown(tokens: tuple[str, ...]) -> list[str]:
    return ["".join(text.pieces(token)) for token in tokens]


def test_more_than_log_p_can_rise_is_told():
    assert beyond(2.0, -1.5).startswith("+2.00 nats is more than log p = -1.50 can rise")
    assert not beyond(1.4, -1.5)


def test_tags_nest_and_ids_are_unique(page):
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    anchors = [value for key, value in page.attributes if key == "href" and value[0] == "#"]
    assert {anchor[1:] for anchor in anchors} <= set(page.ids)


def test_every_token_is_there_and_escaped(page):
    found = "\x00".join(page.tokens)
    for query in results():
        for ranked in (*query.ranked, *query.bottom):
            assert "\x00".join(shown(ranked.tokens)) in found  # whole, and in order
    assert page.tags.count("script") == page.tags.count("style") == 1
    assert "img" not in page.tags
    assert not [key for key, _ in page.attributes if key.startswith("on")]


def test_prompt_completion_and_facts_are_there(html, page):
    everything = "".join(page.text)
    for query in results():
        assert "".join(shown(query.prompt_tokens + query.completion_tokens)) in everything
    for word in ("<script>model", "<scan>", "fp32 & <bf16>", "</p> its scores", "1.59 ×", *LAYERS):
        assert word in everything
    for word in ("−12.3", "rank 32", "candidate 1,234", "token-sparse", "857 of", "1 min 35 s"):
        assert word in everything
    assert "<mark> &lt;mark&gt;she<i>‹FF›</i></mark>" in html


def test_values_are_score_over_n_with_a_sign(page):
    whole = results()[0].ranked[
        1
    ]  # short: its tokens come once, after the 2 x 56 and 290 of rank 1
    start = next(i for i in range(len(page.tokens)) if page.tokens[i:][:90] == shown(whole.tokens))
    values = np.array([float(value) for value in page.values[start:][:90]])
    np.testing.assert_allclose(values, whole.per_token / 1000, rtol=0.06)
    assert all(re.fullmatch(r"[+-]\d\.\d(e-?\d+)?", value) for value in page.values)


def test_long_sequences_show_their_strongest_spans_first(html):
    first = html[html.index("<article") : html.index("</article>")]
    excerpt, rest = first.split("<details>")
    gaps = [int(n) for n in re.findall(r"<s>([\d,]+) tokens</s>", excerpt)]
    assert excerpt.count("<b") + sum(gaps) == rest.count("<b") - rest.count("<b>Layers") == 290
    assert "Whole sequence of 290 tokens" in rest
    assert 'class="p8"' in excerpt


def test_nothing_is_loaded_from_anywhere(html, page):
    links = [v for k, v in page.attributes if k in {"href", "src", "action", "data", "xlink:href"}]
    assert links
    assert all(link.startswith("#") or link == "data:," for link in links)
    style = html[html.index("<style>") : html.index("</style>")]
    assert not re.search(r"url\(|@import|@font-face", style)
    assert not page.tags.count("iframe") + page.tags.count("object") + page.tags.count("image")


def test_only_our_script_may_run(html):
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in (
        html.replace("&#39;", "'")
    )


def test_no_invisible_characters_reach_the_page(html):
    assert set(text.HIDDEN.findall(html)) <= {"\n", "\t"}


@pytest.mark.parametrize(
    ("token", "seen"),
    [
        ("plain", ["plain"]),
        ("", ["", "‹empty›"]),
        ("a\nb", ["a", "↵\n", "b"]),
        ("\x00\x7f", ["", "‹U+0000›", "", "‹U+007F›", ""]),
        ("\udce2\udc82", ["", "‹E2›", "", "‹82›", ""]),
        ("\u202ex", ["", "‹U+202E›", "x"]),
        ("👩‍👧", ["👩‍👧"]),
    ],
)
def test_what_cannot_be_seen_gets_a_placeholder(token, seen):
    assert text.pieces(token) == seen


@pytest.mark.parametrize(
    ("x", "shown"),
    [
        (0.0, "0"),
        (1234567.0, "+1.23·10⁶"),
        (2400.0, "+2,400"),
        (-0.01234, "−0.0123"),
        (-3.2e-5, "−3.20·10⁻⁵"),
        (99.96, "+100"),
        (float("nan"), "not finite"),
    ],
)
def test_numbers_read_well(x, shown):
    assert text.signed(x) == shown


def test_short_names_drop_what_all_layers_share():
    assert text.short_names(("h.0.fc", "h.1.fc")) == ["1.fc", "0.fc"]
    assert text.short_names(("model.lm_head",)) == ["lm_head"]


def test_levels_are_signed_linear_and_safe():
    assert charts.levels([0, 1, -2, 4]).tolist() == [0, 2, -4, 8]
    assert charts.levels([0, np.nan, np.inf]).tolist() == [0, 0, 0]
    assert charts.levels([]).tolist() == []
    assert [charts.tone(level) for level in (-8, 0, 3)] == ["n8", "", "p3"]


def test_heat_map_merges_runs_and_draws_every_cell_once():
    assert charts.heat_map([[1, 1, 0], [-1, 1, 1]]).paths == (
        ("n8", "M0 1h1"),
        ("p8", "M0 0h2M1 1h2"),
    )
    values = np.random.default_rng(0).normal(size=(9, 50))
    drawn = charts.heat_map(values).paths
    strokes = [int(run) for _, path in drawn for run in re.findall(r"h(\d+)", path)]
    assert sum(strokes) == np.count_nonzero(charts.levels(values, 4))


def test_histogram_counts_everything_and_splits_at_zero():
    scores = np.array([-2.0, -1.0, -1e-9, 0.5, 3.0, np.nan])
    drawing = charts.histogram(scores, bins=10)
    counted = [(negative, int(label.split()[0])) for *_, negative, label in drawing.bars]
    assert sum(n for _, n in counted) == 5
    assert sum(n for negative, n in counted if negative) == 3
    assert charts.histogram([1.0, 1.0]) is charts.histogram([]) is None


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e7])
def test_charts_stay_inside_their_frame(scale):
    scores = np.random.default_rng(0).standard_t(2.5, size=5000) * scale
    drawing = charts.tail(scores)
    numbers = [float(v) for v in re.findall(r"[\d.]+(?=h0| )", drawing.points)]
    numbers += [*drawing.line, *(t.at for t in drawing.x + drawing.y)]
    assert len(drawing.x) > 1
    assert 0 <= min(numbers) <= max(numbers) <= charts.WIDTH
    assert 2 <= len(charts.histogram(scores).x) <= 6


@pytest.mark.parametrize("scores", [[], [1.0], [-1.0, 0.0], [1e-9, 1.0], [2.0, 2.0]])
def test_no_tail_to_draw(scores):
    assert charts.tail(scores) is None


def test_same_input_same_bytes_one_file(tmp_path, html):
    path = report.write(tmp_path / "new" / "report.html", facts(), results())
    assert path.read_text(encoding="utf-8") == html
    assert report.write(path, facts(), ()) == path  # replaced, and no query at all
    assert "No queries." in path.read_text(encoding="utf-8")
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_a_large_report_stays_below_ten_megabytes():
    rng = np.random.default_rng(0)
    words = tuple(f" word{i % 100}" for i in range(512))
    matrix = rng.normal(size=(12, 512))  # no structure: the least to merge
    ranked = [
        RankedSequence(i, 1.0, words, matrix.sum(0), matrix.sum(1), matrix) for i in range(20)
    ]
    query = QueryResult("q", words[:9], words[9:12], -1.0, tuple(ranked))
    assert 8 * len(report.render(facts(), [query])) < 10e6


def test_disagreement_and_missing_jinja_are_refused(monkeypatch):
    fewer = RunFacts("m", LAYERS[:3], (), "none", None, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="12 layer scores for 3 layers"):
        report.render(fewer, results())
    none = RunFacts("m", LAYERS, (), "none", None, 1, 1, 0, 0)
    with pytest.raises(ValueError, match="train_size is 0"):
        report.render(none, ())
    monkeypatch.setattr(extras, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"pip install 'ekfac-fast\[report\]'"):
        report.render(facts(), ())


def test_a_terminal_is_told_nothing_but_text():
    """Control sequences of a corpus or a path do not reach it; brackets are no markup."""
    assert harmless("a\x1b[31mb") == "a‹U+001B›[31mb"
    assert harmless("one\ntwo\ttabs\r") == "one\ntwo⇥\ttabs‹U+000D›"
    assert harmless("[bold]x[/bold] \u202e \ufe0f \u034f") == (
        "[bold]x[/bold] ‹U+202E› ‹U+FE0F› ‹U+034F›"
    )
