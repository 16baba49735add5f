"""The documentation: every public name has its place, every link leads somewhere, and the site builds, offline."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from support.places import ROOT
from support.waiting import PATIENCE

PUBLIC = ("peft_tsd", *(f"peft_tsd.{name}" for name in ("directions", "explore", "tasks", "compare", "diffusion")))

API = ROOT / "docs" / "api"

READ = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md"), *ROOT.glob("benchmarks/*.md")]
)


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", without_code(path.read_text(encoding="utf-8")), flags=re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        number = 0
        while (name := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(name)
    return found


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference(module):
    page = API / f"{module.rpartition('.')[2]}.md"
    shown = re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(shown) == sorted(f"{module}.{name}" for name in importlib.import_module(module).__all__)


@pytest.mark.parametrize("path", READ, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    text = without_code(path.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text)) + re.findall(
        r'(?:src|href)="([^"]+)"', text
    )
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (path.parent / place).resolve() if place else path
        assert target.exists(), f"{link}: there is no {target}"
        if anchor:
            assert anchor in anchors(target), f"{link}: {sorted(anchors(target))}"


@pytest.mark.parametrize("path", READ, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_that_are_named_exist(path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(
        r"\b((?:tests|benchmarks|examples|docs|src|peft_tsd)/[\w./-]+\.(?:py|ipynb|md|html|yaml))\b", text
    ):
        assert (ROOT / name).exists() or (ROOT / "src" / name).exists(), name


def test_every_page_of_the_folders_has_its_place_in_the_house():
    code = (ROOT / "docs" / "code.md").read_text(encoding="utf-8")
    rooms = {path.name for path in (ROOT / "src" / "peft_tsd").iterdir() if path.is_dir() and path.name[0] != "_"}
    drawn = re.search(r"^```text\n(.*?)^```", code, flags=re.MULTILINE | re.DOTALL)
    assert drawn is not None
    assert rooms <= set(re.findall(r"[\w/]+", drawn[1]))
    for name in re.findall(r"`(\w+/\w+\.py)`", code):
        assert (ROOT / "src" / "peft_tsd" / name).is_file() or (ROOT / name).is_file(), name


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="the site needs the extra docs")
    out = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.long
def test_the_site_builds_without_a_warning(site):
    assert (site / "index.html").is_file()
    shown = (site / "api" / "peft_tsd.html").read_text(encoding="utf-8")
    assert 'id="peft_tsd.TsdConfig"' in shown
    # Its example, dedented and coloured, and a type without its quotes and default.
    assert "```" not in shown
    assert "defaults to" not in re.sub(r"<p>.*?</p>", "", shown, flags=re.DOTALL)


@pytest.mark.long
def test_the_site_asks_nothing_of_any_network(site, browser):
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *args: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = f"http://127.0.0.1:{server.server_port}/"
    asked: list[str] = []
    problems: list[str] = []
    try:
        for width in (1400, 390):
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.set_default_timeout(1000 * PATIENCE)
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: problems.append(str(error)))
            for name in ("index.html", "api/peft_tsd.html", "results.html", "examples/explore.ipynb.html"):
                page.goto(home + name, wait_until="load")
                page.wait_for_timeout(200)
                wider = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
                assert wider <= 0, f"{name} is {wider} px too wide for {width} px"
            page.close()
    finally:
        server.shutdown()
        server.server_close()
    assert problems == []
    assert [url for url in asked if not url.startswith((home, "data:", "blob:"))] == []
