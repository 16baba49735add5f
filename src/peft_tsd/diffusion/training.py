"""A DreamBooth run (Ruiz et al., arXiv 2208.12242): from a recipe to a LoRA file that knows the subject.

Everything that can be refused is refused first, on shapes alone (`preparing`). Then weights are read, photos and
prompts are encoded once, and the adapter is trained, saved, exported and shown in images. Of several processes each
takes its photos of a batch, and draws its images.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from ..distributed.sharded import is_main_process
from ..errors import RecipeError, TransitionError
from ..files.whole import write_file, write_folder
from ..runs.disk import room_in
from ..runs.folder import RunFolder
from ..runs.log import file_only, log, logging_to
from ..runs.machine import current_device, peak_memory
from ..runs.processes import by_main, check_same_data, join, only_main, own_rows
from ..runs.stopping import Stop, interruptible, side_by_side
from ..tuner.phase import PrelaunchWarning
from .adapters import Adapters, load_adapters, make_adapters, save_adapters
from .encoded import Encoded, encode
from .export import export_diffusers
from .images import draw, grid
from .learner import Learner
from .memory import out_of_memory
from .photos import Photo, square
from .pipeline import load_pipeline
from .preparing import Job, enable_checkpointing, facts_of, prepare, say_what_is_there
from .recipe import DreamBooth

STATE = "state.pt"


class Result(NamedTuple):
    """What a run ends with."""

    folder: RunFolder
    metrics: dict[str, Any]
    adapters: Adapters
    """Empty where the run had been finished before."""
    pipe: Any
    """The pipeline with the adapters on it, or None where the run had been finished before."""


def train(recipe: DreamBooth) -> Result:
    """Do the run a recipe describes, or continue it: in each of several processes, where a launcher has started them.

    Raises:
        RecipeError: The recipe cannot be carried out.
        Interrupted: The user stopped the run; it can be continued.
    """
    join()
    with interruptible(Path(recipe.output)) as stop:
        job = prepare(recipe)
        stop.check()
        try:
            return _run(job, stop)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error, recipe.training.batch_size, recipe.data.resolution) from None


def _run(job: Job, stop: Stop) -> Result:
    recipe, folder = job.recipe, RunFolder(job.recipe.output)
    facts = facts_of(job)
    check_same_data(facts["data"])
    if not recipe.resume:
        by_main(lambda: folder.create(recipe, {"status": "running", **facts, "fixed_loss": {}}))
    with only_main(folder.locked()), only_main(room_in(folder)):
        return _continue(job, folder, facts, stop)


def _continue(job: Job, folder: RunFolder, facts: dict[str, Any], stop: Stop) -> Result:
    """Do what is left of the run: all of it, at first."""
    recipe = job.recipe
    metrics = by_main(folder.read_metrics)
    if recipe.resume:
        if metrics["data"] != facts["data"]:
            raise RecipeError(
                f"resume=true, and the photos are not those the run in {str(folder.path)!r} was begun with: "
                f"{facts['data']} now, {metrics['data']} then; bring them back, or give output=FOLDER for a new run"
            )
        if metrics["status"] == "finished":
            return Result(folder, metrics, {}, None)
    with only_main(logging_to(folder.log)):
        log.info("%s %s", "continuing" if recipe.resume else "beginning", folder.path)
        say_what_is_there(job)
        started = time.perf_counter()
        pipe = load_pipeline(job.source, recipe.model)
        log.info("loaded %s in %.0f s", recipe.model.name, time.perf_counter() - started)
        stop.check()
        with warnings.catch_warnings():
            # A run that is stopped in its pre-launch is going to be continued.
            warnings.simplefilter("ignore", PrelaunchWarning)
            run = _Run(job, pipe, folder, metrics, stop)
            run.train()
        run.finish()
        log.info("finished")
    return Result(folder, metrics, run.adapters, pipe)


class _Run:
    """A run from its loaded pipeline on."""

    def __init__(self, job: Job, pipe: Any, folder: RunFolder, metrics: dict[str, Any], stop: Stop) -> None:
        self._recipe, self._family, self._pipe = job.recipe, job.source.family, pipe
        self._folder, self._metrics, self._stop = folder, metrics, stop
        self._device = current_device()
        groups = self._encoded(job)
        # From here on the autoencoder only draws images.
        pipe.vae.to(getattr(torch, job.recipe.model.dtype))

        dropped = by_main(folder.drop_incomplete)
        if dropped:
            log.info("removed half-written %s", ", ".join(dropped))
        last = by_main(folder.last_complete)
        torch.manual_seed(job.recipe.seed)
        if last is None:
            self.adapters = make_adapters(pipe, self._family, job.recipe)
        else:
            self.adapters = load_adapters(pipe, last[0], is_trainable=True)
        for model in self.adapters.values():
            model.to(self._device)
        enable_checkpointing(job.recipe, getattr(pipe, self._family.denoiser))
        self._learner = Learner(pipe, self._family, job.recipe, self.adapters, groups, job.objective)
        if last is not None:
            self._learner.load(last[0] / STATE)
        self._progress: dict[str, Any] = {
            "step": 0,
            "seconds": 0.0,
            "loss": [],
            "phase_change": None,
            "peak_memory_bytes": None,
        }
        if last is not None:
            self._progress = last[1]

    def _encoded(self, job: Job) -> dict[str, Encoded]:
        path, names = self._folder.path / "encoded.safetensors", ["subject"]
        if self._recipe.prior.prompt is not None:
            names.append("prior")
        if not by_main(path.is_file):
            groups = {"subject": (job.photos.photos, str(self._recipe.data.prompt))}
            if self._recipe.prior.prompt is not None:
                prior = job.prior.photos if job.prior is not None else self._prior_images()
                groups["prior"] = (prior, self._recipe.prior.prompt)

            def write() -> None:
                found = encode(
                    self._pipe,
                    self._family,
                    groups,
                    self._device,
                    with_prompts=not self._recipe.text_encoders.train,
                    on_photo=self._stop.check_here,
                )
                tensors = {key: x for name, group in found.items() for key, x in group.tensors(name).items()}
                write_file(path, partial(save_file, tensors))

            side_by_side(lambda: write() if is_main_process() else None)
        tensors = load_file(path)
        return {name: Encoded.from_tensors(tensors, name) for name in names}

    def _prior_images(self) -> list[Photo]:
        """The class as the frozen model draws it, one file an image, so that a run can be stopped among them."""
        prior, side = self._recipe.prior, self._recipe.data.resolution
        folder = self._folder.path / "prior"
        by_main(lambda: folder.mkdir(exist_ok=True))
        paths = [folder / f"{i:05}.png" for i in range(prior.num_images)]
        missing = by_main(lambda: [i for i, path in enumerate(paths) if not path.is_file()])

        def draw_mine() -> None:
            mine = own_rows(missing)
            wanted = [(str(prior.prompt), self._recipe.seed + i) for i in mine]
            for image, i in zip(self._draw(wanted, "drawing the class"), mine):
                write_file(paths[i], image.save)

        side_by_side(draw_mine)
        return [square(Image.open(path).convert("RGB"), side, path.name) for path in paths]

    def train(self) -> None:
        """Every step that is left, with what is due between them."""
        recipe, progress = self._recipe, self._progress
        losses = self._metrics["fixed_loss"]
        if "before" not in losses and progress["step"] == 0:
            losses["before"] = self._learner.fixed_loss()
            by_main(lambda: self._folder.write_metrics(self._metrics))
        with _bar(recipe.training.steps, "training", "step", initial=progress["step"]) as bar:
            while progress["step"] < recipe.training.steps:
                # Before the next step, so that a run stopped at this one draws them when it is continued.
                every = recipe.validation.every
                if every is not None and progress["step"] and progress["step"] % every == 0:
                    self._draw_grid(f"step-{progress['step']:06}")
                self._step()
                bar.set_postfix(loss=f"{progress['loss'][-1]['loss']:.3f}")
                bar.update()
                number = progress["step"]
                stopping = self._stop.agreed()
                if number % recipe.training.save_every == 0 or number == recipe.training.steps or stopping:
                    by_main(self._save)
                if stopping:
                    self._stop.check_here()

    def _step(self) -> None:
        progress, number = self._progress, self._progress["step"] + 1
        started = time.perf_counter()
        try:
            step = self._learner.step(number)
        except TransitionError as error:
            raise RecipeError(f"{error} Lower optimizer.learning_rate, or use model.dtype=float32.") from None
        progress["seconds"] += time.perf_counter() - started - (step.transition or 0)
        if step.transition is not None:
            layers = sum(len(model.directions()) for model in self.adapters.values())
            progress["phase_change"] = {"step": number, "seconds": step.transition, "layers": layers}
        progress["loss"].append({"step": number, "loss": step.loss, "learning_rate": step.learning_rate})
        progress["step"] = number
        file_only(f"step {number}: loss {step.loss:.4f}")

    def _save(self) -> None:
        self._progress["peak_memory_bytes"] = max(self._progress["peak_memory_bytes"] or 0, peak_memory() or 0) or None
        checkpoint = self._folder.checkpoints / f"checkpoint-{self._progress['step']}"

        def fill(path: Path) -> None:
            save_adapters(self.adapters, path)
            self._learner.save(path / STATE)

        write_folder(checkpoint, fill)
        self._folder.mark_complete(checkpoint, self._progress)
        self._folder.keep_newest(self._recipe.training.keep_checkpoints)

    def finish(self) -> None:
        """Save, export and show what was learned."""
        folder, progress = self._folder, self._progress
        by_main(self._keep)
        self._metrics["fixed_loss"]["after"] = self._learner.fixed_loss()
        self._draw_grid("final")
        trained = sum(p.numel() for model in self.adapters.values() for p in model.parameters() if p.requires_grad)
        self._metrics |= {
            "status": "finished",
            "trainable_parameters": trained,
            "steps": progress["step"],
            "seconds_per_step": progress["seconds"] / progress["step"],
            "peak_memory_bytes": progress["peak_memory_bytes"],
            "phase_change": progress["phase_change"],
            "loss": progress["loss"],
        }
        by_main(lambda: folder.write_metrics(self._metrics))

    def _keep(self) -> None:
        """Save and export what was trained, where that is not there yet."""
        folder = self._folder
        if not folder.adapter.exists():
            write_folder(folder.adapter, lambda path: save_adapters(self.adapters, path))
        if not folder.adapter_lora.exists():
            log.info(
                "exported %s", export_diffusers(folder.adapter, folder.adapter_lora, kohya=self._recipe.export.kohya)
            )

    def _draw_grid(self, name: str) -> None:
        path = self._folder.path / "images" / f"{name}.png"
        wanted = self._recipe.validation
        prompts = wanted.prompts or [str(self._recipe.data.prompt)]
        if by_main(path.is_file):
            return
        todo = [(prompt, wanted.seed + i) for prompt in prompts for i in range(wanted.num_images)]
        parts = side_by_side(lambda: list(self._draw(own_rows(todo), f"images, {name}")))
        drawn = [image for part in parts for image in part]
        rows = [drawn[i : i + wanted.num_images] for i in range(0, len(drawn), wanted.num_images)]

        def write() -> None:
            path.parent.mkdir(exist_ok=True)
            write_file(path, grid(rows, prompts).save)

        by_main(write)

    def _draw(self, wanted: Sequence[tuple[str, int]], title: str) -> Iterator[Image.Image]:
        """One image for each prompt and seed; a run can be stopped after each."""
        images = draw(
            self._pipe,
            wanted,
            self._device,
            resolution=self._recipe.data.resolution,
            steps=self._recipe.validation.steps,
            guidance_scale=self._recipe.validation.guidance_scale,
        )
        with _bar(len(wanted), title, "image", leave=False) as bar:
            for image in images:
                yield image
                bar.update()
                self._stop.check_here()


def _bar(total: int, title: str, unit: str, **options: Any) -> Any:
    """The main process's; of the others none is seen."""
    return tqdm(total=total, desc=title, unit=unit, disable=not is_main_process(), **options)
