"""A run: from a recipe to a scored adapter in a folder.

Everything that can be refused is refused first, on the model's configuration alone (`preparing`). Then weights are
read, the model is scored, transformers' Trainer trains the adapter, and the adapter is saved, exported and scored.
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, NamedTuple

from peft import PeftModel, get_peft_model
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback

from ..distributed.sharded import whole_state
from ..errors import RecipeError, TransitionError, one_line
from ..export.lora import export_lora
from ..files.adapters import ORIGIN
from ..files.whole import write_folder
from ..models.origin import Fingerprint, fingerprint, read_fingerprint, write_origin
from ..recipes.adapters import AdaLoraCallback, is_adalora
from ..runs.disk import room_in
from ..runs.folder import RunFolder
from ..runs.log import log, logging_to
from ..runs.machine import current_device, peak_memory
from ..runs.processes import by_main, check_same_data, is_of_another, join, launched, only_main
from ..runs.stopping import Stop, interruptible
from ..schedule.callback import START_BATCHES, TsdCallback, first_batches
from ..schedule.gradients import loss_of_output
from ..tuner.checking import check_adapter, check_fits, check_onto
from ..tuner.opening import put_onto
from ..tuner.phase import PrelaunchWarning
from .batch_shares import loss_of_share, loss_without_cache, without_cache
from .engines import Engine, check_continues, engine_of
from .preparing import Job, facts_of, prepare
from .progress import BeforeTraining, Record, begun
from .recipe import Recipe
from .starts import put_start_in, start_from_batches, take_out_start
from .tasks.classification import Classification
from .trainers import make_trainer
from .watching import EarlyStop, trackers

# What PEFT warns of where the base model is no repository of the hub, but a package's or a file. No recipe changes the
# vocabulary, which is what it would look for there.
NO_CONFIG = "Could not find a config file in"


class Result(NamedTuple):
    """What a run ends with."""

    folder: RunFolder
    metrics: dict[str, Any]
    model: Any
    """With its adapter, if the method has one. None where the run had been finished before."""


def train(recipe: Recipe) -> Result:
    """Do the run a recipe describes, or continue it: in each of several processes, where a launcher has started them.

    Raises:
        RecipeError: The recipe cannot be carried out, and nothing was written; or the run can be continued once what
            the message says was done.
        Interrupted: The run was stopped; it can be continued.
    """
    join()
    with interruptible(Path(recipe.output)) as stop:
        job = prepare(recipe)
        stop.check()
        return _run(job, stop)


def _run(job: Job, stop: Stop) -> Result:
    recipe, folder = job.recipe, job.folder
    facts = facts_of(job)
    check_same_data(facts["data"])
    if not recipe.resume:
        score: dict[str, Any] = {"metric": job.task.metric, "questions": job.questions}
        if job.is_suite:
            score["tasks"] = {name: {"questions": len(rows)} for name, rows in job.asked.items()}
            score["left_out"] = job.material.left_out
        by_main(lambda: folder.create(recipe, {"status": "running", **facts, "score": score}))
    with only_main(folder.locked()), only_main(room_in(folder)):
        return _continue(job, facts, stop)


def _continue(job: Job, facts: dict[str, Any], stop: Stop) -> Result:
    """Do what is left of the run: all of it, at first."""
    recipe, folder = job.recipe, job.folder
    metrics = by_main(folder.read_metrics)
    if recipe.resume:
        if metrics["data"] != facts["data"]:
            raise RecipeError(
                f"resume=true, and the data are not those the run in {str(folder.path)!r} was begun with: "
                f"{facts['data']} now, {metrics['data']} then; bring them back, or give output=FOLDER for a new run"
            )
        if metrics["status"] == "finished":
            return Result(folder, metrics, None)
    with only_main(logging_to(folder.log)):
        log.info("%s %s", "continuing" if recipe.resume else "beginning", folder.path)
        for note in job.material.notes:
            log.info(note)
        started = time.perf_counter()
        base = job.load_base()
        log.info("loaded %s in %.0f s", recipe.model.name, time.perf_counter() - started)
        stop.check()
        made_of = by_main(lambda: fingerprint(base))
        begun_with = read_fingerprint(metrics, folder.metrics)
        if begun_with is None:
            metrics["base"] = made_of._asdict()
            by_main(lambda: folder.write_metrics(metrics))
        elif not begun_with.agrees_with(made_of):
            raise RecipeError(
                f"resume=true, and model.name={recipe.model.name!r} has other weights than when the run in "
                f"{str(folder.path)!r} was begun; bring them back, or give output=FOLDER for a new run"
            )

        if isinstance(job.task, Classification):
            [tests] = job.asked.values()
            metrics["score"]["majority"] = job.task.majority(tests)

        def score_before(model: Any) -> None:
            if recipe.evaluation.before and "before" not in metrics["score"]:
                scores = job.scores(model, "scoring before training", stop.check_here)
                _record_scores(metrics["score"], job, scores, "before")
                by_main(lambda: folder.write_metrics(metrics))

        engine = engine_of(recipe)
        if not engine.is_sharded:
            score_before(base.to(current_device()))

        model, progress = _trained(job, base, made_of, stop, engine, score_before)
        stop.check()

        state = whole_state(model, model.prefix if isinstance(model, PeftModel) else None)
        by_main(lambda: _keep(job, model, state, made_of))
        _record_scores(metrics["score"], job, job.scores(model, "scoring after training", stop.check_here), "after")
        # The last evaluation may have said it.
        measured = {one["step"]: one.get("loss") for one in progress.get("evaluations", [])}
        loss = measured.get(job.steps)
        metrics["score"]["loss"] = job.held_out_loss(model) if loss is None else loss
        if job.validation:
            metrics["score"]["validation_loss"] = job.loss_of(model, job.validation)
        trainable, total = _count(model, job)
        metrics |= {
            "status": "finished",
            "trainable_parameters": trainable,
            "total_parameters": total,
            "steps": progress["step"],
            "seconds_per_step": progress["seconds"] / max(1, progress["steps_timed"]),
            "peak_memory_bytes": max(peak_memory() or 0, progress["peak_memory_bytes"] or 0) or None,
            "start_seconds": progress.get("start_seconds"),
            "phase_change": progress["transitions"][0] if progress["transitions"] else None,
            "loss": progress["loss"],
            "evaluations": progress.get("evaluations", []),
            "best_step": progress.get("best_step"),
            "stopped_early": progress.get("stopped_early", False),
            "seconds": metrics.get("seconds", 0.0) + time.perf_counter() - started,
        }
        by_main(lambda: folder.write_metrics(metrics))
        log.info("finished")
    return Result(folder, metrics, model)


def _record_scores(
    record: dict[str, Any], job: Job, scores: dict[str, dict[str, float]], when: Literal["before", "after"]
) -> None:
    record[when] = job.average(scores)
    if job.is_suite:
        for name, metrics in scores.items():
            record["tasks"][name][when] = metrics
            listed = ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
            log.info("%s %s training: %s", name, when, listed)
    log.info("%s %s training: %.4f", job.task.metric, when, record[when])


def _trained(
    job: Job, base: Any, made_of: Fingerprint, stop: Stop, engine: Engine, score_before: Callable[[Any], None]
) -> tuple[Any, dict[str, Any]]:
    """The model after its last step, and the progress that was recorded.

    A model that no process has whole is scored before its first step, when it is sharded.
    """
    if job.method.trains == "nothing":
        return base.to(current_device()), begun()
    folder = job.folder
    dropped = by_main(folder.drop_incomplete)
    if dropped:
        log.info("removed half-written %s", ", ".join(dropped))
    last = by_main(folder.last_complete)
    if last is not None:
        check_continues(engine, last[1], last[0])
    if last is not None and job.adapter_config is not None:
        check_adapter(last[0])
    if last is not None and (last[1]["step"] >= job.steps or last[1].get("stopped_early")):
        # Trainer, given a checkpoint of the last step, would take one more.
        best = folder.checkpoint(last[1].get("best_step") or last[1]["step"])
        ended = best if best.is_dir() else last[0]
        if job.adapter_config is None:
            model = type(base).from_pretrained(ended)
        else:
            check_onto(ended, check_adapter(ended), job.load_skeleton(), job.recipe.model.name)
            model = put_onto(base, ended, job.recipe.model.name, is_trainable=True)
            take_out_start(model, folder.start)
        return model.to(current_device()), last[1]

    recipe = job.recipe
    set_seed(recipe.seed)
    if recipe.training.gradient_checkpointing:
        base.gradient_checkpointing_enable()
    started = time.perf_counter()
    model = _adapted(job, base, last[0] if last else None)
    start_seconds = time.perf_counter() - started
    loss = loss_of_share(loss_without_cache if recipe.task.packing else loss_of_output)
    schedule = TsdCallback(batches=recipe.training.start_batches, loss=loss) if recipe.uses_directions else None
    if last is not None and job.adapter_config is not None:
        check_fits(last[0], model, "default")
    record = Record(folder, job.steps, made_of, stop, schedule, last[1] if last else None)
    record.progress.setdefault("start_seconds", start_seconds)
    record.progress |= {} if engine.name == "none" else {"engine": engine.name, "processes": launched()}
    patience = recipe.evaluation.patience
    # The record comes first, so that its seconds a step leave the transition out; trackers after the schedule, so that
    # they show what it logs.
    callbacks = [
        *([BeforeTraining(score_before)] if engine.is_sharded else []),
        record,
        *([schedule] if schedule else []),
        *trackers(recipe.training.report_to, folder),
        *([EarlyStop(patience, record, folder)] if patience else []),
    ]
    trainer = make_trainer(job, model, base, callbacks)
    if is_adalora(job.adapter_config):
        trainer.add_callback(AdaLoraCallback())
    trainer.remove_callback(PrinterCallback)
    with warnings.catch_warnings():
        # A run that is stopped in its pre-launch is going to be continued.
        warnings.simplefilter("ignore", PrelaunchWarning)
        warnings.filterwarnings("ignore", NO_CONFIG)
        try:
            trainer.train(resume_from_checkpoint=str(last[0]) if last else None)
        except TransitionError as error:
            raise RecipeError(f"{error} Lower optimizer.learning_rate, or use model.dtype=float32.") from None
        except (UnpicklingError, ValueError, KeyError, TypeError, RuntimeError) as error:
            if last is None or is_of_another(error) or (record.took_steps and not isinstance(error, UnpicklingError)):
                raise
            raise RecipeError(
                f"{str(last[0])!r} cannot be continued from: {one_line(error)}; remove it, and resume=true continues "
                "from the checkpoint before it, or from the beginning"
            ) from None
        finally:
            record.close()
    return model, record.progress


def _adapted(job: Job, base: Any, checkpoint: Path | None) -> Any:
    """The model that is trained: from its start, or as a checkpoint's weights are then put into it."""
    if job.adapter_config is None:
        return base.requires_grad_(True)
    if not job.method.from_batches:
        return get_peft_model(base, job.adapter_config)
    kept = job.folder.start
    if checkpoint is None:
        by_main(lambda: shutil.rmtree(kept, ignore_errors=True))
        base.to(current_device())
        number = job.recipe.training.start_batches or START_BATCHES
        # Each process starts from the rows of all, and so finds what one would.
        batches = first_batches(number, make_trainer(job, base, base, []).get_train_dataloader(whole=True))
        if job.recipe.task.packing:
            batches = [without_cache(batch) for batch in batches]
        return start_from_batches(base, job.adapter_config, batches, kept)
    # EVA has given ranks to layers, which stand in the configuration that was saved.
    config = check_adapter(checkpoint)
    config.inference_mode = False
    model = get_peft_model(base, config)
    take_out_start(model, kept)
    return model


