"""A run: from a recipe to a scored adapter in a folder.

Everything that can be refused is refused first, on the model's configuration alone (`_prepare`). Then weights are
read, the model is scored, transformers' Trainer trains the adapter, and the adapter is saved, exported and scored.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from .adapter_files import CONFIG, ORIGIN, WEIGHTS, check_adapter, check_fits, check_onto
from .batches import SimilarLengthsTrainer
from .config import without_weights
from .errors import one_line
from .export import export_lora
from .folders import write_folder
from .full_disk import room_in
from .loading import Source, check_target_modules, load_config, load_model, load_skeleton, load_tokenizer, locate
from .machine import check_one_process, current_device, environment, peak_memory
from .methods import AdaLoraCallback, adapter_config, is_adalora
from .model import PrelaunchWarning
from .origin import Fingerprint, check_base, fingerprint, read_fingerprint, write_origin
from .recipe import SUITES, TSD_METHODS, Recipe, RecipeError, did_you_mean
from .run_folder import RunFolder, find_run
from .run_log import file_only, log, logging_to
from .schedule import TransitionError, TsdCallback
from .stopping import Interrupted as Interrupted
from .stopping import Stop, interruptible
from .tasks import Classification, Family, Material, load_task

if TYPE_CHECKING:
    from .diffusion.recipe import DreamBooth


class Result(NamedTuple):
    """What a run ends with."""

    folder: RunFolder
    metrics: dict[str, Any]
    model: Any
    """With its adapter, if the method has one. None where the run had been finished before."""


def train(recipe: Recipe) -> Result:
    """Do the run a recipe describes, or continue it.

    Raises:
        RecipeError: The recipe cannot be carried out, and nothing was written; or the run can be continued once what
            the message says was done.
        Interrupted: The run was stopped; it can be continued.
    """
    check_one_process()
    with interruptible(Path(recipe.output)) as stop:
        job = _prepare(recipe)
        stop.check()
        return _run(job, stop)


def evaluate(
    path: str, recipe: Recipe | None = None, change: Callable[[Recipe], Recipe] = lambda r: r
) -> dict[str, Any]:
    """Score the adapter of a run folder, or an adapter folder, native or exported.

    Args:
        path: A run folder (its `adapter/` is scored, or its `model/`), or an adapter's own folder.
        recipe: On what to score; by default the recipe of the run that the adapter lies in.
        change: Applied to that recipe.

    Raises:
        RecipeError: No adapter or no recipe is there, or the recipe cannot be carried out.
    """
    folder = Path(path).expanduser()
    run = RunFolder(folder)
    if run.model.is_dir():
        return _evaluate(change(recipe or find_run(folder)), run.model)
    adapter = folder if (folder / CONFIG).is_file() else run.adapter
    if not (adapter / CONFIG).is_file():
        found = "no finished adapter" if folder.is_dir() else "no such folder"
        raise RecipeError(f"{path!r}: {found}; give a run folder that has adapter/, or an adapter's folder")
    return _evaluate(change(recipe or find_run(folder)), adapter)


def _evaluate(recipe: Recipe, trained: Path) -> dict[str, Any]:
    whole = not (trained / CONFIG).is_file()
    base_name = recipe.model.name
    config = None if whole else check_adapter(trained)
    if whole:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": str(trained)})})
    job = _prepare(recipe, to_train=False)
    if config is not None:
        check_onto(trained, config, job.load_skeleton(), base_name)
    model = job.load_base()
    if not whole:
        check_base(trained, fingerprint(model), base_name)
        try:
            model = PeftModel.from_pretrained(model, trained)
        except (ValueError, RuntimeError, OSError, SafetensorError) as error:
            raise RecipeError(f"{str(trained)!r} does not load onto {base_name!r}: {one_line(error)}") from None
    started = time.perf_counter()
    scores = job.scores(model.to(current_device()), "scoring")
    return {
        ("whole_model" if whole else "adapter"): str(trained),
        "model": base_name,
        "metric": job.task.metric,
        "score": job.average(scores),
        "questions": job.material.questions,
        **({"tasks": scores, "left_out": job.material.left_out} if job.is_suite else {}),
        "seconds": round(time.perf_counter() - started, 2),
    }


class _Job(NamedTuple):
    """A recipe that was found possible, and what was learned on the way."""

    recipe: Recipe
    task: Family
    material: Material
    rows: list[dict[str, Any]]
    """The training examples as tokens; empty where nothing will be trained."""
    tokenizer: Any
    adapter_config: PeftConfig | None
    """None where the method has no adapter."""
    steps: int
    load_base: Callable[[], Any]
    load_skeleton: Callable[[], Any]
    """The base without its weights."""

    @property
    def is_suite(self) -> bool:
        return self.recipe.task.family in SUITES

    def scores(
        self, model: Any, title: str, on_batch: Callable[[], None] = lambda: None
    ) -> dict[str, dict[str, float]]:
        """Every metric of every task."""
        model.eval()
        found = {}
        dtype = getattr(torch, self.recipe.model.dtype)
        # Full fine-tuning keeps its weights in float32 and computes in the recipe's dtype.
        casting = torch.autocast(model.device.type, dtype, enabled=next(model.parameters()).dtype != dtype)
        with casting, tqdm(total=self.material.questions, desc=title, unit="question") as bar:

            def done(questions: int) -> None:
                bar.update(questions)
                on_batch()

            for name, examples in self.material.tests.items():
                batch_size = self.recipe.evaluation.batch_size
                found[name] = self.task.score(model, self.tokenizer, examples, batch_size, done)
        return found

    def average(self, scores: dict[str, dict[str, float]]) -> float:
        """The mean over tasks of the metric that counts."""
        return sum(metrics[self.task.metric] for metrics in scores.values()) / len(scores)


class _Read(NamedTuple):
    """What a recipe names, read; of the model only its configuration."""

    source: Source
    task: Family
    material: Material
    config: Any
    tokenizer: Any
    rows: list[dict[str, Any]]


def check(recipes: Iterable[Recipe]) -> None:
    """Refuse what `train` would, without making anything; recipes of the same data share the reading of them.

    Raises:
        RecipeError: As `train`.
    """
    known: dict[str, _Read] = {}
    for recipe in recipes:
        key = json.dumps(
            [
                recipe.model.name,
                recipe.model.quantization,
                recipe.data.model_dump(),
                recipe.task.model_dump(),
                recipe.data_seed,
                recipe.evaluation.on,
            ]
        )
        if key not in known:
            known[key] = _read(recipe, to_train=True)
        _checked(recipe, known[key], to_train=True)


def _prepare(recipe: Recipe, *, to_train: bool = True) -> _Job:
    """Find out that a recipe can be carried out, without reading or fetching a weight."""
    folder = RunFolder(recipe.output)
    if to_train and not recipe.resume:
        folder.check_free()
    read = _read(recipe, to_train=to_train)
    source, task, material, config, tokenizer, rows = read
    if isinstance(task, Classification):
        resolved = recipe.task.model_copy(update={"labels": task.labels})
        recipe = recipe.model_copy(update={"task": resolved})
    if to_train and recipe.resume:
        folder.check_resumable(recipe)
    steps = _checked(recipe, read, to_train=to_train)

    def load_base() -> Any:
        # A classifier's new head is drawn here, and must be the same whenever the run is continued or scored.
        set_seed(recipe.seed)
        dtype = "float32" if recipe.method == "full" and to_train else recipe.model.dtype
        model = load_model(source, config, task.auto_class, dtype, recipe.model.quantization)
        # A GGUF file carries a title, which the saved adapter would otherwise name as its base model.
        model.name_or_path = source.name
        return model

    def skeleton() -> Any:
        return load_skeleton(config, task.auto_class, trust_remote_code=recipe.model.trust_remote_code)

    made = adapter_config(recipe, task.peft_task_type, steps)
    return _Job(recipe, task, material, rows, tokenizer, made, steps, load_base, skeleton)


def _read(recipe: Recipe, *, to_train: bool) -> _Read:
    check_choice("optimizer.name", recipe.optimizer.name, [name.value for name in OptimizerNames])
    check_choice("optimizer.schedule", recipe.optimizer.schedule, [name.value for name in SchedulerType])
    source = locate(recipe.model)
    task, material = load_task(recipe, to_train=to_train)
    config = load_config(source, **task.config_fields)
    tokenizer = load_tokenizer(source)
    rows = task.encode(material.train, tokenizer) if to_train else []
    if config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return _Read(source, task, material, config, tokenizer, rows)


def _checked(recipe: Recipe, read: _Read, *, to_train: bool) -> int:
    """The optimizer steps of a run that can be carried out.

    Raises:
        RecipeError: It cannot.
    """
    steps = recipe.training.total_steps(len(read.material.train))
    if to_train:
        recipe.check_steps(steps)
    skeleton = load_skeleton(read.config, read.task.auto_class, trust_remote_code=recipe.model.trust_remote_code)
    trained = _fit(recipe, read.task, skeleton, steps)
    if to_train:
        check_disk(recipe, RunFolder(recipe.output), trained, steps)
    return steps


def _fit(recipe: Recipe, task: Family, skeleton: PreTrainedModel, steps: int) -> int:
    """Numbers that a run would train; raises RecipeError where the adapter does not fit the model."""
    # PEFT writes the skeleton's module names into this one; the run gets another.
    tried = adapter_config(recipe, task.peft_task_type, steps)
    if tried is None:
        return sum(p.numel() for p in skeleton.parameters()) if recipe.method == "full" else 0
    check_target_modules(recipe.adapter.target_modules, skeleton)
    try:
        adapted = get_peft_model(skeleton, without_weights(tried), low_cpu_mem_usage=True)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise RecipeError(f"adapter: {' '.join(str(error).split())}") from None
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def _run(job: _Job, stop: Stop) -> Result:
    recipe, folder = job.recipe, RunFolder(job.recipe.output)
    facts = _facts(job)
    if not recipe.resume:
        score: dict[str, Any] = {"metric": job.task.metric, "questions": job.material.questions}
        if job.is_suite:
            score["tasks"] = {name: {"questions": len(rows)} for name, rows in job.material.tests.items()}
            score["left_out"] = job.material.left_out
        folder.create(recipe, {"status": "running", **facts, "score": score})
    with folder.locked(), room_in(folder):
        return _continue(job, facts, folder, stop)


def _continue(job: _Job, facts: dict[str, Any], folder: RunFolder, stop: Stop) -> Result:
    """Do what is left of the run in `folder`: all of it, at first."""
    recipe = job.recipe
    metrics = folder.read_metrics()
    if recipe.resume:
        if metrics["data"] != facts["data"]:
            raise RecipeError(
                f"resume=true, and the data are not those the run in {str(folder.path)!r} was begun with: "
                f"{facts['data']} now, {metrics['data']} then; bring them back, or give output=FOLDER for a new run"
            )
        if metrics["status"] == "finished":
            return Result(folder, metrics, None)
    with logging_to(folder.log):
        log.info("%s %s", "continuing" if recipe.resume else "beginning", folder.path)
        for note in job.material.notes:
            log.info(note)
        started = time.perf_counter()
        base = job.load_base()
        log.info("loaded %s in %.0f s", recipe.model.name, time.perf_counter() - started)
        stop.check()
        made_of = fingerprint(base)
        begun_with = read_fingerprint(metrics, folder.metrics)
        if begun_with is None:
            metrics["base"] = made_of._asdict()
            folder.write_metrics(metrics)
        elif not begun_with.agrees_with(made_of):
            raise RecipeError(
                f"resume=true, and model.name={recipe.model.name!r} has other weights than when the run in "
                f"{str(folder.path)!r} was begun; bring them back, or give output=FOLDER for a new run"
            )

        if isinstance(job.task, Classification):
            [tests] = job.material.tests.values()
            metrics["score"]["majority"] = job.task.majority(tests)
        if recipe.evaluation.before and "before" not in metrics["score"]:
            scores = job.scores(base.to(current_device()), "scoring before training", stop.check)
            _record_scores(metrics["score"], job, scores, "before")
            folder.write_metrics(metrics)

        model, progress = _trained(job, base, made_of, folder, stop)
        stop.check()
        kept = folder.model if job.adapter_config is None else folder.adapter
        if recipe.method != "base" and not kept.exists():
            write_folder(kept, lambda path: _save(model, job.tokenizer, path))
        if recipe.method in TSD_METHODS and not folder.adapter_lora.exists():
            log.info("exported %s", export_lora(model, folder.adapter_lora))
        for adapter in (folder.adapter, folder.adapter_lora):
            if adapter.exists() and not (adapter / ORIGIN).exists():
                write_origin(adapter, made_of)

        _record_scores(metrics["score"], job, job.scores(model, "scoring after training", stop.check), "after")
        trainable, total = _count(model, recipe)
        metrics |= {
            "status": "finished",
            "trainable_parameters": trainable,
            "total_parameters": total,
            "steps": progress["step"],
            "seconds_per_step": progress["seconds"] / max(1, progress["steps_timed"]),
            "peak_memory_bytes": max(peak_memory() or 0, progress["peak_memory_bytes"] or 0) or None,
            "phase_change": progress["transitions"][0] if progress["transitions"] else None,
            "loss": progress["loss"],
            "seconds": metrics.get("seconds", 0.0) + time.perf_counter() - started,
        }
        folder.write_metrics(metrics)
        log.info("finished")
    return Result(folder, metrics, model)


def _record_scores(
    record: dict[str, Any], job: _Job, scores: dict[str, dict[str, float]], when: Literal["before", "after"]
) -> None:
    record[when] = job.average(scores)
    if job.is_suite:
        for name, metrics in scores.items():
            record["tasks"][name][when] = metrics
            listed = ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
            log.info("%s %s training: %s", name, when, listed)
    log.info("%s %s training: %.4f", job.task.metric, when, record[when])


def _trained(job: _Job, base: Any, made_of: Fingerprint, folder: RunFolder, stop: Stop) -> tuple[Any, dict[str, Any]]:
    """The model after its last step, and the progress that was recorded."""
    if job.recipe.method == "base":
        return base.to(current_device()), _begun()
    dropped = folder.drop_incomplete()
    if dropped:
        log.info("removed half-written %s", ", ".join(dropped))
    last = folder.last_complete()
    if last is not None and job.adapter_config is not None:
        check_adapter(last[0])
    if last is not None and last[1]["step"] >= job.steps:
        # Trainer, given a checkpoint of the last step, would take one more.
        if job.adapter_config is None:
            model = type(base).from_pretrained(last[0])
        else:
            check_onto(last[0], job.adapter_config, job.load_skeleton(), job.recipe.model.name)
            model = PeftModel.from_pretrained(base, last[0], is_trainable=True)
        return model.to(current_device()), last[1]

    recipe = job.recipe
    set_seed(recipe.seed)
    if recipe.training.gradient_checkpointing:
        base.gradient_checkpointing_enable()
    model = base.requires_grad_(True) if job.adapter_config is None else get_peft_model(base, job.adapter_config)
    schedule = TsdCallback() if recipe.uses_directions else None
    if last is not None and job.adapter_config is not None:
        check_fits(last[0], model, "default")
    record = _Record(folder, job.steps, made_of, stop, schedule, last[1] if last else None)
    trainer = (SimilarLengthsTrainer if recipe.training.similar_lengths else Trainer)(
        model=model,
        args=_training_arguments(recipe, job.steps, folder),
        train_dataset=job.rows,
        data_collator=job.task.collator(job.tokenizer, base),
        # The record comes first, so that its seconds a step leave the transition out.
        callbacks=[record, schedule] if schedule else [record],
    )
    if is_adalora(job.adapter_config):
        trainer.add_callback(AdaLoraCallback())
    trainer.remove_callback(PrinterCallback)
    with warnings.catch_warnings():
        # A run that is stopped in its pre-launch is going to be continued.
        warnings.simplefilter("ignore", PrelaunchWarning)
        try:
            trainer.train(resume_from_checkpoint=str(last[0]) if last else None)
        except TransitionError as error:
            raise RecipeError(f"{error} Lower optimizer.learning_rate, or use model.dtype=float32.") from None
        except (UnpicklingError, ValueError, KeyError, TypeError, RuntimeError) as error:
            if last is None or (record.took_steps and not isinstance(error, UnpicklingError)):
                raise
            raise RecipeError(
                f"{str(last[0])!r} cannot be continued from: {one_line(error)}; remove it, and resume=true continues "
                "from the checkpoint before it, or from the beginning"
            ) from None
        finally:
            record.close()
    return model, record.progress


class _Record(TrainerCallback):
    """Shows and records progress, stops when asked, and marks checkpoints as complete."""

    def __init__(
        self,
        folder: RunFolder,
        steps: int,
        made_of: Fingerprint,
        stop: Stop,
        schedule: TsdCallback | None,
        before: dict[str, Any] | None,
    ) -> None:
        self._folder = folder
        self._steps = steps
        self._made_of = made_of
        self._stop = stop
        self.took_steps = False
        self._schedule = schedule
        self._transitions_before = before["transitions"] if before else []
        self.progress = before or _begun()
        self._bar: Any = None
        self._started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = tqdm(total=self._steps, initial=state.global_step, desc="training", unit="step")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress["seconds"] += time.perf_counter() - self._started
        self.progress["steps_timed"] += 1
        self.took_steps = True
        self.progress["step"] = state.global_step
        self._bar.update()
        if self._stop.requested:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        loss = logs["loss"]
        self._bar.set_postfix(loss=f"{loss:.3f}")
        file_only(f"step {state.global_step}: loss {loss:.4f}")
        if not math.isfinite(loss):
            raise RecipeError(
                f"the loss is {loss} at step {state.global_step}: training diverged; lower optimizer.learning_rate, "
                "or use model.dtype=float32"
            )
        entry = {"step": state.global_step, "loss": loss, "learning_rate": logs["learning_rate"]}
        self.progress["loss"] = [*self.progress["loss"], entry]

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._update()
        checkpoint = self._folder.checkpoints / f"checkpoint-{state.global_step}"
        if (checkpoint / WEIGHTS).is_file():
            write_origin(checkpoint, self._made_of)
        self._folder.mark_complete(checkpoint, self.progress)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
        self._update()

    def close(self) -> None:
        """End the bar's line, so that what is said next has its own."""
        if self._bar is not None:
            self._bar.close()

    def _update(self) -> None:
        made = self._schedule.transitions if self._schedule else []
        self.progress["transitions"] = [*self._transitions_before, *made]
        self.progress["peak_memory_bytes"] = max(self.progress.get("peak_memory_bytes") or 0, peak_memory() or 0)


