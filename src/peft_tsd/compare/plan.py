"""Which runs a comparison is made of: every method at every rank, on every task, with every seed.

Instead of methods, variants can be compared: rows of the recipe's choice of `variant`, each with a method and whatever
else belongs to it, under a name of its own. So one method can stand there several times.

What differs between two runs is in a cell; everything else is the recipe's. So every method trains on the same rows in
the same order, for the same number of steps, and is scored alike.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import InputError, did_you_mean
from ..language.recipe import Recipe, load_recipe
from ..recipes.methods import METHODS as KNOWN
from ..recipes.reading import choices_of
from ..recipes.shared import OF_A_RESTART, Directions

METHODS = ("base", "full", "lora", "dora", "pissa", "adalora", "lora-dash", "lora-init", "lora-tsd")
"""What is compared by default."""

LEARNING_RATE = "optimizer.learning_rate"

MORE_METHODS = tuple(name for name in KNOWN if name not in METHODS)

# What each method makes use of under `directions`; varying the others would repeat a run under another name.
_ALL = set(Directions.model_fields)

USED = {
    "lora-dash": _ALL - OF_A_RESTART,
    "lora-init": _ALL - {"num_directions", "direction_budget", "max_directions", "dash_lr_ratio", "dash_unit"},
    "lora-tsd": _ALL,
    **{method: _ALL - OF_A_RESTART for method in MORE_METHODS if KNOWN[method].directions == "beside"},
}


class Cell(NamedTuple):
    """One run."""

    task: str | None
    """A row of the recipe's `task` choice, where it has one."""
    method: str
    rank: int | None
    """None where the method has none."""
    variation: tuple[tuple[str, Any], ...]
    """Keys that are varied besides, with their values."""
    seed: int
    variant: str | None = None
    """A row of the recipe's `variant` choice, where these are compared."""

    @property
    def group(self) -> Group:
        """What this run shares with those of other tasks and seeds."""
        return Group(self.method, self.rank, self.variation, self.variant)

    @property
    def path(self) -> str:
        """Where it lies under the runs of a comparison."""
        parts = [self.task, self.group.label.replace(", ", "-").replace(" ", "-"), f"seed-{self.seed}"]
        return "/".join(re.sub(r"[^\w.=+-]", "_", part) for part in parts if part)


class Group(NamedTuple):
    """What is compared."""

    method: str
    rank: int | None
    variation: tuple[tuple[str, Any], ...]
    variant: str | None = None

    @property
    def name(self) -> str:
        """The variant's, or the method's."""
        return self.variant or self.method

    @property
    def rate(self) -> float | None:
        """The learning rate, where it is varied."""
        return dict(self.variation).get(LEARNING_RATE)

    @property
    def label(self) -> str:
        rank = "" if self.rank is None else f" r{self.rank}"
        return self.name + rank + "".join(f", {key.rpartition('.')[2]}={value}" for key, value in self.variation)

    def without(self, key: str) -> Group:
        """The group that this one is a part of, where `key` is not told apart."""
        return self._replace(variation=tuple(pair for pair in self.variation if pair[0] != key))


class Tuning(NamedTuple):
    """A setting that is chosen for every method alike, on rows held out of training."""

    key: str
    values: tuple[Any, ...]


class Variant(NamedTuple):
    """What is compared, at each rank and with each seed."""

    name: str | None
    """A row of the recipe's `variant` choice; None for a method as the recipe has it."""
    method: str
    rank: int | None = None
    """Its own, where the plan's ranks are not given."""


