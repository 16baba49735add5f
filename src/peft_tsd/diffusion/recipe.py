"""The recipe of a DreamBooth run: a model, a handful of photos of one subject, and the prompt that names it.

Its `kind: dreambooth` tells it from a language model's recipe; what the two share has the same keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import Field, model_validator

from ..recipes.reading import load_as
from ..recipes.shared import Adapter, Directions, LearningRate, NameOrPath, Optimizer, RunRecipe, Saving, Section
from ..tuner.settings import DirectionSource

SHORT = {"model": "model.name", "data": "data.folder", "prompt": "data.prompt"}
"""What may be left out of the longest keys on the command line: `model=NAME data=FOLDER prompt=TEXT`."""


class Model(Section):
    """The frozen pipeline, of any family in `families`."""

    name: NameOrPath
    """A hub name, or a folder in diffusers' layout (model_index.json, unet/ or transformer/, vae/, ...)."""
    revision: str | None = None
    variant: str | None = None
    """Which weight files, e.g. `fp16`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the frozen weights and the arithmetic; the adapter is trained in float32."""


class Data(Section):
    """The photos of the subject."""

    folder: NameOrPath | None = None
    prompt: str | None = None
    """What every photo shows, with a rare word for the subject: `a photo of sks backpack`."""
    resolution: int = Field(default=512, ge=8)
    """Pixels a side; photos are scaled to it by their shorter side and cropped to their middle."""


class Prior(Section):
    """Prior preservation: photos of the subject's class, trained beside it, so that the class stays what it was."""

    prompt: str | None = None
    """What they show: `a photo of a backpack`. Without it there is no prior preservation."""
    folder: NameOrPath | None = None
    """Where they are; without it the frozen model draws them."""
    num_images: int = Field(default=100, ge=1)
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Of their loss beside the subject's."""

    @model_validator(mode="after")
    def _has_prompt(self) -> Prior:
        if self.folder is not None and self.prompt is None:
            raise ValueError(f"prior.folder={self.folder!r} needs prior.prompt, which says what its photos show")
        return self


class TextEncoders(Section):
    """Whether the CLIP text encoders get an adapter too."""

    train: bool = False
    target_modules: list[str] = Field(default=["q_proj", "k_proj", "v_proj", "out_proj"])
    learning_rate: LearningRate | None = None
    """The denoiser's without it."""


class Training(Saving):
    """How long, in which portions, and how often to save."""

    steps: int = Field(default=500, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=4, ge=1)
    """Photos a batch, of all processes; with prior preservation, as many of the class beside them."""
    min_snr_gamma: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Weight the loss of a timestep by its signal-to-noise ratio, at most this (Hang et al., arXiv 2303.09556)."""


class Validation(Section):
    """The images drawn during training and at its end."""

    prompts: list[str] = Field(default=[])
    """`data.prompt` without any."""
    every: int | None = Field(default=100, ge=1)
    """Optimizer steps between grids; null for one grid, at the end."""
    num_images: int = Field(default=4, ge=1)
    """Images a prompt."""
    steps: int = Field(default=30, ge=1)
    """Denoising steps an image."""
    guidance_scale: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """The pipeline's own without it."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of the first image; the others take the next ones."""


class Export(Section):
    """What is written beside the diffusers LoRA file."""

    kohya: bool = False
    """The same in the keys of kohya's scripts, which WebUIs read."""


PROMPTS = (
    "a photo of {}",
    "a photo of {} on the beach",
    "a photo of {} in the snow",
    "a photo of {} in a city street at night",
    "a watercolour painting of {}",
)
"""`{}` stands for the subject's words: what `data.prompt` says after "a photo of"."""

CLIP, DINO = "openai/clip-vit-base-patch32", "facebook/dino-vits16"


class ComparisonSection(Section):
    """What `peft-tsd compare` draws and measures, beside `validation`'s steps, guidance and seed."""

    prompts: list[str] = Field(default=list(PROMPTS), min_length=1)
    """`{}` stands for the subject's words: what `data.prompt` says after "a photo of"."""
    num_images: int = Field(default=4, ge=1)
    """Images a prompt and method."""
    clip: NameOrPath | None = CLIP
    """The CLIP model of CLIP-T and CLIP-I, a hub name or a folder; null for none."""
    dino: NameOrPath | None = DINO
    """The DINO model, likewise."""


class OfWeights(Directions):
    """Directions of the weights: those of the gradient take gradients of batches, which runs of this kind do not."""

    direction_source: DirectionSource | None = "weight"


class DreamBooth(RunRecipe):
    """One run."""

    kind: Literal["dreambooth"] = "dreambooth"
    description: str = ""
    model: Model
    data: Data = Data()
    prior: Prior = Prior()
    text_encoders: TextEncoders = TextEncoders()
    method: Literal["lora-tsd", "lora-dash", "lora-init", "lora"] = "lora-tsd"
    directions: OfWeights = OfWeights()
    adapter: Adapter = Adapter(target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    optimizer: Optimizer = Optimizer(learning_rate=1e-4, schedule="constant")
    training: Training = Training()
    validation: Validation = Validation()
    export: Export = Export()
    comparison: ComparisonSection = ComparisonSection()

    @model_validator(mode="after")
    def _steps_reach_the_transition(self) -> DreamBooth:
        if self.uses_directions and self.directions.direction_source == "gradient":
            raise ValueError(
                "directions.direction_source='gradient' takes gradients of batches, which runs of this kind do not; "
                "use 'weight'"
            )
        if self.uses_directions and self.directions.prelaunch_steps == 0:
            raise ValueError(
                "directions.prelaunch_steps=0 finds directions from gradients, which runs of this kind do not; give 1 "
                "or more, or auto"
            )
        self.check_length(self.training.steps)
        return self


def load_recipe(reference: str, overrides: Iterable[str] = ()) -> DreamBooth:
    """Read and check a DreamBooth recipe.

    Args:
        reference: Path of a YAML file, or the name of a recipe shipped with the package.
        overrides: `key=value` each, as on the command line; `model`, `data` and `prompt` stand for `model.name`,
            `data.folder` and `data.prompt`.

    Raises:
        RecipeError: Not found, not YAML, an unknown key, a wrong type or value.
    """
    return load_as(DreamBooth, reference, overrides, short=SHORT)
