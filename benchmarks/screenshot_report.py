"""What does the report of `peft-tsd explore` look like?

    python benchmarks/screenshot_report.py report.html docs/images

Writes `explore-laptop.png` and `explore-dark.png` (1280 px wide) and `explore-phone.png` (390 px, light) with the
system's Chromium or Chrome. Needs `pip install playwright`; `--full` takes the whole page.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

VIEWS = {
    "laptop": ("light", {"width": 1280, "height": 1880}),
    "phone": ("light", {"width": 390, "height": 1500}),
    "dark": ("dark", {"width": 1280, "height": 1880}),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--full", action="store_true", help="the whole page, not its first screens")
    parser.add_argument("--quantity", default="0", help="what the map shows: its place in the selector, from 0")
    args = parser.parse_args()
    browser = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
    if browser is None:
        print("no Chromium or Chrome found on PATH", file=sys.stderr)
        return 1
    args.folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for name, (scheme, viewport) in VIEWS.items():
            page = chromium.new_page(viewport=viewport, color_scheme=scheme, reduced_motion="reduce")
            page.goto(args.report.resolve().as_uri())
            page.select_option("#quantity", args.quantity)
            target = args.folder / f"explore-{name}.png"
            page.screenshot(path=target, full_page=args.full)
            print(target)
            page.close()
        chromium.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
