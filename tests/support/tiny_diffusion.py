"""Complete diffusion pipelines of a few thousand weights, tokenizers and all, saved as `from_pretrained` wants."""

from pathlib import Path

import torch
import yaml
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from support.places import DATA

PHOTOS = DATA / "dreambooth"
TEXT_SIZE = 32


def clip_tokenizer() -> CLIPTokenizer:
    letters = [chr(c) for c in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def t5_tokenizer() -> T5TokenizerFast:
    words = ["<pad>", "</s>", "<unk>", *(chr(c) for c in range(97, 123)), "▁"]
    return T5TokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=2)),
        model_max_length=77,
        extra_ids=0,
    )


def clip_text(projection: bool = False) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer()),
        hidden_size=TEXT_SIZE,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=TEXT_SIZE,
        bos_token_id=188,
        eos_token_id=189,
        pad_token_id=189,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def vae(channels: int = 4, **options) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=channels,
        norm_num_groups=4,
        **options,
    )


def unet(**options) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **options,
    )


NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def sd15() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        unet=unet(cross_attention_dim=TEXT_SIZE, attention_head_dim=2),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **NOISE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=vae(force_upcast=True),
        text_encoder=clip_text(),
        text_encoder_2=clip_text(projection=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet(
            cross_attention_dim=2 * TEXT_SIZE,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=6 * 8 + TEXT_SIZE,
        ),
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", **NOISE),
    )


def sd3() -> StableDiffusion3Pipeline:
    t5 = T5EncoderModel(T5Config(vocab_size=30, d_model=2 * TEXT_SIZE, d_kv=8, d_ff=37, num_layers=2, num_heads=4))
    return StableDiffusion3Pipeline(
        vae=vae(channels=8, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        text_encoder=clip_text(projection=True),
        text_encoder_2=clip_text(projection=True),
        text_encoder_3=t5,
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
        transformer=SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=8,
            out_channels=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=2 * TEXT_SIZE,
            pooled_projection_dim=2 * TEXT_SIZE,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


FAMILIES = {"sd15": sd15, "sdxl": sdxl, "sd3": sd3}


def save(family: str, folder: Path) -> Path:
    torch.manual_seed(0)
    FAMILIES[family]().save_pretrained(folder)
    return folder


def photos(folder: Path, num: int = 3) -> Path:
    """Photos of two sizes and three formats, and a file that is none."""
    folder.mkdir()
    for i in range(num):
        size = (40, 30) if i % 2 else (36, 48)
        image = Image.new("RGB", size, (40 * i, 200 - 30 * i, 90))
        image.paste((250, 40 * i, 0), (size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2))
        image.save(folder / f"{i}.{('png', 'jpg', 'webp')[i % 3]}")
    (folder / "notes.txt").write_text("not a photo", encoding="utf-8")
    return folder


def write_recipe(folder: Path, family: str = "sd15", **sections) -> Path:
    """A recipe over a tiny pipeline and photos of 3 blocks: 6 steps, of them 3 of pre-launch."""
    content = {
        "kind": "dreambooth",
        "model": {"name": str(folder / family)},
        "data": {"folder": str(folder / "photos"), "prompt": "a photo of sks block", "resolution": 32},
        "adapter": {"r": 3, "lora_alpha": 6, "target_modules": ["to_q", "to_v"]},
        "directions": {"prelaunch_steps": 3, "num_directions": 4},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"steps": 6, "batch_size": 2, "save_every": 3},
        "validation": {"every": 4, "num_images": 1, "steps": 1},
        "output": str(folder / "run"),
    }
    for name, section in sections.items():
        content[name] = {**content.get(name, {}), **section} if isinstance(section, dict) else section
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def save_clip(folder: Path) -> str:
    """A CLIP model with its processor."""
    torch.manual_seed(1)
    text = {"vocab_size": len(clip_tokenizer()), "bos_token_id": 188, "eos_token_id": 189, "pad_token_id": 189}
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**text, **small},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**size), clip_tokenizer()).save_pretrained(folder)
    return str(folder)


def save_dino(folder: Path) -> str:
    """A vision transformer as DINO's are, with its processor."""
    torch.manual_seed(2)
    config = ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)
