"""The site in headless Chromium: ``python tests/browser_check.py build/docs build/screenshots``.

Every page is opened at 400 and at 1,400 pixels. Wrong are links and anchors that lead nowhere, whatever the console
calls an error, requests that fail or leave the site (it has to work without network), and pages wider than the window.
Links to other sites are counted, not followed. Without Chromium the check says so and ends with 0; ``CHROMIUM`` names
one.
"""

import functools
import http.server
import os
import shutil
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

WIDTHS = {400: 860, 1400: 1000}
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SHOWN = (
    "index",
    "api",
    "api/sevo_optax.sevo",
    "api/sevo_optax.graph.cooccurrence",
    "architecture",
    "benchmarks",
    "guides/which_chain",
    "guides/your_model",
    "notebooks/02_what_sevo_does",
    "results",
    "theory",
)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and prints nothing."""

    def log_message(self, *args):
        """Says nothing."""


def watch(page, root: str, wrong: list[str]) -> None:
    """Notes errors and strange requests of a page as they come."""

    def request(request):
        if not request.url.startswith((root, "data:", "blob:")):
            wrong.append(f"{page.url}: asks another site for {request.url}")

    page.on("console", lambda m: m.type == "error" and wrong.append(f"{page.url}: console: {m.text}"))
    page.on("pageerror", lambda error: wrong.append(f"{page.url}: {error}"))
    page.on("requestfailed", lambda request: wrong.append(f"{page.url}: {request.url}: {request.failure}"))
    page.on("request", request)


def check(site: Path, screenshots: Path, chromium: str) -> list[str]:
    """Opens every page; returns what is wrong, and leaves screenshots of some."""
    from playwright.sync_api import sync_playwright

    pages = sorted(str(path.relative_to(site)) for path in site.rglob("*.html"))
    if not pages:
        return [f"{site} holds no pages; make docs builds them"]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://127.0.0.1:{server.server_port}/"
    wrong: list[str] = []
    anchors: dict[str, set[str]] = {}
    links: set[tuple[str, str]] = set()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for width, height in WIDTHS.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            watch(page, root, wrong)
            for name in pages:
                here = f"{name} at {width}"
                page.goto(root + name, wait_until="load")
                page.evaluate("() => window.MathJax?.startup?.promise")
                wide = page.evaluate("() => document.documentElement.scrollWidth")
                if wide > width:
                    wrong.append(f"{here}: is {wide} pixels wide")
                for broken in page.eval_on_selector_all(
                    "img", "all => all.filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
                ):
                    wrong.append(f"{here}: image {broken} does not show")
                if name.removesuffix(".html") in SHOWN:
                    target = screenshots / f"{name.removesuffix('.html').replace('/', '-')}-{width}.png"
                    page.screenshot(path=target, full_page=True)
                anchors[name] = set(page.eval_on_selector_all("[id]", "all => all.map(e => e.id)"))
                links |= {(name, href) for href in page.eval_on_selector_all("a[href]", "all => all.map(a => a.href)")}
            page.close()
        browser.close()
    server.shutdown()

    outside = {urldefrag(href).url for _, href in links if not href.startswith(root)}
    for name, href in sorted(links):
        if href.startswith(root):
            path, fragment = urldefrag(urljoin(root, href))
            path = unquote(path.removeprefix(root)) or "index.html"
            if not (site / path).is_file():
                wrong.append(f"{name}: {path} is not there")
            elif fragment and path in anchors and unquote(fragment) not in anchors[path]:
                wrong.append(f"{name}: {path} has no #{unquote(fragment)}")
    print(f"{len(pages)} pages, {len(links)} links, {len(outside)} of them to other sites, not followed")
    return wrong


def find_chromium() -> str | None:
    """The path of a Chromium; None: there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUMS)), None)


def main(site: str, screenshots: str) -> int:
    """Prints what is wrong; returns 1 if anything is."""
    chromium = find_chromium()
    if not chromium:
        print("skipped: there is no Chromium here; Debian's package is called chromium, or set CHROMIUM to its path")
        return 0
    Path(screenshots).mkdir(parents=True, exist_ok=True)
    wrong = check(Path(site).resolve(), Path(screenshots), chromium)
    print(*sorted(set(wrong)), sep="\n", end="\n" if wrong else "")
    print(f"screenshots: {screenshots}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
