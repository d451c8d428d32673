"""Open every page of the built site in headless Chromium: links, anchors, console errors and requests to elsewhere.

python docs/check_site.py [--shots FOLDER] [--browser /usr/bin/chromium]

Needs `make docs`, a Chromium, and `pip install playwright`. With `--shots` some pages are saved as pictures.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urldefrag, urlsplit

from playwright.sync_api import Page, Request, sync_playwright

SITE = Path(__file__).parents[1] / "site"

#: Pages of which pictures are made, in a wide window and on a phone.
PICTURED = [
    "api/rho.html",
    "api/solvers.html",
    "index.html",
    "guides/compress.html",
    "guides/size.html",
    "api/compression.html",
    "api/evaluation.html",
    "options.html",
    "bytes.html",
    "results.html",
]
WINDOWS = {"wide": (1400, 1000), "phone": (390, 840)}

#: The links of a page, its elements that can be linked to, and what is wider than the page without a scroll bar.
LINKS = "[...document.querySelectorAll('a[href]')].map(a => a.href)"
ANCHORS = "[...document.querySelectorAll('[id]')].map(e => e.id)"
BROKEN_IMAGES = "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
OVERFLOW = "document.documentElement.scrollWidth > document.documentElement.clientWidth + 1"


class Quiet(SimpleHTTPRequestHandler):
    """A server of files that writes no log."""

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing."""


def serve(folder: Path) -> ThreadingHTTPServer:
    """Serve a folder on a free port of this machine, in a thread."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def check(page: Page, root: str, paths: list[str]) -> list[str]:
    """Visit all pages and return the faults found."""
    faults: list[str] = []
    here = ""

    def on_failure(request: Request) -> None:
        if request.failure != "net::ERR_ABORTED":  # the next page was opened before
            faults.append(f"{here}: no answer from {request.url}")

    def on_request(request: Request) -> None:
        if is_outside(request.url):
            faults.append(f"{here}: asks {request.url}")

    page.on("console", lambda message: faults.append(f"{here}: {message.text}") if message.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(f"{here}: {error}"))
    page.on("requestfailed", on_failure)
    page.on("request", on_request)
    page.on("response", lambda response: faults.append(f"{here}: {response.url}") if response.status >= 400 else None)
    anchors: dict[str, set[str]] = {}
    links: dict[str, list[str]] = {}
    for here in paths:
        page.goto(root + here, wait_until="load")
        anchors[here], links[here] = set(page.evaluate(ANCHORS)), page.evaluate(LINKS)
        faults += [f"{here}: no picture {source}" for source in page.evaluate(BROKEN_IMAGES)]
        if page.evaluate(OVERFLOW):
            faults.append(f"{here}: wider than the window of {page.viewport_size}")
    for here, targets in links.items():
        for target in targets:
            url, anchor = urldefrag(target)
            if not url.startswith(root):
                if is_outside(url):
                    continue  # not asked: readers may be offline
                faults.append(f"{here}: {target}")
                continue
            path = url.removeprefix(root) or "index.html"
            if path not in anchors:
                if not (SITE / path).is_file():
                    faults.append(f"{here}: no page {target}")
            elif anchor and anchor not in anchors[path]:
                faults.append(f"{here}: no anchor {target}")
    return sorted(set(faults))


def is_outside(url: str) -> bool:
    """Return whether a request would leave this machine."""
    parts = urlsplit(url)
    return parts.scheme in ("http", "https", "ws", "wss") and parts.hostname != "127.0.0.1"


def take_pictures(page: Page, root: str, folder: Path, window: str) -> None:
    """Save the upper part of some pages."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in PICTURED:
        page.goto(root + path, wait_until="load")
        page.screenshot(path=folder / f"{path.replace('/', '-').removesuffix('.html')}-{window}.png")


def main() -> int:
    """Check the site; return 1 if there are faults."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--browser", default=shutil.which("chromium") or shutil.which("google-chrome"))
    parser.add_argument("--shots", type=Path, help="folder for pictures")
    options = parser.parse_args()
    if not (SITE / "index.html").is_file():
        parser.error(f"expected the site in {SITE}: run `make docs` first")
    if options.browser is None:
        parser.error("expected a Chromium: install it, or name one with --browser")
    server = serve(SITE)
    root = f"http://127.0.0.1:{server.server_port}/"
    paths = sorted(file.relative_to(SITE).as_posix() for file in SITE.rglob("*.html"))
    faults = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.browser, args=["--no-sandbox"])
        for window, (width, height) in WINDOWS.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            faults += check(page, root, [path for path in paths if path != "404.html"])
            page.close()
            if options.shots:
                page = browser.new_page(viewport={"width": width, "height": height})
                take_pictures(page, root, options.shots, window)
                page.close()
        browser.close()
    server.shutdown()
    sys.stdout.write("\n".join([*faults, f"{len(paths)} pages, {len(faults)} faults"]) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