class Plan(NamedTuple):
    """A comparison, before it is run."""

    recipe: str
    overrides: tuple[str, ...]
    methods: tuple[str, ...]
    ranks: tuple[int, ...]
    seeds: tuple[int, ...]
    tasks: tuple[str | None, ...]
    variations: tuple[tuple[tuple[str, Any], ...], ...]
    tuning: Tuning | None
    validation_size: int
    variants: tuple[Variant, ...] = ()
    """In place of `methods`, which then are theirs."""

    def _compared(self) -> Sequence[Variant]:
        return self.variants or [Variant(None, method) for method in self.methods]

    def cells(self) -> list[Cell]:
        """All runs, seed by seed: what is done when a comparison is stopped is a smaller one."""
        return list(dict.fromkeys(self._cells(self.seeds, self.ranks)))

    def tuned_cells(self) -> list[Cell]:
        """The settings that are tuned: each method on each task, at the first rank and with the first seed."""
        cells = dict.fromkeys(self._cells(self.seeds[:1], self.ranks[:1]))
        return [cell for cell in cells if cell.method != "base"] if self.tuning else []

    def _cells(self, seeds: Sequence[int], ranks: Sequence[int]) -> Iterator[Cell]:
        for seed, task, variant in itertools.product(seeds, self.tasks, self._compared()):
            name, method, own_rank = variant
            for rank, variation in itertools.product([own_rank] if own_rank else ranks, self.variations):
                used = tuple(pair for pair in variation if _uses(method, pair[0]))
                yield Cell(task, method, rank if KNOWN[method].has_rank else None, used, seed, name)

    def tuned_cell(self, cell: Cell) -> Cell:
        """The one whose tuning `cell` goes by."""
        return cell._replace(seed=self.seeds[0], rank=self.ranks[0] if cell.rank in self.ranks else cell.rank)

    def recipe_of(self, cell: Cell, output: str, tuned: Any = None, *, validate: bool = False) -> Recipe:
        """The recipe of a run.

        Args:
            cell: Which run.
            output: Its folder.
            tuned: The value of the tuned setting.
            validate: Score the rows held out of training, not the test rows.

        Raises:
            InputError: As `load_recipe`.
        """
        overrides = [] if cell.task is None else [f"task={cell.task}"]
        overrides += [] if cell.variant is None else [f"variant={cell.variant}"]
        settings: dict[str, Any] = {}
        known = choices_of(self.recipe).get("rank")
        if cell.rank is not None and known and str(cell.rank) in known.table:
            # Such a row may hold a learning rate too.
            overrides.append(f"rank={cell.rank}")
        elif cell.rank is not None:
            adapter = load_recipe(self.recipe, [*overrides, *self.overrides]).adapter
            settings["adapter.r"] = cell.rank
            settings["adapter.lora_alpha"] = round(cell.rank * adapter.lora_alpha / adapter.r)
        settings |= dict(cell.variation)
        if self.tuning is not None:
            settings["data.validation_size"] = self.validation_size
            if tuned is not None:
                settings[self.tuning.key] = tuned
        settings |= {
            "method": cell.method,
            "seed": cell.seed,
            "evaluation.before": False,
            "evaluation.on": "validation" if validate else "test",
            "output": output,
        }
        return load_recipe(self.recipe, [*overrides, *self.overrides], settings)


def _uses(method: str, key: str) -> bool:
    section, _, name = key.rpartition(".")
    if section == "directions":
        return name in USED.get(method, ())
    if section in ("optimizer", "training") and KNOWN[method].trains == "nothing":
        return False
    return not (section == "adapter" and not KNOWN[method].has_rank)


