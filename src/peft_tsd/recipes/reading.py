"""From a recipe's file and overrides to a checked recipe."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from ..errors import RecipeError, did_you_mean, one_line
from .choices import Choice, pick, take_choices
from .complaints import explain
from .shared import Section

Kind = TypeVar("Kind", bound=Section)


def load_as(
    schema: type[Kind],
    reference: str,
    overrides: Iterable[str] = (),
    settings: Mapping[str, Any] | None = None,
    short: Mapping[str, str] | None = None,
) -> Kind:
    """Read and check a recipe of any kind.

    Args:
        schema: The recipe's class.
        reference: As `load_recipe`.
        overrides: As `load_recipe`.
        settings: As `load_recipe`.
        short: Keys that have a short name, by that name.

    Raises:
        RecipeError: As `load_recipe`.
    """
    path = find_recipe(reference)
    content, choices = _read(path)
    if path.name == "recipe.yaml" and (path.parent / "metrics.json").is_file():
        content["output"] = str(path.parent)  # the recipe of a run, whose folder may have been moved since
    chosen, rest = pick(choices, overrides)
    for name, row in chosen.items():
        for key, value in choices[name].table[row].items():
            _set(content, key, value, f"choices.{name}.table.{row}: {key}={value!r}")
    apply_all(content, rest, short or {})
    for key, value in (settings or {}).items():
        _set(content, key, value, f"{key}={value!r}")
    # Runs of one recipe with other choices are other runs.
    content.setdefault("output", str(Path("runs") / "-".join([path.stem, *chosen.values()])))
    return check_content(schema, content)


KINDS = ("dreambooth",)
"""What a recipe's `kind` can be; a language model's has none."""


def kind_of(reference: str) -> str | None:
    """The kind of a recipe that is not for a language model, or None.

    Raises:
        RecipeError: As `load_recipe`, or there is no such kind.
    """
    kind: str | None = _read(find_recipe(reference))[0].get("kind")
    if kind is not None and kind not in KINDS:
        raise RecipeError(f"kind={kind!r} is not known{did_you_mean(str(kind), KINDS)}")
    return kind


def describe(reference: str) -> str:
    """The `description` of a recipe of any kind."""
    return str(_read(find_recipe(reference))[0].get("description", ""))


def choices_of(reference: str) -> dict[str, Choice]:
    """What a recipe leaves to choose.

    Raises:
        RecipeError: As `load_recipe`.
    """
    return _read(find_recipe(reference))[1]


# A comparison makes the recipes of all its runs from one file, and reading YAML is most of the work.
_parsed = functools.lru_cache(maxsize=4)(lambda text, where: parse_yaml(text, where))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Choice]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{str(path)!r} cannot be read: {one_line(error)}") from None
    content = copy.deepcopy(_parsed(text, str(path)))
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys; got {type(content).__name__}")
    return content, take_choices(content, str(path))


def check_content(schema: type[Kind], content: dict[str, Any]) -> Kind:
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise RecipeError(*(explain(e, schema) for e in error.errors())) from None


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(files("peft_tsd") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(reference: str) -> Path:
    """The file that `reference` names: a path, or a shipped recipe's name.

    Raises:
        RecipeError: There is none.
    """
    path = Path(reference).expanduser()
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if reference in shipped:
        return shipped[reference]
    if path.is_dir():
        raise RecipeError(f"recipe {reference!r} is a folder; give a YAML file, such as {path / 'recipe.yaml'}")
    raise RecipeError(
        f"no recipe {reference!r}: neither a file nor one of {', '.join(shipped)}"
        f"{did_you_mean(reference, shipped, listing=False)}"
    )


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-3 is a number (YAML 1.1 wants 1.0e-3), and a key given twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """What YAML `text` says.

    Raises:
        RecipeError: It is not YAML; `where` says where it stood.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def apply(content: dict[str, Any], override: str, short: Mapping[str, str] = MappingProxyType({})) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"cannot read {override!r}; an override is key=value, such as training.steps=100")
    value = parse_yaml(text, f"override {override!r}")
    _set(content, key if isinstance(value, dict) else short.get(key, key), value, override)


def apply_all(
    content: dict[str, Any], overrides: Iterable[str], short: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Apply every override; those that cannot be are refused together."""

    def complaints(override: str) -> tuple[str, ...]:
        try:
            apply(content, override, short)
        except RecipeError as error:
            return error.args
        return ()

    found = [complaint for override in overrides for complaint in complaints(override)]
    if found:
        raise RecipeError(*found)


def _set(content: dict[str, Any], key: str, value: Any, given: str) -> None:
    *sections, last = key.split(".")
    for section in sections:
        if not isinstance(content.get(section, {}), dict):
            raise RecipeError(f"cannot set {given!r}: {section!r} is a single value, not a section")
        content = content.setdefault(section, {})
    content[last] = value
