"""The report and JupyterLab in a real browser: a headless Chromium, driven by Playwright.

Every page of the report is opened as on a phone and on a desktop, light and dark. ``pytest -m slow`` also
starts ``make lab`` and runs all five notebooks there, with their own defaults (minutes).
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import assert_clean_progress

from fma_nb.commands.notebooks import NOTEBOOKS
from fma_nb.project import project_root
from fma_nb.raw.mini import make_fma_mini

pytestmark = pytest.mark.browser

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--autoplay-policy=no-user-gesture-required",
]
SYSTEM_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PAGES = ("index", *NOTEBOOKS)
PHONE, DESKTOP = 390, 1280
LOCAL = ("file:", "data:", "blob:")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Playwright's own Chromium, else the system's."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with api.sync_playwright() as playwright:
        for path in (None, *filter(None, map(shutil.which, SYSTEM_BROWSERS))):
            with suppress(api.Error):
                browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
                break
        else:
            pytest.skip("there is no Chromium: 'playwright install chromium' brings one")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(whole_run: Any) -> Path:
    """The report of a run of all five notebooks."""
    assert whole_run.done.returncode == 0, whole_run.done.stderr
    return Path(whole_run.outputs) / "tiny" / "report"


@contextmanager
def opened(
    browser: Any, path: Path, width: int = DESKTOP, scheme: str = "light"
) -> Iterator[tuple[Any, list[str]]]:
    """Open a file as a double click does; give the page, and what the browser complains about meanwhile."""
    phone = width < 600
    viewport = {"width": width, "height": 844 if phone else 900}
    context = browser.new_context(viewport=viewport, color_scheme=scheme, is_mobile=phone, has_touch=phone)
    context.route(re.compile(f"^(?!{'|'.join(LOCAL)})"), lambda route: route.abort())
    page, complaints = context.new_page(), []
    page.on("request", lambda r: r.url.startswith(LOCAL) or complaints.append(f"fetches {r.url}"))
    page.on("requestfailed", lambda r: complaints.append(f"cannot load {r.url[:200]}"))
    page.on("pageerror", lambda error: complaints.append(f"script error: {error}"))
    page.on("console", lambda m: m.type in ("error", "warning") and complaints.append(f"console: {m.text}"))
    page.goto(path.as_uri())
    yield page, complaints
    context.close()


IMAGES = """async () => {
  const problems = []
  for (const image of document.images) {
    const shown = await image.decode().then(() => image.naturalWidth > 0, () => false)
    if (!shown) problems.push(`image does not load: ${image.src.slice(0, 100)}`)
    const alt = image.alt.trim()
    if (alt.length < 10 || alt.startsWith("No description")) problems.push(`image without a text: "${alt}"`)
  }
  return problems
}"""

# Nothing may be wider than the window, and nothing cut off: what is wider than its box has to scroll inside.
WIDTHS = """() => {
  const problems = [], wide = document.documentElement.scrollWidth
  if (wide > window.screen.width) problems.push(`page scrolls sideways: ${wide} pixels`)
  for (const box of document.querySelectorAll("body, body *")) {
    const cuts = /hidden|clip/.test(getComputedStyle(box).overflowX) && box.scrollWidth > box.clientWidth + 1
    if (cuts) problems.push(`cut off: ${box.outerHTML.slice(0, 80)}`)
  }
  return problems
}"""

# WCAG 2.1, AA (1.4.3): 4.5 to 1, large or large bold text 3 to 1. And no text below 12 pixels. A mark without
# letters, as the square in a genre's colour, is no text.
TEXTS = """() => {
  const rgba = text => {
    const [r, g, b, a] = text.match(/[\\d.]+/g).map(Number)
    return [r, g, b, a ?? 1]
  }
  const over = (top, below) => [0, 1, 2].map(i => top[3] * top[i] + (1 - top[3]) * below[i]).concat(1)
  const background = element => {
    const own = rgba(getComputedStyle(element).backgroundColor)
    if (own[3] === 1) return own
    return over(own, element.parentElement ? background(element.parentElement) : [255, 255, 255, 1])
  }
  const luminance = color => {
    const linear = c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4
    const [r, g, b] = color.map(c => linear(c / 255))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
  }
  const problems = new Set()
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  while (texts.nextNode()) {
    const text = texts.currentNode.textContent.trim(), element = texts.currentNode.parentElement
    if (!/[\\p{L}\\p{N}]/u.test(text) || !element.checkVisibility()) continue
    if (element.closest("script, style")) continue
    const style = getComputedStyle(element), size = parseFloat(style.fontSize)
    const behind = background(element)
    const pair = [over(rgba(style.webkitTextFillColor), behind), behind].map(luminance)
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05)
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700)
    if (ratio < (large ? 3 : 4.5)) problems.add(`contrast ${ratio.toFixed(2)}: ${text.slice(0, 40)}`)
    if (size < 12) problems.add(`text of ${size} pixels: ${text.slice(0, 40)}`)
  }
  return [...problems]
}"""

# On a phone a figure keeps its size and scrolls: shrunk to 358 pixels its labels would be 6 pixels high.
# Printed lines wrap: what stands to the right of the window is not read.
PRINTS = """() => {
  const problems = []
  for (const image of screen.width < 600 ? document.images : []) {
    const shrunk = image.width < 0.95 * (image.getAttribute("width") || image.naturalWidth)
    if (shrunk) problems.push(`figure shrunk to ${image.width} pixels`)
  }
  for (const text of document.querySelectorAll(".output_area pre"))
    if (text.scrollWidth > text.clientWidth + 1) problems.push(`cut: ${text.textContent.slice(0, 40)}`)
  return problems
}"""

HEADINGS = """() => {
  const problems = []
  let last = 0
  for (const heading of document.querySelectorAll("h1, h2, h3, h4, h5, h6")) {
    const level = Number(heading.tagName[1])
    const fits = last ? level > 1 && level <= last + 1 : level === 1
    if (!fits) problems.push(`heading h${level} after h${last}: ${heading.textContent}`)
    last = level
  }
  return last ? problems : ["no heading"]
}"""

PLAYERS = """() => Promise.all([...document.querySelectorAll("audio")].map(async player => {
  player.volume = 0
  const heard = new Promise(resolve => player.ontimeupdate = () => player.currentTime > 0 && resolve(""))
  const late = new Promise(resolve => setTimeout(resolve, 10000, "player stands still"))
  const trouble = await player.play().then(() => Promise.race([heard, late]), error => `player: ${error}`)
  player.pause()
  return trouble || (player.duration > 1 ? "" : `player of ${player.duration} s`)
}))"""


def dead_links(page: Any, path: Path) -> list[str]:
    """Find links that lead nowhere: to a file that is missing, or a place that the page does not have."""
    problems = []
    for href in page.eval_on_selector_all("a[href]", "links => links.map(link => link.getAttribute('href'))"):
        if href.startswith("#"):
            alive = page.evaluate("id => Boolean(document.getElementById(id))", href[1:])
        else:
            alive = "://" in href or (path.parent / href.split("#")[0]).exists()
        problems += [] if alive else [f"dead link: {href}"]
    return problems


def problems_of(page: Any, complaints: list[str], path: Path) -> list[str]:
    """All that is wrong with an open page, in words."""
    found = [
        problem for script in (IMAGES, WIDTHS, TEXTS, PRINTS, HEADINGS) for problem in page.evaluate(script)
    ]
    return [*found, *filter(None, page.evaluate(PLAYERS)), *dead_links(page, path), *complaints]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("name", PAGES)
def test_page_is_whole_readable_and_offline(
    name: str, width: int, scheme: str, report: Path, chromium: Any
) -> None:
    path = report / f"{name}.html"
    with opened(chromium, path, width, scheme) as (page, complaints):
        assert problems_of(page, complaints, path) == []
        grey = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
        assert (int(grey) < 64) == (scheme == "dark")


def test_the_report_leads_to_every_notebook_and_back(report: Path, chromium: Any) -> None:
    with opened(chromium, report / "index.html") as (page, complaints):
        for name in NOTEBOOKS:
            page.locator(f"a[href='{name}.html']").click()
            assert page.locator("h1").inner_text().startswith(name[:2])
            page.get_by_role("link", name="The run's report").click()
        assert page.locator("h1").inner_text().endswith("?")
        assert not complaints


def test_the_report_holds_results_figures_configuration_and_versions(report: Path, chromium: Any) -> None:
    with opened(chromium, report / "index.html") as (page, _):
        table = page.get_by_role("table").first.inner_text()
        assert all(model in table for model in ("baseline CNN", "CRNN", "CRNN without GRU"))
        assert page.locator("figure img").count() >= 9
        text = page.locator("main").inner_text()
        verdict = page.locator(".verdict").inner_text()
        assert re.search(r"(is ahead of|is behind|cannot be told apart from) the baseline CNN", verdict)
        assert len(re.findall(r"[+−]\d\.\d{3} \[.+?, .+?\]", verdict)) == 3
        for fact in ("Synthetic data", "fingerprint", "torch version", "label_smoothing", "batch_size"):
            assert fact in text


@pytest.mark.parametrize(("name", "at_least"), [("01_eda", 10), ("02_spectrograms", 3)])
def test_there_is_something_to_hear(name: str, at_least: int, report: Path, chromium: Any) -> None:
    with opened(chromium, report / f"{name}.html") as (page, _):
        assert page.locator("audio[controls]").count() >= at_least


PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
DAMAGES = {
    "image from outside": (
        "<img src='https://example.org/a.png' alt='A picture'>",
        "fetches https://example",
    ),
    "script from outside": ("<script src='https://example.org/a.js'></script>", "fetches https://example"),
    "missing image": ("<img src='missing.png' alt='A picture'>", "image does not load: file"),
    "damaged image": ("<img src='data:image/png;base64,AAAA' alt='A picture'>", "image does not load: data"),
    "no alternative text": (f"<img src='{PIXEL}'>", "image without a text"),
    "wide table": (f"<table><tr><td>{'wide' * 400}</td></tr></table>", "page scrolls sideways"),
    "cut text": (f"<pre style='overflow: hidden'>{'cut' * 400}</pre>", "cut off"),
    "pale text": ("<p style='color: #929292'>pale on white</p>", "contrast 3."),
    "tiny text": ("<p style='font-size: 9px'>small print</p>", "text of 9 pixels"),
    "skipped heading": ("<h2>Deep</h2><h4>Deeper</h4>", "heading h4 after h2"),
    "second title": ("<h1>Another</h1>", "heading h1 after"),
    "dead link": ("<a href='06_more.html'>more</a>", "dead link: 06_more.html"),
    "dead place": ("<a href='#nowhere'>there</a>", "dead link: #nowhere"),
    "console error": ("<script>console.error('oops')</script>", "console: oops"),
    "script error": ("<script>nothing.at.all()</script>", "script error"),
    "broken player": ("<audio controls src='data:audio/mpeg;base64,AAAA'></audio>", "player: "),
}


@pytest.mark.parametrize(("fragment", "expected"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_page_is_noticed(
    fragment: str, expected: str, report: Path, chromium: Any, tmp_path: Path
) -> None:
    shutil.copytree(report, tmp_path / "report")
    path = tmp_path / "report" / "index.html"
    html = path.read_text(encoding="utf-8")
    path.write_text(html.replace("</main>", f"{fragment}</main>"), encoding="utf-8")
    with opened(chromium, path) as (page, complaints):
        assert any(problem.startswith(expected) for problem in problems_of(page, complaints, path))


STARTED_S, EXECUTED_MS = 120, 1_500_000
SERVER_SETTINGS = """
c.ServerApp.open_browser = False
c.ServerApp.allow_root = True
c.ServerApp.port = 0
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """``make lab`` in a copy of the project; gives the copy."""
    root = tmp_path_factory.mktemp("lab")
    for name in ("README.md", "Makefile", "pyproject.toml"):
        shutil.copy(project_root() / name, root)
    for name in ("notebooks", "assets"):
        shutil.copytree(project_root() / name, root / name)
    venv = root / ".venv"
    venv.mkdir()
    (venv / "bin").symlink_to(Path(sys.executable).parent)
    (venv / ".ready").touch()
    (root / "config").mkdir()
    (root / "config" / "jupyter_lab_config.py").write_text(SERVER_SETTINGS)
    environment = {
        "FMA_NB_DATA": str(project_root() / "data"),
        "FMA_NB_OUTPUTS": str(root / "outputs"),
        "JUPYTER_CONFIG_DIR": str(root / "config"),
        "JUPYTER_RUNTIME_DIR": str(root / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(root / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(root / "workspaces"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMA_NB_DATA", environment["FMA_NB_DATA"])
        make_fma_mini()
    with (root / "lab.log").open("w") as log:
        server = subprocess.Popen(
            ["make", "lab"],
            cwd=root,
            env=os.environ | environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + STARTED_S
            while "</html>" not in "".join(p.read_text() for p in (root / "runtime").glob("*-open.html")):
                assert server.poll() is None and time.monotonic() < deadline, (root / "lab.log").read_text()
                time.sleep(0.2)
            yield root
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)


@contextmanager
def start_page(browser: Any, lab: Path) -> Iterator[tuple[Any, list[str]]]:
    """Open JupyterLab as ``make lab`` does; give the page, and what leaves the machine meanwhile."""
    shutil.rmtree(lab / "workspaces", ignore_errors=True)  # the tabs of the test before
    context = browser.new_context(viewport={"width": DESKTOP, "height": 1000})
    page, outside = context.new_page(), []
    local = (*LOCAL, "http://localhost:", "http://127.0.0.1:")
    page.on("request", lambda r: r.url.startswith(local) or outside.append(r.url))
    page.goto(next((lab / "runtime").glob("*-open.html")).as_uri())  # what Jupyter opens the browser with
    page.locator(".jp-MarkdownViewer h1").wait_for(timeout=STARTED_S * 1000)
    yield page, outside
    context.close()


@pytest.mark.slow
def test_make_lab_opens_on_a_start_page(lab: Path, chromium: Any, tmp_path: Path) -> None:
    with start_page(chromium, lab) as (page, outside):
        shown = page.locator(".jp-MarkdownViewer")
        assert shown.locator("h1").inner_text().startswith("fma-nb")
        assert shown.locator("img").first.evaluate("image => image.decode().then(() => image.naturalWidth)")
        assert shown.locator("a", has_text=re.compile(r"^0\d · ")).count() == len(NOTEBOOKS)
        page.screenshot(path=tmp_path / "start.png")
        shown.get_by_role("link", name=re.compile("^01 · ")).first.click()
        page.locator(".jp-Notebook h1").first.wait_for()
        assert not outside and page.locator(".jp-Dialog").count() == 0


# Between two cells the kernel is idle too, but not for long.
IDLE = """() => {
  const {status} = document.querySelector(".jp-Notebook-ExecutionIndicator").dataset
  window.idleSince = status === "idle" ? window.idleSince || Date.now() : 0
  return window.idleSince && Date.now() - window.idleSince > 3000
}"""


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_restart_and_run_all_in_jupyterlab(name: str, lab: Path, chromium: Any, tmp_path: Path) -> None:
    with start_page(chromium, lab) as (page, _):
        link = page.locator(".jp-MarkdownViewer").get_by_role("link", name=re.compile(f"^{name[:2]} · "))
        link.first.click()
        state = page.locator(".jp-Notebook-ExecutionIndicator")
        state.and_(page.locator("[data-status=idle]")).wait_for(timeout=STARTED_S * 1000)
        page.get_by_role("menuitem", name="Kernel", exact=True).click()
        page.get_by_role("menuitem", name="Restart Kernel and Run All Cells").click()
        page.locator(".jp-Dialog .jp-mod-accept").click()
        state.and_(page.locator("[data-status=busy]")).wait_for(timeout=STARTED_S * 1000)
        page.wait_for_function(IDLE, timeout=EXECUTED_MS)
        page.screenshot(path=tmp_path / f"{name}.png")
        page.keyboard.press("Control+s")
        page.locator(".jp-mod-current.jp-mod-dirty").wait_for(state="detached")
    notebook = nbformat.read(lab / "notebooks" / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not [kind for o in outputs for kind in o.get("data", {}) if "widget" in kind]
    assert_clean_progress(notebook)
