"""The comparison of finished runs: its images and similarities are what they say, and its page stands alone."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")

from peft_tsd.cli.main import main
from peft_tsd.diffusion import compare_subjects, load_adapters, load_recipe, train
from peft_tsd.diffusion.comparison_page import render
from peft_tsd.diffusion.images import draw
from peft_tsd.diffusion.pipeline import load_pipeline, locate
from peft_tsd.diffusion.similarity import Clip, Dino
from peft_tsd.errors import RecipeError
from peft_tsd.runs.stopping import Interrupted
from support import tiny_diffusion

HOSTILE = 'a <script>alert(1)</script> of {} & "quotes"'


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two finished runs on one subject and one on another, and the models that measure them."""
    folder = tmp_path_factory.mktemp("comparison")
    tiny_diffusion.save("sd15", folder / "sd15")
    tiny_diffusion.photos(folder / "photos")
    tiny_diffusion.photos(folder / "others", num=2)
    for name, method, photos in (
        ("one", "lora-tsd", "photos"),
        ("two", "lora", "photos"),
        ("three", "lora", "others"),
    ):
        recipe = tiny_diffusion.write_recipe(
            folder,
            data={"folder": str(folder / photos)},
            method=method,
            optimizer={"learning_rate": 0.05},
            validation={"every": None},
            output=str(folder / name),
        )
        train(load_recipe(str(recipe)))
    tiny_diffusion.save_clip(folder / "clip")
    tiny_diffusion.save_dino(folder / "dino")
    return folder


@pytest.fixture(scope="module")
def comparison(place):
    return compare_subjects(
        [place / "one", place / "two", place / "three"],
        place / "out",
        prompts=["a photo of {}", HOSTILE],
        num_images=2,
        steps=2,
        seed=5,
        clip=str(place / "clip"),
        dino=str(place / "dino"),
    )


def test_columns_are_the_model_and_its_runs(comparison):
    first, second = comparison.subjects
    assert [column.label for column in first.columns] == ["no adapter", "lora-tsd", "lora"]
    assert [column.label for column in second.columns] == ["no adapter", "lora"]
    assert (len(first.photos), len(second.photos)) == (3, 2)
    assert first.prompts == ["a photo of sks block", HOSTILE.replace("{}", "sks block")]
    assert comparison.missing == {}


def test_every_image_is_the_one_its_adapter_draws(place, comparison):
    """Each run's adapter on a pipeline of its own: what came before it on a shared one left nothing behind."""
    recipe = load_recipe(str(place / "one" / "recipe.yaml"))
    drawn = {column.label: column.cells[1].images[1] for column in comparison.subjects[0].columns}
    for label, run in (("no adapter", None), ("lora-tsd", "one"), ("lora", "two")):
        pipe = load_pipeline(locate(recipe.model), recipe.model)
        if run:
            load_adapters(pipe, place / run / "adapter")
        prompt = comparison.subjects[0].prompts[1]
        [expected] = draw(pipe, [(prompt, 6)], torch.device("cpu"), resolution=32, steps=2)
        assert np.array_equal(np.asarray(drawn[label]), np.asarray(expected)), label
    assert len({image.tobytes() for image in drawn.values()}) == 3
    saved = Image.open(place / "out" / "images" / "1-lora-tsd" / "prompt2-seed6.png")
    assert np.array_equal(np.asarray(saved), np.asarray(drawn["lora-tsd"]))


def test_similarities_are_the_mean_cosines(place, comparison):
    """In float64, pair by pair."""
    subject = comparison.subjects[0]
    clip, dino = Clip(str(place / "clip"), torch.device("cpu")), Dino(str(place / "dino"), torch.device("cpu"))

    def mean_cosine(left, right):
        left, right = (np.asarray(x, dtype=np.float64) for x in (left, right))
        return np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a in left for b in right])

    for column in subject.columns:
        for prompt, cell in zip(subject.prompts, column.cells):
            images = clip.images(cell.images)
            assert cell.scores["CLIP-T"] == pytest.approx(mean_cosine(images, clip.texts([prompt])), abs=1e-6)
            assert cell.scores["CLIP-I"] == pytest.approx(mean_cosine(images, clip.images(subject.photos)), abs=1e-6)
            expected = mean_cosine(dino.images(cell.images), dino.images(subject.photos))
            assert cell.scores["DINO"] == pytest.approx(expected, abs=1e-6)
        for name, value in column.scores.items():
            assert value == pytest.approx(np.mean([cell.scores[name] for cell in column.cells]))
    scores = json.loads((place / "out" / "scores.json").read_text())
    assert scores["subjects"][0]["methods"][1]["mean"] == subject.columns[1].scores
    photos = dino.images(subject.photos)
    assert float((photos * photos).sum(1).sub(1).abs().max()) < 1e-6


