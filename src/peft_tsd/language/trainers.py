"""The Trainer of a run, as its recipe says."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerCallback

from ..distributed.sharded import world
from ..runs.machine import current_device
from ..schedule.gradients import random_states_kept
from .batches import SimilarLengthsTrainer
from .evaluated import EvaluatedTrainer
from .preparing import Job
from .sft import sft_arguments, sft_trainer
from .tasks.generation import Causal

SHARDED = {"state_dict_type": "SHARDED_STATE_DICT"}
"""Of FSDP: each process writes its part of a checkpoint, and none needs the whole for it."""


def make_trainer(job: Job, model: Any, base: Any, callbacks: list[TrainerCallback]) -> EvaluatedTrainer:
    """The Trainer of a run.

    Args:
        job: The run.
        model: What is trained.
        base: The same without its adapter.
        callbacks: In their order.

    Raises:
        RecipeError: The model's loss cannot be shared out over processes.
    """
    trainer = _trainer(job, model, base, callbacks)
    trainer.check_shares()
    return trainer


def _trainer(job: Job, model: Any, base: Any, callbacks: list[TrainerCallback]) -> EvaluatedTrainer:
    by_tokens = isinstance(job.task, Causal)
    if job.recipe.task.family == "chat":
        return cast(
            EvaluatedTrainer,
            sft_trainer(
                model,
                _arguments(job),
                job.rows,
                job.held_out,
                job.tokenizer,
                measure=partial(_measured, job),
                by_tokens=by_tokens,
                callbacks=callbacks,
            ),
        )
    return (SimilarLengthsTrainer if job.recipe.training.similar_lengths else EvaluatedTrainer)(
        model=model,
        args=_arguments(job),
        train_dataset=job.rows,
        eval_dataset=job.held_out,
        measure=partial(_measured, job),
        by_tokens=by_tokens,
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


def _arguments(job: Job) -> TrainingArguments:
    recipe, (_, size) = job.recipe, world()
    # An adapter is kept in float32 by PEFT, beside base weights of the recipe's dtype; without one, autocast does it.
    casts = recipe.model.dtype if job.method.trains == "model" else "float32"
    chat = recipe.task.family == "chat"
    make = partial(sft_arguments, recipe.task.packing) if chat else TrainingArguments
    # A last batch that is not full stays so.
    together: dict[str, Any] = {"accelerator_config": {"even_batches": False}} if size > 1 else {}
    if recipe.training.sharding == "fsdp2":
        together |= {"fsdp": "full_shard auto_wrap", "fsdp_config": {"version": 2, **SHARDED}}
    if recipe.training.deepspeed is not None:
        together["deepspeed"] = recipe.training.deepspeed
    arguments = make(
        output_dir=str(job.folder.checkpoints),
        max_steps=job.steps,
        per_device_train_batch_size=recipe.training.batch_size // size,
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
        **together,
    )
    if recipe.evaluation.patience is not None:
        # Trainer asks for saving at multiples of the evaluations; `EarlyStop` saves whenever one is the best so far.
        arguments.load_best_model_at_end = True
    # Each process has one device; Trainer would take every GPU it sees by DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
