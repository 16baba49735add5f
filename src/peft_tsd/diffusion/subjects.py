"""Runs side by side: the methods on each subject, what they draw, and how near it comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image


class Cell(NamedTuple):
    """What one method draws of one prompt."""

    images: list[Image.Image]
    scores: dict[str, float]
    """CLIP-T, CLIP-I and DINO, those that were measured."""


class Column(NamedTuple):
    """One method on one subject."""

    label: str
    settings: dict[str, Any]
    """What is to be known of the run; empty for the model without an adapter."""
    cells: list[Cell]
    """One a prompt."""
    scores: dict[str, float]
    """The means over prompts."""


class Subject(NamedTuple):
    """All methods on one subject."""

    words: str
    prompt: str
    """The recipe's."""
    model: str
    photos: list[Image.Image]
    prompts: list[str]
    columns: list[Column]


class Comparison(NamedTuple):
    """What `compare_subjects` found."""

    page: Path
    """One HTML file that needs no network."""
    subjects: list[Subject]
    missing: dict[str, str]
    """Why a similarity was not measured."""