def _begun() -> dict[str, Any]:
    """The progress of a run that has taken no step."""
    return {"step": 0, "seconds": 0.0, "steps_timed": 0, "loss": [], "transitions": [], "peak_memory_bytes": None}


def _count(model: Any, recipe: Recipe) -> tuple[int, int]:
    """Numbers trained, and numbers in the model."""
    if isinstance(model, PeftModel):
        trainable, total = model.get_nb_trainable_parameters()
        return trainable, total
    total = model.num_parameters()
    return (total if recipe.method == "full" else 0), total


def _training_arguments(recipe: Recipe, steps: int, folder: RunFolder) -> TrainingArguments:
    # An adapter is kept in float32 by PEFT, beside base weights of the recipe's dtype; without one, autocast does it.
    casts = recipe.model.dtype if recipe.method == "full" else "float32"
    arguments = TrainingArguments(
        output_dir=str(folder.checkpoints),
        max_steps=steps,
        per_device_train_batch_size=recipe.training.batch_size,
        gradient_accumulation_steps=recipe.training.gradient_accumulation,
        optim=recipe.optimizer.name,
        learning_rate=recipe.optimizer.learning_rate,
        weight_decay=recipe.optimizer.weight_decay,
        lr_scheduler_type=recipe.optimizer.schedule,
        warmup_steps=recipe.optimizer.warmup(steps),
        max_grad_norm=recipe.optimizer.max_grad_norm,
        bf16=casts == "bfloat16",
        fp16=casts == "float16",
        use_cpu=current_device().type == "cpu",
        # AdaLoRA's statistics are in no checkpoint: a run of it that was stopped begins anew.
        save_strategy="no" if recipe.method.startswith("adalora") else "steps",
        save_steps=recipe.training.save_every,
        save_total_limit=recipe.training.keep_checkpoints,
        # Every step: an average over several would break where a run is continued.
        logging_steps=1,
        logging_nan_inf_filter=False,
        seed=recipe.seed,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    # A run is one process on one device; Trainer would take every GPU it sees by DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _save(model: Any, tokenizer: Any, path: Path) -> None:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is none of `choices`.

    Raises:
        RecipeError: With the nearest.
    """
    if value not in choices:
        raise RecipeError(f"{key}={value!r} is not known{did_you_mean(value, choices)}")


def check_disk(recipe: Recipe | DreamBooth, folder: RunFolder, trained: int, steps: int) -> None:
    """Refuse a run whose files, with `trained` numbers, would not fit.

    Raises:
        RecipeError: With what is needed and what is free.
    """
    # A saved adapter and its plain export have, at most, A and B, their starting values, and the directions.
    r, directions = recipe.adapter.r, recipe.directions
    slots = directions.num_directions
    if directions.direction_budget == "global":
        slots = directions.max_directions or 4 * slots
    adapter = 4 * trained * ((2 * r + slots) / r if recipe.uses_directions else 1)
    # A new checkpoint is written before an old one goes, and holds Adam's two moments too.
    checkpoints = min(recipe.training.keep_checkpoints + 1, -(-steps // recipe.training.save_every))
    needed = int(checkpoints * (adapter + 8 * trained) + 2 * adapter)
    needed += 16 * 2**20  # the tokenizer, the log and the metrics
    where = folder.path
    while not where.exists():
        where = where.parent
    free = shutil.disk_usage(where).free
    if free < needed:
        raise RecipeError(
            f"output={str(folder.path)!r} needs about {needed / 2**20:,.0f} MiB and {str(where)!r} has "
            f"{free / 2**20:,.0f} MiB free; free some, or name a folder on another disk with output=FOLDER"
        )


def _facts(job: _Job) -> dict[str, Any]:
    """What a run is, for whoever reads its metrics later."""
    material = job.material
    content = json.dumps([material.train, material.tests if job.is_suite else next(iter(material.tests.values()))])
    return {
        "model": job.recipe.model.name,
        "method": job.recipe.method,
        "seed": job.recipe.seed,
        "data": {
            "train": len(material.train),
            "test": material.questions,
            "sha256": hashlib.sha256(content.encode()).hexdigest(),
        },
        **environment(),
    }
