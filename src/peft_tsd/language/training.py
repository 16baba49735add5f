"""A run: from a recipe to a scored adapter in a folder.

Everything that can be refused is refused first, on the model's configuration alone (`preparing`). Then weights are
read, the model is scored, transformers' Trainer trains the adapter, and the adapter is saved, exported and scored.
"""

from __future__ import annotations

import shutil
import time
import warnings
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, NamedTuple, cast

import torch
from peft import PeftModel, get_peft_model
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from ..errors import RecipeError, TransitionError, one_line
from ..export.lora import export_lora
from ..files.adapters import ORIGIN
from ..files.whole import write_folder
from ..models.origin import Fingerprint, fingerprint, read_fingerprint, write_origin
from ..recipes.adapters import AdaLoraCallback, is_adalora
from ..runs.disk import room_in
from ..runs.folder import RunFolder
from ..runs.log import log, logging_to
from ..runs.machine import check_one_process, current_device, peak_memory
from ..runs.stopping import Stop, interruptible
from ..schedule.callback import START_BATCHES, TsdCallback, first_batches
from ..schedule.gradients import loss_of_output, random_states_kept
from ..tuner.checking import check_adapter, check_fits, check_onto
from ..tuner.opening import put_onto
from ..tuner.phase import PrelaunchWarning
from .batches import SimilarLengthsTrainer
from .evaluated import EvaluatedTrainer
from .preparing import Job, facts_of, prepare
from .progress import Record, begun
from .recipe import Recipe
from .sft import sft_arguments, sft_trainer
from .starts import put_start_in, start_from_batches, take_out_start
from .tasks.classification import Classification
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
    """Do the run a recipe describes, or continue it.

    Raises:
        RecipeError: The recipe cannot be carried out, and nothing was written; or the run can be continued once what
            the message says was done.
        Interrupted: The run was stopped; it can be continued.
    """
    check_one_process()
    with interruptible(Path(recipe.output)) as stop:
        job = prepare(recipe)
        stop.check()
        return _run(job, stop)


def _run(job: Job, stop: Stop) -> Result:
    recipe, folder = job.recipe, job.folder
    facts = facts_of(job)
    if not recipe.resume:
        score: dict[str, Any] = {"metric": job.task.metric, "questions": job.questions}
        if job.is_suite:
            score["tasks"] = {name: {"questions": len(rows)} for name, rows in job.asked.items()}
            score["left_out"] = job.material.left_out
        folder.create(recipe, {"status": "running", **facts, "score": score})
    with folder.locked(), room_in(folder):
        return _continue(job, facts, stop)


def _continue(job: Job, facts: dict[str, Any], stop: Stop) -> Result:
    """Do what is left of the run: all of it, at first."""
    recipe, folder = job.recipe, job.folder
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
            [tests] = job.asked.values()
            metrics["score"]["majority"] = job.task.majority(tests)
        if recipe.evaluation.before and "before" not in metrics["score"]:
            scores = job.scores(base.to(current_device()), "scoring before training", stop.check)
            _record_scores(metrics["score"], job, scores, "before")
            folder.write_metrics(metrics)

        model, progress = _trained(job, base, made_of, stop)
        stop.check()

        def save(path: Path) -> None:
            _save(model, job.tokenizer, path)
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

        _record_scores(metrics["score"], job, job.scores(model, "scoring after training", stop.check), "after")
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
        folder.write_metrics(metrics)
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


def _trained(job: Job, base: Any, made_of: Fingerprint, stop: Stop) -> tuple[Any, dict[str, Any]]:
    """The model after its last step, and the progress that was recorded."""
    if job.method.trains == "nothing":
        return base.to(current_device()), begun()
    folder = job.folder
    dropped = folder.drop_incomplete()
    if dropped:
        log.info("removed half-written %s", ", ".join(dropped))
    last = folder.last_complete()
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
    # Without a cache, as Trainer trains: with one, packed conversations would see each other.
    loss = _loss_without_cache if recipe.task.packing else loss_of_output
    schedule = TsdCallback(batches=recipe.training.start_batches, loss=loss) if recipe.uses_directions else None
    if last is not None and job.adapter_config is not None:
        check_fits(last[0], model, "default")
    record = Record(folder, job.steps, made_of, stop, schedule, last[1] if last else None)
    record.progress.setdefault("start_seconds", start_seconds)
    patience = recipe.evaluation.patience
    # The record comes first, so that its seconds a step leave the transition out; trackers after the schedule, so that
    # they show what it logs.
    callbacks = [
        record,
        *([schedule] if schedule else []),
        *trackers(recipe.training.report_to, folder),
        *([EarlyStop(patience, record, folder)] if patience else []),
    ]
    trainer = _trainer(job, model, base, callbacks)
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
            if last is None or (record.took_steps and not isinstance(error, UnpicklingError)):
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
        shutil.rmtree(kept, ignore_errors=True)
        base.to(current_device())
        number = job.recipe.training.start_batches or START_BATCHES
        batches = first_batches(number, _trainer(job, base, base, []).get_train_dataloader())
        return start_from_batches(base, job.adapter_config, batches, kept)
    # EVA has given ranks to layers, which stand in the configuration that was saved.
    config = check_adapter(checkpoint)
    config.inference_mode = False
    model = get_peft_model(base, config)
    take_out_start(model, kept)
    return model