def _count(model: Any, job: Job) -> tuple[int, int]:
    """Numbers trained, and numbers in the model."""
    if isinstance(model, PeftModel):
        trainable, total = model.get_nb_trainable_parameters()
        return trainable, total
    total = model.num_parameters()
    return (total if job.method.trains == "model" else 0), total


def _keep(job: Job, model: Any, state: dict[str, Any] | None, made_of: Fingerprint) -> None:
    """Save and export what was trained, where that is not there yet."""
    folder = job.folder

    def save(path: Path) -> None:
        _save(model, state, job.tokenizer, path)
        put_start_in(path, folder.start)

    kept = {"adapter": folder.adapter, "model": folder.model}.get(job.method.trains)
    if kept is not None and not kept.exists():
        write_folder(kept, save)
    if job.method.directions == "own" and not folder.adapter_lora.exists():
        # From the folder, so that the tokenizer comes along.
        log.info("exported %s", export_lora(folder.adapter, folder.adapter_lora))
    for adapter in (folder.adapter, folder.adapter_lora):
        if adapter.exists() and not (adapter / ORIGIN).exists():
            write_origin(adapter, made_of)


def _save(model: Any, state: dict[str, Any] | None, tokenizer: Any, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", NO_CONFIG)
        model.save_pretrained(path, state_dict=state)
    tokenizer.save_pretrained(path)
