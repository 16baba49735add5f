"""Photos and prompts as the denoiser sees them: encoded once, before training, and kept in the run folder.

A run that is continued reads them from there, so that it trains on the same numbers to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from .families import Embeddings, PipelineFamily
from .photos import Photo
from .pipeline import moved, text_encoders_on


class Encoded(NamedTuple):
    """Photos that share a prompt, n of them."""

    mean: Tensor
    """Of the autoencoder's distribution, shifted and scaled for the denoiser; shape (n, channels, height, width)."""
    std: Tensor
    """Shape as `mean`."""
    time_ids: Tensor
    """Shape (n, 6)."""
    embeddings: Embeddings
    """Of the prompt, one row; empty where a text encoder is trained and encodes it anew at each step."""

    def latents(self, index: Tensor, generator: Generator) -> Tensor:
        """Samples for the photos `index`."""
        noise = torch.randn(len(index), *self.mean.shape[1:], generator=generator)
        return self.mean[index] + self.std[index] * noise

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """For `save_file`."""
        found = {"mean": self.mean, "std": self.std, "time_ids": self.time_ids}
        found |= {f"embeddings.{name}": tensor for name, tensor in self.embeddings.items()}
        return {f"{prefix}.{name}": tensor.contiguous() for name, tensor in found.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], prefix: str) -> Encoded:
        """The reverse of `tensors`."""
        found = {
            key.removeprefix(f"{prefix}."): value for key, value in tensors.items() if key.startswith(f"{prefix}.")
        }
        embeddings = {key.removeprefix("embeddings."): found[key] for key in found if key.startswith("embeddings.")}
        return cls(found["mean"], found["std"], found["time_ids"], embeddings)


@torch.no_grad()
def encode(
    pipe: Any,
    family: PipelineFamily,
    groups: Mapping[str, tuple[Sequence[Photo], str]],
    device: torch.device,
    *,
    with_prompts: bool,
    on_photo: Callable[[], None],
) -> dict[str, Encoded]:
    """Encode groups of photos, each with its prompt.

    Args:
        pipe: The pipeline, its autoencoder in float32.
        family: Its family.
        groups: Photos and prompt of each group.
        device: Where to compute; the pipeline's models are on the CPU before and after.
        with_prompts: Whether the prompts are to be encoded too.
        on_photo: Called after each photo.
    """
    prompts: dict[str, Embeddings] = {name: {} for name in groups}
    if with_prompts:
        with text_encoders_on(pipe, device):
            for name, (_, prompt) in groups.items():
                prompts[name] = {key: x.cpu() for key, x in family.encode(pipe, [prompt], device).items()}
    moments: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in groups}
    shift = getattr(pipe.vae.config, "shift_factor", None) or 0.0
    scale = pipe.vae.config.scaling_factor
    total = sum(len(photos) for photos, _ in groups.values())
    with moved(pipe.vae, device), tqdm(total=total, desc="encoding photos", unit="photo") as bar:
        for name, (photos, _) in groups.items():
            for photo in photos:
                found = pipe.vae.encode(photo.pixels()[None].to(device)).latent_dist
                moments[name][0].append((scale * (found.mean - shift)).cpu())
                moments[name][1].append((scale * found.std).cpu())
                bar.update()
                on_photo()
    return {
        name: Encoded(
            torch.cat(moments[name][0]),
            torch.cat(moments[name][1]),
            torch.tensor([photo.time_ids for photo in photos], dtype=torch.float32),
            prompts[name],
        )
        for name, (photos, _) in groups.items()
    }
