"""The hub offline, the same draws on every machine and in any order, an adapter of every method, and a browser."""

import os
import shutil
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from hypothesis import settings
from peft import get_peft_model

from support import tiny
from support.waiting import PATIENCE

torch.set_num_threads(1)  # for matrices of this size more threads only wait for each other

# The same examples on every machine, however slow; `--hypothesis-profile=search` looks for new ones.
settings.register_profile("default", deadline=None, max_examples=40, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=1000)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def same_start():
    """A test's draws without a seed of its own, and its Accelerator, do not depend on the tests before it."""
    torch.manual_seed(20240902)
    AcceleratorState._reset_state()
    GradientState._reset_state()


METHODS = [
    pytest.param({"method": "lora-dash"}, id="dash"),
    pytest.param({"method": "lora-init", "init_reading": "svd", "keep_prelaunch": False}, id="init-svd"),
    pytest.param({"method": "lora-init", "init_reading": "orthonormal"}, id="init-orthonormal"),
    pytest.param({"method": "lora-tsd", "init_reading": "svd"}, id="tsd-svd"),
    pytest.param({"method": "lora-tsd", "init_reading": "orthonormal", "keep_prelaunch": False}, id="tsd-orthonormal"),
]


@pytest.fixture(params=METHODS)
def method(request) -> dict:
    return request.param


@pytest.fixture
def trained(method):
    """A tiny Llama with an adapter of each method, trained over its transition."""
    model = get_peft_model(tiny.llama(), tiny.config(**method))
    tiny.train(model, 6)
    return model.eval()


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if path is None:
        pytest.skip("no Chromium or Chrome on PATH (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        # Chromium refuses its sandbox to root, who runs the tests in a container.
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=1000 * PATIENCE)
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser, tmp_path):
    """Opens a report; afterwards, checks that nothing was asked of anyone and nothing went wrong."""
    opened = []

    def open_(text, width=1280, scheme="light"):
        file = tmp_path / "report.html"
        file.write_text(text, "utf-8")
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce")
        page.set_default_timeout(1000 * PATIENCE)
        seen = SimpleNamespace(page=page, requests=[], problems=[], file=file.as_uri())
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("pageerror", lambda error: seen.problems.append(str(error)))
        page.on("console", lambda line: line.type in ("error", "warning") and seen.problems.append(line.text))
        opened.append(seen)
        page.goto(seen.file)
        return page

    yield open_
    for seen in opened:
        seen.page.wait_for_timeout(50)
        assert seen.problems == []
        assert {url for url in seen.requests if not url.startswith(("data:", "blob:"))} == {seen.file}
        seen.page.close()