def test_the_page_stands_alone_and_trusts_no_text(comparison):
    text = comparison.page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert {link for link in re.findall(r'(?:src|href)="([^"]+)"', text) if not link.startswith("data:")} == {
        "https://arxiv.org/abs/2409.01035",
        "https://arxiv.org/abs/2208.12242",
    }
    assert text.count("<img ") == 3 + 2 + 2 * 2 * (3 + 2)
    assert text.count(f"{comparison.subjects[0].columns[1].scores['DINO']:.3f}") >= 1
    assert "Mean over 2 subjects" in text
    assert "Not measured" not in text


def test_what_cannot_be_measured_is_said(place):
    found = compare_subjects(
        [place / "three"], place / "bare", prompts=["{}"], num_images=1, steps=1, base=False, clip=None,
        dino=str(place / "nowhere"),
    )  # fmt: skip
    assert set(found.missing) == {"CLIP-T", "CLIP-I", "DINO"}
    text = found.page.read_text(encoding="utf-8")
    assert "Not measured: no model was given" in text
    assert "nowhere cannot be loaded" in text
    assert found.subjects[0].columns[0].scores == {}


def test_refused_before_anything_is_drawn(place, tmp_path):
    with pytest.raises(RecipeError, match="is no run folder"):
        compare_subjects([tmp_path], tmp_path / "x")
    with pytest.raises(RecipeError, match="exists and is not overwritten"):
        compare_subjects([place / "one"], tmp_path)
    with pytest.raises(RecipeError, match="a comparison needs a run"):
        compare_subjects([], tmp_path / "x")
    with pytest.raises(RecipeError, match="1 runs need as many labels; got 2"):
        compare_subjects([place / "one"], tmp_path / "x", labels=["a", "b"])
    unfinished = tmp_path / "unfinished"
    shutil.copytree(place / "one", unfinished)
    metrics = json.loads((unfinished / "metrics.json").read_text())
    (unfinished / "metrics.json").write_text(json.dumps({**metrics, "status": "running"}))
    with pytest.raises(RecipeError, match="is not finished; continue it with resume=true"):
        compare_subjects([unfinished], tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(show, comparison, width):
    """Every image is shown, nothing is asked of anyone, and a phone scrolls the table and not the page."""
    page = show(comparison.page.read_text("utf-8"), width)
    assert page.evaluate("Array.from(document.images).every(i => i.complete && i.naturalWidth > 0)")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("thead th").all_inner_texts()[1] == "no adapter"


def test_rendering_again_gives_the_same_page(comparison):
    settings = {"denoising steps": 2}
    assert render(comparison.subjects, {}, settings) == render(comparison.subjects, {}, settings)


@pytest.mark.long
def test_from_the_command_line(place, tmp_path, monkeypatch, capsys):
    """Methods trained alike and shown on one page; stopped, the same command continues."""
    monkeypatch.chdir(tmp_path)
    recipe = tiny_diffusion.write_recipe(
        place, validation={"every": None}, comparison={"prompts": ["{}"], "num_images": 1, "dino": None}
    )
    clip = f"comparison.clip={place / 'clip'}"
    command = ["compare", str(recipe), clip, "--ranks", "2", "--seeds", "1,2", "--methods", "lora,lora-dash"]
    with monkeypatch.context() as patch:
        patch.setattr("peft_tsd.diffusion.comparing.compare_subjects", interrupted)
        assert main(command) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert main(command) == 0
    printed = capsys.readouterr()
    assert re.search(r"lora-dash, r 2, seed 2 +CLIP-T -?0\.\d+   CLIP-I 0\.\d+\n", printed.out)
    assert "not measured: DINO, no model was given" in printed.out
    assert "step/s" not in printed.err.partition("drawing")[0]  # nothing was trained again
    kept = load_recipe("comparisons/tiny/runs/lora-dash-r2-seed2/recipe.yaml")
    assert (kept.method, kept.adapter.r, kept.adapter.lora_alpha, kept.seed) == ("lora-dash", 2, 4, 2)
    assert (tmp_path / "comparisons" / "tiny" / "page" / "comparison.html").is_file()
    assert main(command) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert main(["compare", str(recipe), "--vary", "seed=1"]) == 2
    assert "has no meaning" in capsys.readouterr().err


def interrupted(*args, **kwargs):
    raise Interrupted(None)
