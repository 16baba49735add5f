"""Runs side by side, as in the paper's Figure 5 (arXiv 2409.01035): prompts down, methods across, photos on top."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import RecipeError
from ..files.whole import write_folder
from ..recipes.reading import load_as
from ..runs.folder import RunFolder
from ..runs.machine import current_device
from .adapters import load_adapters
from .comparison_page import render
from .images import draw
from .photos import read_photos
from .pipeline import load_pipeline, locate
from .recipe import CLIP, DINO, PROMPTS, DreamBooth
from .similarity import Clip, Dino, Unavailable, load_or_why, subject_similarity, text_similarity
from .subjects import Cell, Column, Comparison, Subject


def compare_subjects(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    labels: Sequence[str] | None = None,
    prompts: Sequence[str] = PROMPTS,
    num_images: int = 4,
    steps: int = 30,
    guidance_scale: float | None = None,
    seed: int = 0,
    base: bool = True,
    clip: str | None = CLIP,
    dino: str | None = DINO,
) -> Comparison:
    """Draw the same prompts with finished runs, from the same noise, and show them beside each other.

    Runs on the same photos, prompt and model are one subject; each has a column. The folder `out` gets
    `comparison.html`, `scores.json` and every image as PNG.

    Args:
        runs: Run folders.
        out: The folder to make; it must not exist.
        labels: A name for each run; its method by default, numbered where two have the same.
        prompts: What to draw; `{}` stands for the subject's words.
        num_images: Images a prompt and method.
        steps: Denoising steps an image.
        guidance_scale: Of classifier-free guidance; the pipeline's own by default.
        seed: Of the first image of a prompt; the others take the next ones.
        base: Whether the model without an adapter has a column too.
        clip: The CLIP model of CLIP-T and CLIP-I, a hub name or a folder. Where it cannot be loaded, the page says so.
        dino: The DINO model, likewise.

    Raises:
        RecipeError: A run is not finished, its photos or its model are not there, `out` exists, or there is nothing to
            draw.
    """
    out = Path(out).expanduser()
    if out.exists() or out.is_symlink():
        raise RecipeError(f"out={str(out)!r} exists and is not overwritten; name a new folder")
    if not runs or not prompts or num_images < 1:
        raise RecipeError(
            f"a comparison needs a run, a prompt and an image; got {len(runs)} runs, {len(prompts)} prompts and "
            f"num_images={num_images}"
        )
    if labels is not None and len(labels) != len(runs):
        raise RecipeError(f"{len(runs)} runs need as many labels; got {len(labels)}")
    found = [_finished(Path(run).expanduser()) for run in runs]
    groups = _by_subject(found, labels)
    for members in groups.values():
        locate(members[0].recipe.model)
        _photos(members[0].recipe)
    device = current_device()
    measure = _Measure(load_or_why(Clip, clip, device), load_or_why(Dino, dino, device))
    total = len(prompts) * num_images * (len(runs) + base * len(groups))
    with tqdm(total=total, desc="drawing", unit="image") as bar:
        artist = _Artist(list(prompts), num_images, steps, guidance_scale, seed, device, measure, bar)
        subjects = [artist.subject(members, base) for members in groups.values()]
    missing = measure.missing()

    def fill(folder: Path) -> None:
        (folder / "comparison.html").write_text(render(subjects, missing, _settings(artist)), encoding="utf-8")
        scores = {"missing": missing, "subjects": [_scores(subject) for subject in subjects]}
        (folder / "scores.json").write_text(json.dumps(scores, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for number, subject in enumerate(subjects, 1):
            for column in subject.columns:
                for row, cell in enumerate(column.cells, 1):
                    for i, image in enumerate(cell.images):
                        path = (
                            folder
                            / "images"
                            / f"{number}-{_file_name(column.label)}"
                            / f"prompt{row}-seed{seed + i}.png"
                        )
                        path.parent.mkdir(parents=True, exist_ok=True)
                        image.save(path)

    try:
        write_folder(out, fill)
    except OSError as error:
        raise RecipeError(f"out={str(out)!r} cannot be made: {error}; name another folder") from None
    return Comparison(out / "comparison.html", subjects, missing)


class _Member(NamedTuple):
    label: str
    folder: RunFolder
    recipe: DreamBooth
    metrics: dict[str, Any]


def _finished(path: Path) -> _Member:
    folder = RunFolder(path)
    if not folder.recipe.is_file():
        raise RecipeError(f"{str(path)!r} is no run folder: it has no recipe.yaml")
    recipe = load_as(DreamBooth, str(folder.recipe))
    metrics = folder.read_metrics()
    if metrics["status"] != "finished":
        raise RecipeError(f"the run in {str(path)!r} is not finished; continue it with resume=true")
    return _Member(recipe.method, folder, recipe, metrics)


def _by_subject(found: list[_Member], labels: Sequence[str] | None) -> dict[tuple[str, ...], list[_Member]]:
    groups: dict[tuple[str, ...], list[_Member]] = {}
    for i, member in enumerate(found):
        recipe = member.recipe
        key = (recipe.model.name, str(recipe.data.folder), str(recipe.data.prompt))
        members = groups.setdefault(key, [])
        if labels is not None:
            members.append(member._replace(label=labels[i]))
        else:
            same = sum(other.recipe.method == recipe.method for other in members)
            members.append(member._replace(label=f"{recipe.method} ({same + 1})") if same else member)
    return groups


def _photos(recipe: DreamBooth) -> list[Image.Image]:
    return [p.image for p in read_photos(str(recipe.data.folder), recipe.data.resolution, "data.folder").photos]


class _Measure:
    def __init__(self, clip: Any, dino: Any) -> None:
        self._clip, self._dino = clip, dino

    def missing(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for names, model in ((("CLIP-T", "CLIP-I"), self._clip), (("DINO",), self._dino)):
            if isinstance(model, Unavailable):
                found |= dict.fromkeys(names, model.reason)
        return found

    def photos(self, photos: list[Image.Image]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if not isinstance(self._clip, Unavailable):
            found["CLIP-I"] = self._clip.images(photos)
        if not isinstance(self._dino, Unavailable):
            found["DINO"] = self._dino.images(photos)
        return found

    def scores(self, images: list[Image.Image], prompt: str, photos: dict[str, Tensor]) -> dict[str, float]:
        found: dict[str, float] = {}
        if "CLIP-I" in photos:
            embeddings = self._clip.images(images)
            found["CLIP-T"] = text_similarity(embeddings, self._clip.texts([prompt]))
            found["CLIP-I"] = subject_similarity(embeddings, photos["CLIP-I"])
        if "DINO" in photos:
            found["DINO"] = subject_similarity(self._dino.images(images), photos["DINO"])
        return found


class _Artist(NamedTuple):
    prompts: list[str]
    num_images: int
    steps: int
    guidance_scale: float | None
    seed: int
    device: torch.device
    measure: _Measure
    bar: Any

    def subject(self, members: list[_Member], base: bool) -> Subject:
        recipe = members[0].recipe
        given = str(recipe.data.prompt)
        words = given.removeprefix("a photo of ")
        prompts = [prompt.replace("{}", words) for prompt in self.prompts]
        photos = _photos(recipe)
        embedded = self.measure.photos(photos)
        pipe = load_pipeline(locate(recipe.model), recipe.model)
        pipe.vae.to(getattr(torch, recipe.model.dtype))
        columns = []
        if base:
            columns.append(self._column("no adapter", {}, pipe, prompts, recipe.data.resolution, embedded))
        for member in members:
            adapters = load_adapters(pipe, member.folder.adapter)
            settings = _run_settings(member)
            columns.append(self._column(member.label, settings, pipe, prompts, recipe.data.resolution, embedded))
            for adapter in adapters.values():
                adapter.unload()
        return Subject(words, given, recipe.model.name, photos, prompts, columns)

    def _column(
        self,
        label: str,
        settings: dict[str, Any],
        pipe: Any,
        prompts: list[str],
        resolution: int,
        photos: dict[str, Tensor],
    ) -> Column:
        cells = []
        for prompt in prompts:
            images = []
            for image in draw(
                pipe,
                [(prompt, seed) for seed in range(self.seed, self.seed + self.num_images)],
                self.device,
                resolution=resolution,
                steps=self.steps,
                guidance_scale=self.guidance_scale,
            ):
                images.append(image)
                self.bar.update()
            cells.append(Cell(images, self.measure.scores(images, prompt, photos)))
        means = {name: sum(cell.scores[name] for cell in cells) / len(cells) for name in cells[0].scores}
        return Column(label, settings, cells, means)


def _run_settings(member: _Member) -> dict[str, Any]:
    recipe, metrics = member.recipe, member.metrics
    return {
        "method": recipe.method,
        "rank": recipe.adapter.r,
        "steps": metrics["steps"],
        "learning rate": recipe.optimizer.learning_rate,
        "trained": metrics["trainable_parameters"],
        "seconds a step": metrics["seconds_per_step"],
        "seed": recipe.seed,
    }


def _settings(artist: _Artist) -> dict[str, Any]:
    guidance = "the pipeline's own" if artist.guidance_scale is None else artist.guidance_scale
    last = artist.seed + artist.num_images - 1
    return {"denoising steps": artist.steps, "guidance scale": guidance, "seeds": f"{artist.seed} to {last}"}


def _scores(subject: Subject) -> dict[str, Any]:
    return {
        "subject": subject.words,
        "model": subject.model,
        "prompts": subject.prompts,
        "methods": [
            {
                "label": column.label,
                "settings": column.settings,
                "mean": column.scores,
                "by_prompt": [cell.scores for cell in column.cells],
            }
            for column in subject.columns
        ],
    }


def _file_name(label: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in label)
