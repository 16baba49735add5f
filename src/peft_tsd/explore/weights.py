"""Reading the weights of a model one at a time, whatever its size: from safetensors files, or a GGUF file.

Files are opened anew for every weight, so that no more of them stays in memory than the weight in use. Pickled
checkpoints (.bin, .pt) are not read: loading one runs whatever it says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import cached_file

from ..errors import one_line
from ..models.finding import Source
from .errors import ExploreError
from .gguf_file import GgufFile
from .skeleton import Weight

WEIGHTS = "model.safetensors"

INDEX = "model.safetensors.index.json"

_IN_PARTS = ""  # stands for a tensor's name where a weight is put together from several


class SafetensorsFiles(Mapping[str, Tensor]):
    """The tensors of one or more safetensors files by their names; each is read where it is asked for."""

    def __init__(self, paths: list[Path]) -> None:
        """
        Raises:
            ExploreError: A file is missing, damaged, or no safetensors file.
        """
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            with _opened(path) as file:
                for key in file.keys():  # noqa: SIM118  (not a dict)
                    self._files[key] = path
                    self._shapes[key] = tuple(file.get_slice(key).get_shape())

    def __getitem__(self, key: str) -> Tensor:
        path = self._files[key]
        with _opened(path) as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._shapes[key]


class Checkpoint:
    """The weights of a whole model."""

    def __init__(
        self, name: str, keys: dict[str, str], read: Callable[[str], Tensor], shape: Callable[[str], Any]
    ) -> None:
        self._name = name
        self._keys = keys
        self._read = read
        self._shape = shape

    def problem(self, weight: Weight) -> str | None:
        """Why `weight` cannot be read, or None where it can."""
        key = self._key(weight)
        if key is None:
            return f"not in {self._name}"
        if key == _IN_PARTS:
            return f"stored in several parts in {self._name}"
        shape = self._shape(key)
        if shape is not None and tuple(shape) != weight.stored:
            return f"of shape {tuple(shape)} in {self._name}, and {weight.stored} in the base"
        return None

    def read(self, weight: Weight) -> Tensor:
        """The weight as a matrix (out, in), on the CPU, in the dtype it is stored in (of GGUF: float32).

        Raises:
            ExploreError: It is not stored as floating-point numbers, in another shape, or the file is damaged.
        """
        key = self._key(weight)
        assert key, "problem() was not asked"
        tensor = self._read(key)
        if tuple(tensor.shape) != weight.stored or not tensor.is_floating_point():
            raise ExploreError(
                f"{self._name}: the weight of {weight.name} is {tensor.dtype} of shape {tuple(tensor.shape)}, and not "
                f"a floating-point tensor of shape {weight.stored}; give the model before it was quantized"
            )
        return weight.matrix(tensor)

    def _key(self, weight: Weight) -> str | None:
        return next((self._keys[p] for p in weight.parameters if p in self._keys), None)


def open_checkpoint(source: Source, name: str, model: PreTrainedModel) -> Checkpoint:
    """The weights that `source` has for `model`; none is read yet.

    Args:
        source: Where they are.
        name: As it was given, for error messages.
        model: The model whose names they get; its own weights may be on the meta device.

    Raises:
        ExploreError: Files are missing or damaged, or of a format that is not read.
    """
    if "gguf_file" in source.options:
        gguf = GgufFile(Path(source.name) / source.options["gguf_file"], name, model)
        return Checkpoint(name, gguf.keys, gguf.read, lambda key: None)
    files = SafetensorsFiles(find_files(source, name))
    return Checkpoint(name, _names_in_model(files, model), files.__getitem__, files.shape)


def find_files(source: Source, name: str) -> list[Path]:
    """The safetensors files of a model: one, or its shards.

    Raises:
        ExploreError: There are none; a shard is missing; or they cannot be fetched.
    """
    whole = fetch(source, WEIGHTS, name)
    if whole is not None:
        return [whole]
    index = fetch(source, INDEX, name)
    if index is None:
        pickled = [one for one in ("pytorch_model.bin", "pytorch_model.bin.index.json") if fetch(source, one, name)]
        hint = (
            f"it has {pickled[0]}, which is pickled and not read: load the model with transformers and save it again "
            "with save_pretrained, which writes safetensors"
            if pickled
            else "give a model's folder, hub name or GGUF file, or an adapter's folder or hub name"
        )
        raise ExploreError(f"{name} has neither {WEIGHTS} nor {INDEX}; {hint}")
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ExploreError(f"{name}: {INDEX} cannot be read: {one_line(error)}") from None
    paths = []
    for shard in shards:
        path = fetch(source, shard, name) if Path(shard).name == shard else None
        if path is None:
            raise ExploreError(f"{name}: {INDEX} lists {shard!r}, which is not there; get the whole checkpoint")
        paths.append(path)
    return paths


def fetch(source: Source, file: str, name: str) -> Path | None:
    """The path of a file in a local folder, or of a hub repository, downloaded where it is not cached; None without.

    Raises:
        ExploreError: The hub cannot be asked, or does not know the repository.
    """
    if Path(source.name).is_dir():
        path = Path(source.name) / file
        return path if path.is_file() else None

    try:
        found = cached_file(
            source.name,
            file,
            revision=source.options.get("revision"),
            _raise_exceptions_for_missing_entries=False,
        )
    except (OSError, ValueError) as error:
        raise ExploreError(f"{name} cannot be fetched: {one_line(error)}") from None
    return None if found is None else Path(found)


def _names_in_model(files: SafetensorsFiles, model: PreTrainedModel) -> dict[str, str]:
    """The name of the stored tensor of every parameter, following transformers in what a checkpoint may call it:
    without, or with, the prefix of the base model; and what older versions of the architecture were called."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if not isinstance(t, WeightRenaming)]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    prefix = model.base_model_prefix
    keys: dict[str, str] = {}
    for key in files:
        name, part = rename_source_key(key, renamings, converters, prefix, parameters)
        if name not in parameters and key in parameters:
            name, part = key, None
        if name in parameters:
            keys[name] = key if part is None else _IN_PARTS
    return keys


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ExploreError(f"{path} is not a whole safetensors file ({one_line(error)}); get it again") from None
    with file:
        yield file