def make_plan(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    methods: Sequence[str] | None = None,
    variants: Sequence[str] | None = None,
    ranks: Sequence[int] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    tasks: Sequence[str] | None = None,
    rates: Sequence[float] | None = None,
    vary: Mapping[str, Sequence[Any]] | None = None,
    tune: tuple[str, Sequence[Any]] | None = None,
    validation_size: int = 200,
) -> Plan:
    """Check what is to be compared.

    Args:
        recipe: A YAML file, or a shipped recipe's name.
        overrides: `key=value` each, for every run.
        methods: Of `METHODS` and `MORE_METHODS`; the former without them and `variants`.
        variants: In place of methods, rows of the recipe's `variant` choice.
        ranks: LoRA's r; α stays in the recipe's proportion to it. The recipe's own without it.
        seeds: Of the data order, the adapter's start, a classifier's new head.
        tasks: Rows of the recipe's `task` choice; its default without it.
        rates: Learning rates: every run is done with each. The results then show held-out losses over the rate.
        vary: Further keys with their values; every combination is run, of the methods that use the key.
        tune: A key (`lr` is `optimizer.learning_rate`) and its values. Each method is trained with each value on each
            task, at the first rank and with the first seed, and keeps the value with the lowest loss on rows held
            out of training.
        validation_size: How many rows those are; held out in every run of a tuned comparison.

    Raises:
        InputError: Something is unknown, empty or given twice.
    """
    choices = choices_of(recipe)
    for override in overrides:
        key = override.partition("=")[0]
        if key in _SWEPT:
            raise InputError(f"{override!r}: compare sets {key} itself; {_SWEPT[key]}")
    lists = (("methods", methods), ("variants", variants), ("ranks", ranks), ("seeds", seeds), ("tasks", tasks))
    for name, given in (*lists, ("rates", rates)):
        if given is not None and (not given or len(set(given)) < len(given)):
            raise InputError(f"--{name} must name one or more, each once; got {', '.join(map(str, given)) or 'none'}")
    if methods is not None and variants is not None:
        raise InputError("--methods and --variants are two ways to say what is compared; give one of them")
    for method in methods or ():
        if method not in (known := METHODS + MORE_METHODS):
            raise InputError(f"--methods: {method!r} is no method{did_you_mean(method, known)}")
    for name, rows in (("task", tasks), ("variant", variants)):
        if rows is not None and name not in choices:
            given = ",".join(rows)
            raise InputError(f"--{name}s={given}: the recipe {recipe!r} has no choice of {name}; leave it out")
        for row in rows or ():
            if row not in (table := choices[name].table):
                raise InputError(f"--{name}s: the recipe has no {row!r}{did_you_mean(row, table)}")
    made = [(name, load_recipe(recipe, [f"variant={name}", *overrides])) for name in variants or ()]
    own_variants = tuple(Variant(name, one.method, None if ranks else one.adapter.r) for name, one in made)
    if made:
        methods = list(dict.fromkeys(one.method for _, one in made))
    vary = {**({} if rates is None else {LEARNING_RATE: rates}), **(vary or {})}
    own = load_recipe(recipe, overrides)
    default_task = choices["task"].default if "task" in choices else None
    varied = [[(key, value) for value in values] for key, values in vary.items()]
    for key in (*vary, *((tune[0],) if tune else ())):
        if key in _SWEPT:
            raise InputError(f"{key!r} can be neither varied nor tuned; {_SWEPT[key]}")
    tuning = None
    if tune is not None:
        key, values = tune
        tuning = Tuning({"lr": LEARNING_RATE}.get(key, key), tuple(values))
        if tuning.key in vary:
            raise InputError(f"{tuning.key} is varied, and cannot be tuned too; give --rates or --vary, or --tune")
        if len(values) < 2:
            raise InputError(f"--tune {key} needs two values or more to choose from; got {list(values)}")
    plan = Plan(
        recipe=recipe,
        overrides=tuple(overrides),
        methods=tuple(methods or METHODS),
        ranks=tuple(ranks or (own.adapter.r,)),
        seeds=tuple(seeds),
        tasks=tuple(tasks or (default_task,)),
        variations=tuple(itertools.product(*varied)),
        tuning=tuning,
        validation_size=validation_size,
        variants=own_variants,
    )
    # Every run's recipe is made once here: a wrong key or value is found before the first run starts, also one that
    # none of the methods uses.
    for key, value in itertools.chain(*varied):
        load_recipe(recipe, overrides, {key: value})
    for cell in plan.cells():
        plan.recipe_of(cell, own.output)
    for cell in plan.tuned_cells():
        for value in plan.tuning.values if plan.tuning else ():
            plan.recipe_of(cell, own.output, value, validate=True)
    return plan


_SWEPT = {
    "method": "give --methods",
    "seed": "give --seeds",
    "output": "give --out",
    "rank": "give --ranks",
    "adapter.r": "give --ranks",
    "task": "give --tasks",
    "variant": "give --variants",
    "resume": "a comparison always continues",
    "evaluation.on": "give --tune to use validation rows",
}
