"""Everything about a run that can be refused before a weight is read: on the model's configuration alone."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from tqdm.auto import tqdm
from transformers import PreTrainedModel, set_seed
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from ..distributed.passes import moves_as_one
from ..distributed.sharded import is_main_process
from ..errors import RecipeError, check_choice
from ..models.finding import Source, locate, recorded_name
from ..models.loading import check_target_modules, load_config, load_model, load_skeleton, load_tokenizer
from ..recipes.adapters import adapter_config
from ..recipes.methods import METHODS, Row
from ..runs.disk import check_disk
from ..runs.folder import RunFolder
from ..runs.machine import environment
from ..tuner.config import without_weights
from .engines import check_processes
from .recipe import Recipe
from .sections import SUITES
from .shares import own_share, shared_out, shares
from .tasks import Family, load_task
from .tasks.classification import Classification
from .tasks.cut import Cut
from .tasks.generation import IGNORED
from .tasks.material import Material
from .watching import check_trackers


class Job(NamedTuple):
    """A recipe that was found possible, and what was learned on the way."""

    recipe: Recipe
    task: Family
    material: Material
    rows: list[dict[str, Any]]
    """The training examples as tokens; empty where nothing will be trained."""
    held_out: list[dict[str, Any]]
    """What is scored, with its answers, as tokens; empty where nothing will be trained."""
    validation: list[dict[str, Any]]
    """The same of the rows held out of training, where these are not what is scored."""
    tokenizer: Any
    adapter_config: PeftConfig | None
    """None where the method has no adapter."""
    steps: int
    folder: RunFolder
    load_base: Callable[[], Any]
    load_skeleton: Callable[[], Any]
    """The base without its weights."""

    @property
    def method(self) -> Row:
        return METHODS[self.recipe.method]

    @property
    def is_suite(self) -> bool:
        return self.recipe.task.family in SUITES

    @property
    def asked(self) -> dict[str, list[Any]]:
        """The rows that the metric is taken of, by task."""
        return {name: rows[: self.recipe.evaluation.metric_rows] for name, rows in self.material.tests.items()}

    @property
    def questions(self) -> int:
        return sum(map(len, self.asked.values()))

    def scores(
        self, model: Any, title: str, on_batch: Callable[[], None] = lambda: None, *, keep: bool = True
    ) -> dict[str, dict[str, float]]:
        """Every metric of every task; `keep` leaves the progress bar on the screen."""
        model.eval()
        found = {}
        mine = sum(len(own_share(examples, model)) for examples in self.asked.values())
        bar = tqdm(total=mine, desc=title, unit="question", leave=keep, disable=not is_main_process())
        as_one = moves_as_one(model)  # then none stops before the others

        def done(questions: int) -> None:
            bar.update(questions)
            if not as_one:
                on_batch()

        def answers(examples: list[Any]) -> list[Any]:
            size = self.recipe.evaluation.batch_size
            return self.task.answers(model, self.tokenizer, examples, size, done) if examples else []

        with self._casting(model), bar:
            for name, examples in self.asked.items():
                parts = shared_out(examples, answers, model)
                found[name] = self.task.metrics(list(chain(*shares(examples, model))), list(chain(*parts)))
        return found

    def held_out_loss(self, model: Any) -> float | None:
        """The mean loss of what is scored; see `loss_of`."""
        return self.loss_of(model, self.held_out)

    @torch.no_grad()
    def loss_of(self, model: Any, rows: list[dict[str, Any]]) -> float | None:
        """The mean loss of `rows`: over tokens of the answers, or over rows of a classifier.

        Rows whose answer could not be trained on are left out; None where that is all of them. The model is left in
        evaluation mode, as by `scores`.
        """
        model.eval()
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        collate = self.task.collator(self.tokenizer, base)
        size = self.recipe.evaluation.batch_size

        def summed(rows: list[Any]) -> tuple[float, int]:
            total, count = 0.0, 0
            for start in range(0, len(rows), size):
                part = collate(rows[start : start + size])
                batch = {key: x.to(model.device) for key, x in part.items()}
                answered = int(batch["labels"].ne(IGNORED).sum())
                total += float(model(**batch).loss) * answered
                count += answered
            return total, count

        with self._casting(model):
            parts = shared_out(rows, summed, model)
        count = sum(number for _, number in parts)
        return sum(total for total, _ in parts) / count if count else None

    def _casting(self, model: Any) -> torch.autocast:
        dtype = getattr(torch, self.recipe.model.dtype)
        # Full fine-tuning keeps its weights in float32 and computes in the recipe's dtype.
        return torch.autocast(model.device.type, dtype, enabled=next(model.parameters()).dtype != dtype)

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
    held_out: list[dict[str, Any]]
    validation: list[dict[str, Any]]


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
        _checked(recipe, known[key], RunFolder(recipe.output), to_train=True)


def prepare(recipe: Recipe, *, to_train: bool = True) -> Job:
    """Find out that a recipe can be carried out, without reading or fetching a weight."""
    folder = RunFolder(recipe.output)
    if to_train and not recipe.resume:
        folder.check_free()
    read = _read(recipe, to_train=to_train)
    source, task, material, config, tokenizer, rows, held_out, validation = read
    if isinstance(task, Classification):
        resolved = recipe.task.model_copy(update={"labels": task.labels})
        recipe = recipe.model_copy(update={"task": resolved})
    if to_train and recipe.resume:
        folder.check_resumable(recipe)
    steps, adapter = _checked(recipe, read, folder, to_train=to_train)

    def load_base() -> Any:
        # A classifier's new head is drawn here, and must be the same whenever the run is continued or scored.
        set_seed(recipe.seed)
        trains_model = to_train and METHODS[recipe.method].trains == "model"
        dtype = "float32" if trains_model else recipe.model.dtype
        model = load_model(source, config, task.auto_class, dtype, recipe.model.quantization)
        # What the saved adapter and its card name as the base model; a GGUF file would have it called by its title.
        model.name_or_path = model.config._name_or_path = recorded_name(recipe.model.name)
        return model

    def skeleton() -> Any:
        return load_skeleton(config, task.auto_class, trust_remote_code=recipe.model.trust_remote_code)

    return Job(
        recipe, task, material, rows, held_out, validation, tokenizer, adapter, steps, folder, load_base, skeleton
    )


def _read(recipe: Recipe, *, to_train: bool) -> _Read:
    check_choice("optimizer.name", recipe.optimizer.name, [name.value for name in OptimizerNames])
    check_choice("optimizer.schedule", recipe.optimizer.schedule, [name.value for name in SchedulerType])
    if to_train:
        check_processes(recipe)
        check_trackers(recipe.training.report_to)
    model = recipe.model
    source = locate(
        model.name,
        revision=model.revision,
        quantization=model.quantization,
        trust_remote_code=model.trust_remote_code,
    )
    task, material = load_task(recipe, to_train=to_train)
    config = load_config(source, **task.config_fields)
    tokenizer = load_tokenizer(source)
    cut, cut_held_out = Cut(), Cut()
    rows = task.encode(material.train, tokenizer, cut=cut) if to_train else []
    tests = [example for examples in material.tests.values() for example in examples]
    held_out = task.encode(tests, tokenizer, leave_out=True, cut=cut_held_out) if to_train else []
    # Scored rows may be these same.
    also = material.validation if to_train and recipe.evaluation.on == "test" else []
    validation = task.encode(also, tokenizer, leave_out=True) if also else []
    most = recipe.task.max_length
    notes = cut.notes(most, len(material.train), "training rows", task.loses)
    notes += cut_held_out.notes(most, len(tests), "rows to score on", task.loses)
    material = material._replace(notes=[*material.notes, *notes])
    if config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return _Read(source, task, material, config, tokenizer, rows, held_out, validation)


def _checked(recipe: Recipe, read: _Read, folder: RunFolder, *, to_train: bool) -> tuple[int, PeftConfig | None]:
    """The optimizer steps and the adapter of a run that can be carried out.

    Raises:
        RecipeError: It cannot.
    """
    # Packed conversations are fewer rows.
    steps = recipe.training.total_steps(len(read.rows) if to_train else len(read.material.train))
    if to_train:
        recipe.check_length(steps)
        if recipe.evaluation.patience is not None and not read.held_out:
            raise RecipeError(
                f"evaluation.patience={recipe.evaluation.patience} waits for a lower held-out loss, and no answer of "
                f"the rows that are scored fits into task.max_length={recipe.task.max_length}; raise that"
            )
    skeleton = load_skeleton(read.config, read.task.auto_class, trust_remote_code=recipe.model.trust_remote_code)
    adapter = adapter_config(recipe, read.task.peft_task_type, steps)
    trained = _fit(recipe, adapter, skeleton)
    if to_train:
        check_disk(recipe, folder, trained, steps)
    return steps, adapter


def _fit(recipe: Recipe, adapter: PeftConfig | None, skeleton: PreTrainedModel) -> int:
    """Numbers that a run would train; raises RecipeError where the adapter does not fit the model."""
    if adapter is None:
        trains_model = METHODS[recipe.method].trains == "model"
        return sum(p.numel() for p in skeleton.parameters()) if trains_model else 0
    check_target_modules(recipe.adapter.target_modules, skeleton)
    try:
        adapted = get_peft_model(skeleton, without_weights(copy.deepcopy(adapter)), low_cpu_mem_usage=True)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise RecipeError(f"adapter: {' '.join(str(error).split())}") from None
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def facts_of(job: Job) -> dict[str, Any]:
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
