"""From the name in a recipe to a pipeline: first without its weights, to see that all fits, then with them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import DiffusionPipeline

from ..errors import RecipeError, one_line
from .families import PipelineFamily, family_of
from .recipe import Model

# What a pipeline may bring along and training has no use for; a safety checker would cost memory and black out images.
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


class PipelineSource(NamedTuple):
    """A pipeline that was found."""

    name: str
    """As the user gave it: a hub name or a folder."""
    family: PipelineFamily
    components: dict[str, tuple[str, str]]
    """The library and the class of each."""
    options: dict[str, Any]
    """`revision`, where one was given."""


def locate(model: Model) -> PipelineSource:
    """Find a pipeline and its family, from its model_index.json.

    Raises:
        RecipeError: There is none, or it is of no family that can be trained.
    """
    options = {} if model.revision is None else {"revision": model.revision}
    path = Path(model.name).expanduser()
    given = f"model.name={model.name!r}"
    if path.is_file():
        raise RecipeError(
            f"{given} is a file; give a folder in diffusers' layout, which "
            f"{path.suffix.lstrip('.') or 'such'} checkpoints become by from_single_file(...).save_pretrained(FOLDER)"
        )
    if not path.exists() and (model.name.startswith((".", "/", "~")) or model.name.count("/") > 1):
        raise RecipeError(f"{given}: no such folder")
    if path.is_dir() and not (path / "model_index.json").is_file():
        if (path.parent / "model_index.json").is_file():
            raise RecipeError(
                f"{given} is one component of a pipeline; give the folder above it, {str(path.parent)!r}"
            )
        raise RecipeError(f"{given} holds no model_index.json; give the folder of a whole diffusers pipeline")
    with _one_line_errors(given):
        index = DiffusionPipeline.load_config(model.name, **options)
    family = family_of(str(index.get("_class_name")), model.name)
    components = {
        name: (value[0], value[1])
        for name, value in index.items()
        if isinstance(value, (list, tuple)) and value[0] is not None and name not in UNUSED
    }
    for name in ("vae", "scheduler", family.denoiser, *family.text_encoders):
        if name not in components:
            raise RecipeError(f"{given} is a {family.pipeline} without the component {name!r}; give a whole one")
    if path.is_dir():
        for name in components:
            _check_component(path / name, given)
    return PipelineSource(model.name, family, components, options)


def _check_component(folder: Path, given: str) -> None:
    if not folder.is_dir():
        raise RecipeError(f"{given} lacks the folder {folder.name}/, which its model_index.json names; complete it")
    has_weights = any(any(folder.glob(f"*{suffix}")) for suffix in (".safetensors", ".bin"))
    if (folder / "config.json").is_file() and not has_weights:
        raise RecipeError(f"{given} has no weights in {folder.name}/ (.safetensors or .bin); complete it")


def load_skeleton(source: PipelineSource) -> Any:
    """The pipeline with its models on the meta device, which holds shapes and no numbers.

    Raises:
        RecipeError: A component cannot be read.
    """
    made: dict[str, Any] = {}
    for name, (library, component_class) in source.components.items():
        with _one_line_errors(f"model.name={source.name!r}, component {name!r},"):
            made[name] = _component(source, name, getattr(sys.modules.get(library) or diffusers, component_class))
    with _one_line_errors(f"model.name={source.name!r}"):
        return getattr(diffusers, source.family.pipeline)(**made, **_unused(source.family))


def _component(source: PipelineSource, name: str, component_class: Any) -> Any:
    place = {"subfolder": name, **source.options}
    if issubclass(component_class, diffusers.ModelMixin):
        config = component_class.load_config(source.name, **place)
        with torch.device("meta"):
            return component_class.from_config(config)
    if issubclass(component_class, torch.nn.Module):
        config = component_class.config_class.from_pretrained(source.name, **place)
        with torch.device("meta"):
            return component_class._from_config(config)
    return component_class.from_pretrained(source.name, **place)


def load_pipeline(source: PipelineSource, model: Model) -> Any:
    """The pipeline with its weights, on the CPU: frozen, in `model.dtype`, but its autoencoder in float32.

    Raises:
        RecipeError: A component cannot be read, or its weights do not fit it.
    """
    options = {**source.options, **({} if model.variant is None else {"variant": model.variant})}
    # SDXL's autoencoder overflows in float16, and what it makes of the photos is trained on at every step.
    dtypes = {"default": getattr(torch, model.dtype), "vae": torch.float32}
    with _one_line_errors(f"model.name={source.name!r}"):
        pipe = getattr(diffusers, source.family.pipeline).from_pretrained(
            source.name, torch_dtype=dtypes, **_unused(source.family), **options
        )
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)
            component.eval()
    return pipe


def _unused(family: PipelineFamily) -> dict[str, Any]:
    taken = inspect.signature(getattr(diffusers, family.pipeline).__init__).parameters
    options: dict[str, Any] = {name: None for name in UNUSED if name in taken}
    return options | ({"requires_safety_checker": False} if "requires_safety_checker" in taken else {})


@contextmanager
def moved(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """`model` on `device`, and afterwards where it was."""
    before = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(before)


@contextmanager
def text_encoders_on(pipe: Any, device: torch.device) -> Iterator[None]:
    """All of a pipeline's text encoders on `device`, and afterwards where they were."""
    with ExitStack() as stack:
        for name, component in pipe.components.items():
            if name.startswith("text_encoder") and component is not None:
                stack.enter_context(moved(component, device))
        yield


@contextmanager
def _one_line_errors(given: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, AttributeError, ImportError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise RecipeError(f"{given} cannot be loaded: {one_line(error)}") from None
