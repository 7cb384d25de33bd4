"""The three colourings of a sequence, and its attention heads: on the page, and in a browser."""

import re
from dataclasses import replace

import numpy as np
import pytest
from test_report import LAYERS, Page, facts, results, sequence, shown
from test_report_browser import CHROMIUM, CONTRAST, PHONE, browser, focused, open_all  # noqa: F401

from ekfac_fast import report
from ekfac_fast.errors import ArgumentError
from ekfac_fast.report.text import brief
from ekfac_fast.report.turns import turns
from ekfac_fast.stages.scores import Heads

HEADS = (
    Heads("<b>.0.attn.q", "q", np.array([1.0, 2, 3, 4])),
    Heads("<b>.0.attn.k", "k", np.array([8.0, 0])),
    Heads("<b>.1.attn.o", "o", np.array([0.0, 0, 0, -5])),
)


def attributed(seed):
    rng = np.random.default_rng(seed)
    one = sequence(seed, 40, seed)
    return replace(one, per_target=rng.normal(size=40), per_input=rng.normal(size=40), heads=HEADS)


def queries():
    first = results()[0]
    return replace(
        first, ranked=(attributed(1), attributed(2)), bottom=(attributed(3),)
    ), *results()


@pytest.fixture(scope="module")
def html():
    return report.render(facts(), queries())


def test_every_token_has_its_three_numbers(html):
    page, one = Page(html), attributed(1)
    assert page.tokens[:40] == shown(one.tokens)
    for t, title in enumerate(page.values[:40]):
        assert title == " | ".join(brief(float(x[t]) / 1000) for x in one.kinds)
    strongest = int(np.abs(one.per_target).argmax())
    classes = [dict([a]) for a in page.attributes if a[0] == "class"]
    sign = "op8" if one.per_target[strongest] > 0 else "on8"
    assert any(sign in x["class"].split() for x in classes)


def test_a_switch_for_each_sequence_and_a_sentence_for_each_kind(html):
    page = Page(html)
    names = [x for key, x in page.attributes if key == "name" and re.fullmatch(r"c1[tb]\d", x)]
    assert len(names) == 9 == 3 * len({*names})
    for words in ("where the model", "the token as a target", "later ones are predicted from"):
        assert words in html
    plain = report.render(facts(), results())
    assert "Colours by" not in plain
    assert "three ways" not in plain


def test_heads_by_layer_sum_to_what_their_matrices_have(html):
    names, values = report.heads_by_layer(attributed(1))
    assert names == ["1.attn", "0.attn"]
    np.testing.assert_allclose(values, [[0, 0, 0, -5], [1 + 4, 2 + 4, 3, 4]])
    assert html.count("Attention layers × heads") == 3


def test_a_reason_is_told_and_shapes_are_checked():
    page = report.render(replace(facts(), unattributed="<b>no derivative"), results())
    assert "Nothing is said of output and input tokens: &lt;b&gt;no derivative." in page
    with pytest.raises(ArgumentError, match=r"40 tokens, but per_target has shape \(39,\)"):
        replace(attributed(1), per_target=np.zeros(39))


