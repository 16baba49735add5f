"""TRL's SFTTrainer for conversations: its batches without padding, its loss without whole logits, its metrics.

Rows come to it as tokens with labels (`tasks.chat`): a run counts its steps, and refuses what cannot be trained,
before a weight is read.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments

from .evaluated import Evaluated


def sft_arguments(packing: bool, **settings: Any) -> TrainingArguments:
    """`TrainingArguments` as TRL has them, with nothing but `settings` set in TRL's own way."""
    from trl import SFTConfig

    return SFTConfig(
        **settings,
        gradient_checkpointing=False,  # the run has asked the model for it
        max_length=None,  # rows have been cut and packed
        padding_free=packing,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def sft_trainer(model: Any, args: TrainingArguments, rows: Any, held_out: Any, tokenizer: Any, **given: Any) -> Any:
    """SFTTrainer, which evaluates by what a run scores; `given` is passed on to it.

    TRL casts what is trained on quantized weights to bfloat16, where steps of Δσ are lost; it stays what PEFT made it.
    """
    from datasets import Dataset
    from trl import SFTTrainer

    class EvaluatedSFTTrainer(Evaluated, SFTTrainer):
        pass

    trained = {p: p.dtype for p in model.parameters() if p.requires_grad}
    trainer = EvaluatedSFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(held_out) if held_out else None,
        processing_class=tokenizer,
        **given,
    )
    for parameter, dtype in trained.items():
        parameter.data = parameter.data.to(dtype)
    return trainer
