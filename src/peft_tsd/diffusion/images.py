"""Images from prompts, and a grid of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from .pipeline import moved


@torch.no_grad()
def draw(
    pipe: Any,
    wanted: Iterable[tuple[str, int]],
    device: torch.device,
    *,
    resolution: int,
    steps: int,
    guidance_scale: float | None = None,
) -> Iterator[Image.Image]:
    """One image after another; prompt and seed give the same image whatever else is drawn.

    Args:
        pipe: The pipeline.
        wanted: Prompt and seed of each.
        device: Where to compute; the pipeline's models are afterwards where they were.
        resolution: Pixels a side.
        steps: Denoising steps.
        guidance_scale: Of classifier-free guidance; the pipeline's own by default.
    """
    options = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    pipe.set_progress_bar_config(disable=True)
    with ExitStack() as stack:
        for model in pipe.components.values():
            if isinstance(model, torch.nn.Module):
                stack.enter_context(moved(model, device))
                stack.callback(model.train, model.training)
                model.eval()
        for prompt, seed in wanted:
            # On the CPU, so that the same seed starts from the same noise on every device.
            generator = torch.Generator().manual_seed(seed)
            yield from pipe(
                prompt=prompt,
                height=resolution,
                width=resolution,
                num_inference_steps=steps,
                generator=generator,
                **options,
            ).images


def grid(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str]) -> Image.Image:
    """All images in one, each row under its title."""
    side = rows[0][0].height
    size = max(11, side // 24)
    font = ImageFont.load_default(size)
    bar = 2 * size
    sheet = Image.new("RGB", (side * max(map(len, rows)), (side + bar) * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (row, title) in enumerate(zip(rows, titles)):
        top = i * (side + bar)
        pen.text((size // 2, top + size // 2), title, fill="black", font=font)
        for j, image in enumerate(row):
            sheet.paste(image, (j * side, top + bar))
    return sheet