def _trainer(job: Job, model: Any, base: Any, callbacks: list[TrainerCallback]) -> EvaluatedTrainer:
    if job.recipe.task.family == "chat":
        return cast(
            EvaluatedTrainer,
            sft_trainer(
                model,
                _training_arguments(job),
                job.rows,
                job.held_out,
                job.tokenizer,
                measure=partial(_measured, job),
                callbacks=callbacks,
            ),
        )
    return (SimilarLengthsTrainer if job.recipe.training.similar_lengths else EvaluatedTrainer)(
        model=model,
        args=_training_arguments(job),
        train_dataset=job.rows,
        eval_dataset=job.held_out,
        measure=partial(_measured, job),
        data_collator=job.task.collator(job.tokenizer, base),
        callbacks=callbacks,
    )


def _measured(job: Job, model: Any) -> dict[str, float]:
    """What an evaluation during training says."""
    with random_states_kept():
        loss = job.held_out_loss(model)
        measured = {} if loss is None else {"loss": loss}
        if job.recipe.evaluation.during == "all":
            measured[job.task.metric] = job.average(job.scores(model, "evaluating", keep=False))
    return measured


def _loss_without_cache(model: Any, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = model(**batch, use_cache=False).loss
    return loss


def _count(model: Any, job: Job) -> tuple[int, int]:
    """Numbers trained, and numbers in the model."""
    if isinstance(model, PeftModel):
        trainable, total = model.get_nb_trainable_parameters()
        return trainable, total
    total = model.num_parameters()
    return (total if job.method.trains == "model" else 0), total


def _training_arguments(job: Job) -> TrainingArguments:
    recipe = job.recipe
    # An adapter is kept in float32 by PEFT, beside base weights of the recipe's dtype; without one, autocast does it.
    casts = recipe.model.dtype if job.method.trains == "model" else "float32"
    chat = recipe.task.family == "chat"
    make = partial(sft_arguments, recipe.task.packing) if chat else TrainingArguments
    arguments = make(
        output_dir=str(job.folder.checkpoints),
        max_steps=job.steps,
        per_device_train_batch_size=recipe.training.batch_size,
        gradient_accumulation_steps=recipe.training.gradient_accumulation,
        optim=recipe.optimizer.name,
        learning_rate=recipe.optimizer.learning_rate,
        weight_decay=recipe.optimizer.weight_decay,
        lr_scheduler_type=recipe.optimizer.schedule,
        warmup_steps=recipe.optimizer.warmup(job.steps),
        max_grad_norm=recipe.optimizer.max_grad_norm,
        bf16=casts == "bfloat16",
        fp16=casts == "float16",
        use_cpu=current_device().type == "cpu",
        save_strategy="steps" if job.method.resumes else "no",
        save_steps=recipe.training.save_every,
        eval_strategy="no" if recipe.evaluation.every is None else "steps",
        eval_steps=recipe.evaluation.every,
        metric_for_best_model=None if recipe.evaluation.patience is None else "loss",
        save_total_limit=recipe.training.keep_checkpoints,
        # Every step: an average over several would break where a run is continued.
        logging_steps=1,
        logging_nan_inf_filter=False,
        seed=recipe.seed,
        report_to="none",  # they are put in by `trackers`
        run_name=job.folder.path.name,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if recipe.evaluation.patience is not None:
        # Trainer asks for saving at multiples of the evaluations; `EarlyStop` saves whenever one is the best so far.
        arguments.load_best_model_at_end = True
    # A run is one process on one device; Trainer would take every GPU it sees by DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _save(model: Any, tokenizer: Any, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", NO_CONFIG)
        model.save_pretrained(path)
    tokenizer.save_pretrained(path)
