"""Recipes and adapters as an enemy, or a bad disk, would leave them: valid ones with something changed.

What is changed is decided by a `Choices`, so that hypothesis and a coverage-guided fuzzer draw from the same enemy.
"""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from safetensors.torch import load, save

# What stands where something else was expected.
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 10**9, 10**30, -2.5, 0.5, 1e308, float("nan"), float("inf"), "", "x", "1e999",
    "../../../etc/passwd", "(a", "a\nb\x1b[2J", "\u2028", "lora-tsd", "TSD", "LORA", "IA3", "BOFT", "pissa", "q_proj",
    [], [[]], ["q_proj", 3], ["../q_proj"], {}, {"q_proj": 10**9}, {"q_proj": {}}, {"(": 2}, {"": None}, {"r": [1]},
]  # fmt: skip


class Choices(Protocol):
    def integer(self, low: int, high: int) -> int: ...

    def data(self, most: int) -> bytes: ...


def pick(choices: Choices, options: Sequence[Any]) -> Any:
    return copy.deepcopy(options[choices.integer(0, len(options) - 1)])


def change_tree(choices: Choices, content: Any, known: Sequence[str]) -> Any:
    """A copy of `content`, read from JSON or YAML, with one to three values replaced, removed or added somewhere."""
    content = json.loads(json.dumps(content))
    for _ in range(choices.integer(1, 3)):
        place = content
        while isinstance(place, dict) and place:
            key = pick(choices, sorted(place))
            if isinstance(place[key], dict) and place[key] and choices.integer(0, 2):
                place = place[key]
                continue
            what = choices.integer(0, 5)
            if what == 0:
                del place[key]
            elif what == 1:
                place[pick(choices, known)] = pick(choices, VALUES)
            elif what == 2:
                place[choices.data(12).decode("utf-8", "replace")] = pick(choices, VALUES)
            else:
                place[key] = pick(choices, VALUES)
            break
    return content


def change_bytes(choices: Choices, whole: bytes) -> bytes:
    """`whole` cut short, with bits flipped, or with other bytes in it."""
    at = choices.integer(0, max(0, len(whole) - 1))
    what = choices.integer(0, 3)
    if what == 0:
        return whole[:at]
    if what == 1:
        flipped = bytearray(whole)
        for _ in range(choices.integer(1, 8)):
            if flipped:
                flipped[choices.integer(0, len(flipped) - 1)] ^= 1 << choices.integer(0, 7)
        return bytes(flipped)
    if what == 2:
        return whole[:at] + choices.data(40) + whole[at:]
    return choices.data(200)


def change_header(choices: Choices, whole: bytes) -> bytes:
    """A safetensors file whose header says something else than its data."""
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    name = pick(choices, sorted(set(header) - {"__metadata__"}))
    what = choices.integer(0, 4)
    if what == 0:
        header[name]["dtype"] = pick(choices, ["F16", "I64", "BOOL", "F8_E4M3", "X", 3])
    elif what == 1:
        header[name]["shape"] = pick(
            choices, [[], [0], [-1], [10**9, 10**9], [2**63], ["a"], header[name]["shape"][::-1]]
        )
    elif what == 2:
        header[name]["data_offsets"] = pick(choices, [[0, 0], [5, 1], [0, 2**63], [-1, 4], [0]])
    elif what == 3:
        header[pick(choices, ["../x", "a/b", "", "a..b", "__class__", "a.__init__.b", "x" * 5000, "é\n"])] = (
            header.pop(name)
        )
    else:
        header["__metadata__"] = pick(choices, VALUES)
    text = json.dumps(header).encode()
    length = pick(choices, [len(text), len(text), len(text), 2**40, 0])
    return struct.pack("<Q", length) + text + whole[8 + struct.unpack("<Q", whole[:8])[0] :]


def change_tensors(choices: Choices, whole: bytes) -> bytes:
    """A whole safetensors file with other tensors."""
    state = load(whole)
    name = pick(choices, sorted(state))
    tensor = state[name]
    what = choices.integer(0, 6)
    if what == 0:
        del state[name]
    elif what == 1:
        state[name] = tensor.clone().float()
        state[name].flatten()[-1:] = pick(choices, [float("nan"), float("inf"), -float("inf"), 3e38])
    elif what == 2:
        state[name] = tensor.to(pick(choices, [torch.float64, torch.float16, torch.int64, torch.int8, torch.bool]))
    elif what == 3:
        state[name] = pick(choices, [tensor[None], tensor[:-1], tensor.flatten(), tensor.new_zeros(()), tensor[:0]])
    elif what == 4:
        state[
            pick(choices, ["../../x", "x", "base_model.model.lm_head.weight", name.replace("0", "7"), name + ".y"])
        ] = state.pop(name)
    elif what == 5:
        state[name] = torch.full_like(tensor, pick(choices, [0, 1, -1, 5, 100]))
    else:
        state[name + "2"] = tensor.clone()
    return save({key: value.contiguous() for key, value in state.items()}, metadata={"format": "pt"})


def change_adapter(choices: Choices, folder: Path, config: dict[str, Any], whole: bytes, known: Sequence[str]) -> None:
    """Write the files of an adapter into `folder`, with something changed."""
    text, weights = json.dumps(config).encode(), whole
    kind = choices.integer(0, 5)
    if kind <= 1:
        text = json.dumps(change_tree(choices, config, known)).encode()
    elif kind == 2:
        text = change_bytes(choices, text)
    elif kind == 3:
        weights = change_bytes(choices, whole)
    elif kind == 4:
        weights = change_header(choices, whole)
    else:
        weights = change_tensors(choices, whole)
    (folder / "adapter_config.json").write_bytes(text)
    (folder / "adapter_model.safetensors").write_bytes(weights)


def change_recipe(choices: Choices, content: dict[str, Any], known: Sequence[str]) -> bytes:
    """A recipe with something changed, in YAML."""
    if choices.integer(0, 3) == 0:
        return change_bytes(choices, yaml.safe_dump(content).encode())
    return yaml.safe_dump(change_tree(choices, content, known), allow_unicode=True).encode("utf-8", "replace")


def overrides(choices: Choices, known: Sequence[str]) -> list[str]:
    """Zero to two arguments of the form key=value, more or less."""
    found = []
    for _ in range(choices.integer(0, 2)):
        value = pick(choices, VALUES) if choices.integer(0, 1) else choices.data(20).decode("utf-8", "replace")
        found.append(pick(choices, [f"{pick(choices, known)}={value}", f"{value}={value}", str(value)]))
    return found


def assert_one_line(error: BaseException) -> None:
    """A message that a terminal shows as one line, or as one a complaint, whatever was in the files."""
    assert error.args, type(error)
    for message in error.args:
        assert message, type(error)
        assert message.isprintable(), repr(message)
        assert len(message) < 3000, len(message)
    assert str(error) == "\n".join(error.args)
