"""Small random UNets in the shapes of the real families, wrapped the way the host wraps a loaded checkpoint.

The UNets have 32 base channels and the real families' plan: which level has how many transformer blocks, linear or
1x1 projections, a fixed number of heads (SD1.5) or a fixed head size (SD2, SDXL), ADM input (SDXL). Every weight is
random, the output layers too (the host leaves them uninitialised and training starts them at zero).

    family   attention at latent / 1, / 2, / 4   middle      heads              context   pooled
    sd15     depth 1, 1, 1                       / 8, 1      4 (8..32 wide)     24        768
    sd2      depth 1, 1, 1                       / 8, 1      16 wide, linear    32        1024
    sdxl     none, depth 2, depth 3              / 4, 3      16 wide, linear    40        1280 (ADM 2816)
    x4       none, depth 1, 1; / 8: 1            / 8, 1      8 (8, 16), linear  28        none (noise level)

The x4 upscaler (`small_upscaler`) predicts v. Its 7 channels are the latent's 4 and the low-resolution picture's 3, with
noise, whose level it is told as a class. Its transformers at / 2 and / 4 attend to the text twice, not to themselves.
"""

from __future__ import annotations

import warnings

import torch

from devtools.pack import ensure_host, pack_module

ensure_host()

import comfy.model_base  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.supported_models  # noqa: E402
from comfy_extras.nodes_sdupscale import SD_4XUpscale_Conditioning  # noqa: E402

full_size = pack_module("evaluation.full_size")

FAMILIES = ("sd15", "sd2", "sdxl")
CONTEXT_DIM = {"sd15": 24, "sd2": 32, "sdxl": 40}
POOLED_DIM = {"sd15": 768, "sd2": 1024, "sdxl": 1280}

_CONFIG = {
    "sd15": comfy.supported_models.SD15,
    "sd2": comfy.supported_models.SD20,
    "sdxl": comfy.supported_models.SDXL,
}
_THREE_ATTENTION_LEVELS = {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": (1, 2, 4, 4),
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "adm_in_channels": None,
}
_PLAN = {
    "sd15": {**_THREE_ATTENTION_LEVELS, "use_linear_in_transformer": False},
    "sd2": {**_THREE_ATTENTION_LEVELS, "use_linear_in_transformer": True},
    "sdxl": {
        "num_res_blocks": [2, 2, 2],
        "channel_mult": (1, 2, 4),
        "transformer_depth": [0, 0, 2, 2, 3, 3],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 3, 3, 3],
        "transformer_depth_middle": 3,
        "use_linear_in_transformer": True,
        "adm_in_channels": 2816,
        "num_classes": "sequential",
    },
}
_HEADS = {
    "sd15": {"num_heads": 4, "num_head_channels": -1},
    "sd2": {"num_heads": -1, "num_head_channels": 16},
    "sdxl": {"num_heads": -1, "num_head_channels": 16},
}
# Gains over 1/sqrt(fan in). Queries and keys: raw scores of standard deviation about gain squared, so that neither
# softmax is flat nor saturated.
# An embedding has no fan in: 6 lets the x4 upscaler's noise level count for about as much as the timestep.
_GAINS = {
    "attn1.to_q": 1.2,
    "attn1.to_k": 1.2,
    "attn2.to_q": 1.5,
    "attn2.to_k": 1.5,
    "label_emb.weight": 6.0,
}

UPSCALER_CONTEXT_DIM = 28
UPSCALER_NOISE_LEVELS = 350


def small_model(
    family: str,
    inpainting: bool,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    v_prediction: bool = False,
) -> comfy.model_patcher.ModelPatcher:
    """A small model of `family` ("sd15", "sd2", "sdxl") on the CPU; 9 input channels if `inpainting`, else 4.

    The weights depend on `family`, `inpainting` and `seed` only: `dtype` rounds the same numbers.
    """
    unet_config = {
        "image_size": 32,
        "in_channels": 9 if inpainting else 4,
        "out_channels": 4,
        "model_channels": 32,
        "use_spatial_transformer": True,
        "legacy": False,
        "context_dim": CONTEXT_DIM[family],
        **_PLAN[family],
    }
    config = _CONFIG[family](unet_config)
    config.unet_config.update(_HEADS[family])
    config.set_inference_dtype(dtype, None)
    model_type = comfy.model_base.ModelType.V_PREDICTION if v_prediction else comfy.model_base.ModelType.EPS
    model_class = comfy.model_base.SDXL if family == "sdxl" else comfy.model_base.BaseModel
    model = model_class(config, model_type=model_type)
    if inpainting:
        model.set_inpaint()
    _randomise(model.diffusion_model, seed)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def small_upscaler(dtype: torch.dtype = torch.float32, seed: int = 0) -> comfy.model_patcher.ModelPatcher:
    """A small x4 upscaler on the CPU, as the host makes it of its checkpoint."""
    config = comfy.supported_models.SD_X4Upscaler(
        {**full_size.X4, "model_channels": 32, "context_dim": UPSCALER_CONTEXT_DIM}
    )
    config.set_inference_dtype(dtype, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the host's noise schedule copies tensors with torch.tensor
        model = config.get_model({})
    _randomise(model.diffusion_model, seed)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def upscaler_conditioning(images: torch.Tensor, noise_level: int, seed: int, tokens: int = 77) -> tuple[list, list]:
    """Positive and negative CONDITIONING, random texts and `images` [B, h, w, 3] in [0, 1], from the host's own node.

    The latents are [B, 4, h, w]. The host adds the noise of `noise_level` (0 to 350) to the images, with its seed.
    """
    generator = torch.Generator().manual_seed(seed)
    sides = [[[torch.randn(1, tokens, UPSCALER_CONTEXT_DIM, generator=generator), {}]] for _ in range(2)]
    output = SD_4XUpscale_Conditioning.execute(images, *sides, 4.0, noise_level / UPSCALER_NOISE_LEVELS)
    positive, negative, _ = output.args
    return positive, negative


def small_conditioning(family: str, seed: int, tokens: int = 77, batch: int = 1) -> list:
    """Host CONDITIONING with a random text embedding [batch, tokens, context] and its pooled output [batch, pooled]."""
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(batch, tokens, CONTEXT_DIM[family], generator=generator)
    pooled = torch.randn(batch, POOLED_DIM[family], generator=generator)
    return [[context, {"pooled_output": pooled}]]


def _randomise(unet: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in unet.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim > 1:
            gain = next((gain for part, gain in _GAINS.items() if part in name), 1.0)
            values *= gain / parameter[0].numel() ** 0.5
        else:
            values = 0.1 * values + (1.0 if name.endswith("weight") else 0.0)
        parameter.data.copy_(values)
    # As the host's loaders leave them; before 0.30 it is the inference mode, in which they load, that has the same effect.
    unet.requires_grad_(False)
