"""How well images follow their prompt and keep their subject: CLIP-T, CLIP-I and DINO, as in DreamBooth's evaluation.

Each is a mean of cosines between embeddings (Ruiz et al., arXiv 2208.12242, section 4.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, CLIPModel, CLIPProcessor

from ..errors import one_line

DEFINITIONS = {
    "CLIP-T": "mean cosine between the CLIP embedding of each image and that of its prompt",
    "CLIP-I": "mean cosine between the CLIP embedding of each image and that of each reference photo",
    "DINO": "mean cosine between the DINO embedding (last [CLS]) of each image and that of each reference photo",
}


class Unavailable(NamedTuple):
    """A model that could not be loaded, and why."""

    reason: str


class Clip:
    """A CLIP model: its embeddings of images and of texts, of length 1.

    Args:
        name: A hub name or a folder.
        device: Where to compute.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self._model: Any = CLIPModel.from_pretrained(name).to(device).eval()
        self._processor: Any = CLIPProcessor.from_pretrained(name)

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Shape (images, size)."""
        pixels = self._processor(images=list(images), return_tensors="pt").to(self._model.device)
        return _unit(_pooled(self._model.get_image_features(pixels["pixel_values"])))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Shape (texts, size); what is longer than the model reads is cut."""
        tokens = self._processor(text=list(texts), padding=True, truncation=True, return_tensors="pt")
        return _unit(_pooled(self._model.get_text_features(**tokens.to(self._model.device))))


class Dino:
    """A DINO model: its embeddings of images, of length 1.

    Args:
        name: A hub name or a folder.
        device: Where to compute.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self._model: Any = AutoModel.from_pretrained(name).to(device).eval()
        self._processor: Any = AutoImageProcessor.from_pretrained(name)

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Shape (images, size)."""
        pixels = self._processor(images=list(images), return_tensors="pt").to(self._model.device)
        return _unit(self._model(**pixels).last_hidden_state[:, 0])


def load_or_why(
    model_class: type[Clip] | type[Dino], name: str | None, device: torch.device
) -> Clip | Dino | Unavailable:
    """The model `name`, or why there is none."""
    if name is None:
        return Unavailable("no model was given")
    try:
        return model_class(name, device)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        return Unavailable(f"{name} cannot be loaded: {one_line(error)[:160]}")


def text_similarity(images: Tensor, text: Tensor) -> float:
    """CLIP-T of images, shape (n, size), drawn from one prompt, shape (1, size)."""
    return float((images @ text.mT).mean())


def subject_similarity(images: Tensor, photos: Tensor) -> float:
    """CLIP-I or DINO of images, shape (n, size), beside photos, shape (m, size)."""
    return float((images @ photos.mT).mean())


def _unit(embeddings: Tensor) -> Tensor:
    return torch.nn.functional.normalize(embeddings.float(), dim=-1)


def _pooled(found: Any) -> Tensor:
    """transformers returns the projected embedding itself, or (from 5 on) an output that holds it."""
    embedding: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return embedding