def test_a_large_report_with_all_kinds_stays_below_twelve_megabytes():
    rng = np.random.default_rng(0)
    words = tuple(f" word{i % 100}" for i in range(512))
    matrix = rng.normal(size=(12, 512))
    one = replace(
        sequence(0, 12, 0), tokens=words, per_token=matrix.sum(0), per_layer=matrix.sum(1),
        per_layer_token=matrix, per_target=rng.normal(size=512), per_input=rng.normal(size=512),
    )  # fmt: skip
    query = replace(results()[0], ranked=(one,) * 20, bottom=())
    assert len(LAYERS) == 12
    size = 8 * len(report.render(facts(), [query]))
    assert size < 12e6, size


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt install it")
@pytest.mark.parametrize("script", [True, False])
def test_the_switch_changes_colours_by_mouse_and_keyboard(browser, tmp_path, html, script):  # noqa: F811
    path = tmp_path / "report.html"
    path.write_text(html, encoding="utf-8")
    context = browser.new_context(java_script_enabled=script, viewport=PHONE)
    page = context.new_page()
    page.goto(path.as_uri())
    passage, one = page.locator("article").first, attributed(1)
    tokens = passage.locator(".t").first.locator("b")

    def background(t):
        return tokens.nth(t).evaluate("e => getComputedStyle(e).backgroundColor")

    for kind, values in zip(("position", "output token", "input token"), one.kinds, strict=True):
        passage.get_by_label(kind).check()
        strong, weak = (int(at) for at in np.abs(values).argsort()[[-1, 0]])
        assert background(strong).endswith("0.8)")
        assert background(weak) == "rgba(0, 0, 0, 0)"
        other = page.locator("article").nth(1).get_by_label("position")
        assert other.is_checked()
    passage.get_by_label("input token").focus()
    page.keyboard.press("ArrowLeft")
    assert passage.get_by_label("output token").is_checked()
    if script:
        tokens.nth(3).hover()
        told = passage.locator("output").first.inner_text()
        assert all(brief(float(x[3]) / 1000) in told for x in one.kinds)
        open_all(page)
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        assert page.evaluate(CONTRAST)[0] >= 4.5
    context.close()


def test_turns_are_found_by_what_is_said():
    said = [("system", "Be brief."), ("user", "Wer? "), ("assistant", "Zo\u00eb"), ("user", "Be")]
    record = {"messages": [{"role": role, "content": text} for role, text in said]}
    text = b"<s>[system]\nBe brief.\n[user]\nWer?\n[assistant]\nZo\xc3\xab\n[user]\nBe</s>"
    # Tokens of three bytes each, across the bytes of a letter and the borders of turns.
    tokens = [text[i : i + 3].decode("utf-8", "surrogateescape") for i in range(0, len(text), 3)]
    found = turns(record, tokens)
    assert [role for _, role in found] == [role for role, _ in said]
    for (first, _), (_, words) in zip(found, said, strict=True):
        place = text.rindex(b"Be</") if words == "Be" else text.index(words.strip().encode())
        assert first == place // 3
    # What the template writes otherwise, or the end that was cut off, is not marked.
    assert turns(record, tokens[:8]) == found[:1]
    halves = {"prompt": record["messages"][:2], "completion": record["messages"][2:]}
    assert turns(halves, tokens) == found
    assert turns({"text": "Be brief."}, tokens) == turns(None, tokens) == ()


def grouped():
    query, *_ = results()
    ranked = (
        replace(attributed(1), group="<poems>", turns=((0, "user"), (7, "<i>assistant"))),
        replace(attributed(2), group="manuals"),
    )
    return (replace(query, ranked=ranked, bottom=()),)


def test_turns_and_groups_are_there_and_escaped():
    html = report.render(replace(facts(), grouped_by="<set>"), grouped())
    page = Page(html)
    everything = "".join(page.text)
    for words in ("Show, by <set>", "<poems>", "manuals", "<i>assistant"):
        assert words in everything
    assert html.count("<em>user</em>") == html.count("<em>&lt;i&gt;assistant</em>") == 1
    assert page.ids.count("g0") == page.ids.count("g1") == 1
    many = [replace(attributed(i), group=f"set {i}") for i in range(14)]
    one = replace(grouped()[0], ranked=tuple(many))
    page = Page(report.render(replace(facts(), grouped_by="set"), [one]))
    assert "g12" in page.ids
    assert "others" in "".join(page.text)
    assert sum(key == "class" and value == "g12" for key, value in page.attributes) == 2


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt install it")
def test_a_group_can_be_hidden_without_javascript(browser, tmp_path):  # noqa: F811
    html = report.render(replace(facts(), grouped_by="set"), grouped())
    path = tmp_path / "report.html"
    path.write_text(html, encoding="utf-8")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    articles = page.locator("article")
    assert articles.nth(0).is_visible()
    page.get_by_label("<poems>").uncheck()
    assert not articles.nth(0).is_visible()
    assert articles.nth(1).is_visible()
    context.close()
