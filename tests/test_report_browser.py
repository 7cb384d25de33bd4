"""The report in a real browser: offline, by keyboard, on a phone, light and dark."""

import shutil

import pytest
from test_report import facts, results

from ekfac_fast import report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt install it")

ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
PHONE = {"width": 375, "height": 812}
DESKTOP = {"width": 1280, "height": 900}

# The lowest contrast (WCAG 2.1) of any visible text against what lies behind it, and the text.
CONTRAST = """() => {
  const parse = (colour) => {
    const [r, g, b, a] = colour.match(/[\\d.]+/g).map(Number);
    return [r, g, b, a ?? 1];
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((v, i) => v * a + below[i] * (1 - a));
  const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = (c) => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const behind = (element) => {
    const below = element.parentElement ? behind(element.parentElement) : [255, 255, 255];
    return over(parse(getComputedStyle(element).backgroundColor), below);
  };
  let worst = [99, "", 0];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || element.closest("script, title")) continue;
    const style = getComputedStyle(element);
    const back = behind(element);
    const ink = over(parse(element.closest("svg") ? style.fill : style.color), back);
    const [high, low] = [luminance(ink), luminance(back)].sort((a, b) => b - a);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < worst[0]) worst = [ratio, texts.currentNode.data, worst[2]];
    worst[2] += 1;
  }
  return worst;
}"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    return report.write(path, facts(), results()).as_uri()


@pytest.fixture
def visit(browser, url):
    """A page of the report; afterwards: nothing complained, nothing was asked of any server."""
    contexts, complaints, requests = [], [], []

    def visit(**options):
        contexts.append(browser.new_context(**{"viewport": DESKTOP} | options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(url)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert complaints == []
    assert {request for request in requests if not request.startswith("data:")} == {url}


def open_all(page) -> None:
    page.evaluate("document.querySelectorAll('details').forEach((part) => part.open = true)")


def focused(page) -> str:
    return page.evaluate("document.activeElement.textContent.trim()")


def test_tab_and_arrows_move_between_queries(visit):
    page = visit()
    page.keyboard.press("Tab")
    assert focused(page) == "Skip to the results"
    page.keyboard.press("Tab")
    assert focused(page) == "<i>first</i>"
    page.keyboard.press("ArrowDown")
    assert focused(page) == "second"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    assert focused(page) == "<i>first</i>"  # stays at the end of the list
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.url.endswith("#q2")


def test_details_open_and_sequences_follow_by_keyboard(visit):
    page = visit()
    page.locator("summary").first.focus()
    first = page.evaluate_handle("document.activeElement.parentElement")
    assert not first.evaluate("(details) => details.open")
    page.keyboard.press("Enter")
    assert first.evaluate("(details) => details.open")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.closest('article').ariaLabel") == "Rank 2"
    for _ in range(4):
        page.keyboard.press("ArrowDown")
    assert focused(page) == "Ranks 6 to 8"  # and not into what is closed
    page.keyboard.press("ArrowDown")
    assert focused(page).startswith("Sequences that lower it most")


def test_arrows_and_pointer_show_the_value_of_a_token(visit):
    page = visit()
    block = page.locator(".t").first  # of those in view: the excerpt of rank 1
    readout = page.locator(".t + output").first
    block.focus()
    page.keyboard.press("ArrowRight")
    tokens = block.locator("b")
    assert tokens.nth(0).get_attribute("title") in readout.inner_text()
    page.keyboard.press("ArrowRight")
    assert tokens.nth(1).get_attribute("title") in readout.inner_text()
    assert tokens.nth(2).text_content().strip() in readout.text_content()  # what it predicts
    page.keyboard.press("ArrowLeft")
    assert tokens.nth(0).evaluate("(token) => token.className").endswith("here")
    tokens.nth(5).hover()
    assert tokens.nth(5).get_attribute("title") in readout.inner_text()


def test_it_reads_without_javascript(visit):
    page = visit(java_script_enabled=False)
    assert page.locator("article").count() == 11
    page.locator("summary").first.click()
    assert page.locator(".matrix svg.map").first.is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_has_no_sideways_scroll(visit, scheme, tmp_path):
    page = visit(viewport=PHONE, color_scheme=scheme, has_touch=True)
    for state in ("closed", "open"):
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, state
        open_all(page)
    page.screenshot(path=tmp_path / f"phone-{scheme}.png", full_page=True)
    assert (tmp_path / f"phone-{scheme}.png").stat().st_size > 10_000


def test_layer_rows_keep_their_height(visit):
    page = visit(viewport=PHONE)
    open_all(page)
    heights = page.locator(".matrix").evaluate_all("all => all.map((one) => one.clientHeight)")
    assert max(heights) < 250


def test_both_schemes_have_enough_contrast(visit, tmp_path):
    papers = set()
    for scheme in ("light", "dark"):
        page = visit(color_scheme=scheme)
        open_all(page)
        papers.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        ratio, words, count = page.evaluate(CONTRAST)
        assert count > 1000
        assert ratio >= 4.5, f"{scheme}: {ratio:.2f} at {words!r}"
        page.screenshot(path=tmp_path / f"desktop-{scheme}.png")
        assert (tmp_path / f"desktop-{scheme}.png").stat().st_size > 10_000
    assert len(papers) == 2
