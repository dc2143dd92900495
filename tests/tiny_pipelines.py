"""Random miniatures of every pretrained model that the toolkit can load, saved in the format of the original.

Each builder writes ``folder`` as ``save_pretrained`` does, offline, and returns its path as a string.
"""

import json
from pathlib import Path

import torch

WIDTH = 32  # width of every text and image embedding
LATENT = 16  # side of the latent; the autoencoder halves images once, so they have 32 px


def _autoencoder():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )


def _unet(**extra):
    from diffusers import UNet2DConditionModel

    sizes = dict(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=LATENT,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return UNet2DConditionModel(**sizes | extra)


def _vision_config():
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
    )


def _text_config():
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        hidden_size=WIDTH,
        projection_dim=WIDTH,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=514,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
        max_position_embeddings=77,
    )


def _tokenizer():
    """A tokenizer with one token for each byte, within and at the end of a word, and no merges."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = list(bytes_to_unicode().values())
    names = symbols + [symbol + "</w>" for symbol in symbols] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={name: number for number, name in enumerate(names)}, merges=[], model_max_length=77)


def _noise_schedule():
    return dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def image_variation(folder: Path) -> str:
    """Like lambdalabs/sd-image-variations-diffusers."""
    from diffusers import PNDMScheduler, StableDiffusionImageVariationPipeline
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    StableDiffusionImageVariationPipeline(
        vae=_autoencoder(),
        image_encoder=CLIPVisionModelWithProjection(_vision_config()),
        unet=_unet(),
        scheduler=PNDMScheduler(**_noise_schedule(), skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=CLIPImageProcessor(crop_size={"height": 28, "width": 28}, size={"shortest_edge": 28}),
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return str(folder)


def stable_diffusion(folder: Path) -> str:
    """Like Stable Diffusion 1.5."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    StableDiffusionPipeline(
        vae=_autoencoder(),
        text_encoder=CLIPTextModel(_text_config()),
        tokenizer=_tokenizer(),
        unet=_unet(),
        scheduler=DDIMScheduler(**_noise_schedule(), clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return str(folder)


def sdxl(folder: Path, scheduler=None) -> str:
    """Like Stable Diffusion XL."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    StableDiffusionXLPipeline(
        vae=_autoencoder(),
        text_encoder=CLIPTextModel(_text_config()),
        text_encoder_2=CLIPTextModelWithProjection(_text_config()),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        unet=_unet(
            cross_attention_dim=2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        ),
        scheduler=scheduler or EulerDiscreteScheduler(**_noise_schedule()),
        add_watermarker=False,
    ).save_pretrained(folder)
    return str(folder)


def turbo(folder: Path) -> str:
    """Like SDXL Turbo: ancestral Euler steps at trailing timesteps, for a guidance scale of 0."""
    from diffusers import EulerAncestralDiscreteScheduler

    return sdxl(folder, EulerAncestralDiscreteScheduler(**_noise_schedule(), timestep_spacing="trailing"))


def clip(folder: Path) -> str:
    """Like openai/clip-vit-base-patch32, with a preprocessor_config.json whose mean and std are not CLIP's usual ones."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text, vision = _text_config().to_dict(), _vision_config().to_dict()
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)).save_pretrained(folder)
    settings = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.3, 0.2, 0.1], "crop_size": {"height": 28, "width": 28}}
    Path(folder, "preprocessor_config.json").write_text(json.dumps(settings))
    return str(folder)


def dinov2(folder: Path) -> str:
    """Like facebook/dinov2-small, without a preprocessor_config.json."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7)
    Dinov2Model(config).save_pretrained(folder)
    return str(folder)


def dit(folder: Path, classes: int = 10) -> str:
    """Like facebook/DiT-XL-2-256, which predicts a variance too. The weights of the last layer are not zero."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        norm_num_groups=4,
        sample_size=LATENT,
        patch_size=4,
        num_embeds_ada_norm=classes,
    )
    DiTPipeline(transformer, _autoencoder(), DDIMScheduler()).save_pretrained(folder)
    return str(folder)


def pixel_unet(folder: Path, classes: int | None = 11, channels: int = 3) -> str:
    """A class-conditional model of 16 px images with DDPM's scheduler; the last class stands for "no class"."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
        num_class_embeds=classes,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
    return str(folder)


def patch_prior(file: Path, classes: int = 10, size: int = 16) -> str:
    """Like checkpoints/priors/glyphs_digits_16.safetensors, in this project's own format."""
    from datafree.diffusion.pixel import PatchUNet
    from engine.runtime.tensors import save_tensors

    torch.manual_seed(0)
    about = {"num_classes": classes, "image_size": size, "patch": 2, "channels": [8, 16], "attention": False}
    weights = {name: tensor.half() for name, tensor in PatchUNet(**about).state_dict().items()}
    about |= {"class_names": [str(c) for c in range(classes)], "name": "tiny"}
    save_tensors(file, weights, {name: json.dumps(value) for name, value in about.items()})
    return str(file)


# All kinds of prior that stage generate can use.
GENERATIVE = ("stable_diffusion", "sdxl", "turbo", "dit", "pixel_unet", "patch_prior")
