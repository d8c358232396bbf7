"""Small random diffusion transformers in the shapes of the real families, wrapped the way the host wraps a checkpoint.

They are the host's own classes with the real options and few channels. Every weight is random, the ones that training starts at
zero too (output layers, the gates of the modulations), and so are the tokens that Z-Image pads with.

In `FAMILIES` text and image tokens attend to each other in one sequence (joint attention):

    family        latent            cells a token   joint blocks          head   text channels    pooled
    flux          16 channels       2 x 2           2 double, 2 single    32     48               24
    flux_fill     16, input 96      2 x 2           2 double, 2 single    32     48               24
    flux2         128               1               2 double, 2 single    32     48               none
    chroma        16                2 x 2           2 double, 2 single    32     48               none
    qwen_image    16, 5-D           2 x 2           4                     32     48               none
    z_image       16                2 x 2           3 (and 4 refiners)    64     48               none
    lumina2       16                2 x 2           3 (and 4 refiners)    24     48               none
    sd3           16                2 x 2           3                     64     48               24
    sd35_medium   16                2 x 2           3; 1st: image alone   64     48               24
    krea2         16, 5-D           2 x 2           4 (and 4 of text)     16     3 x 32           none
    hidream       16                2 x 2           2 double, 2 single    32     48; llama 3, 40  24

The heads are 2, but 4 in Z-Image, and 4 with 2 for keys and values in Lumina 2 and Krea 2. Z-Image is 256 wide: the host's
modulation takes no less. HiDream's experts all answer (the real ones: 2 of 4), so that its output is continuous in its weights.

In `CROSS_FAMILIES` image tokens attend to each other, then to the text (cross-attention):

    family        latent                  cells a token   blocks   head   text channels    beside the text
    anima         16, 5-D                 2 x 2           4        32     48               T5's token ids and weights
    cosmos        16, 5-D                 2 x 2           4        32     48               none
    wan           16, 5-D                 2 x 2           4        32     48               none
    wan_i2v       16, 5-D, input 36       2 x 2           4        32     48               257 vision tokens of 1280 channels

The heads are 2. Anima's network gets another text than the conditioning's: its adapter (2 blocks here) lets T5's tokens look at
Qwen's, and the host pads what comes out with zeros to 512. Wan's vision tokens are the same for every prompt, as in a workflow.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from devtools.pack import ensure_host

ensure_host()

import comfy.ldm.anima.model  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.supported_models  # noqa: E402
from comfy.ldm.modules.diffusionmodules.mmdit import get_2d_sincos_pos_embed  # noqa: E402

FAMILIES = (
    *("flux", "flux_fill", "flux2", "chroma", "qwen_image", "z_image", "lumina2"),
    *("sd3", "sd35_medium", "krea2", "hidream"),
)
CROSS_FAMILIES = ("anima", "cosmos", "wan", "wan_i2v")
_ALL = (*FAMILIES, *CROSS_FAMILIES)
LATENT_CHANNELS = {family: 128 if family == "flux2" else 16 for family in _ALL}
GRID_CELLS = {family: 1 if family == "flux2" else 2 for family in _ALL}
"""Latent cells along a side of an image token."""
VIDEO_LATENT = ("qwen_image", "krea2", *CROSS_FAMILIES)
"""Latents [B, channels, 1, h, w], of one frame."""
CONTEXT_DIM = {family: 3 * 32 if family == "krea2" else 48 for family in _ALL}
POOLED_DIM = {"flux": 24, "flux_fill": 24, "sd3": 24, "sd35_medium": 24, "hidream": 24}
LLAMA_LAYERS, LLAMA_DIM, LLAMA_TOKENS = 3, 40, 9
"""HiDream's second text: [batch, layers, tokens, channels]."""
MORE_QWEN_TOKENS = 4
"""Anima's text encoder gives so many embeddings more than T5 has tokens."""
T5_VOCABULARY = 32128
VISION_TOKENS, VISION_DIM = 257, 1280

_FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 24,
    "context_in_dim": 48,
    "hidden_size": 64,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "txt_ids_dims": [],
}
_FLUX2 = {
    **_FLUX,
    "image_model": "flux2",
    "in_channels": 128,
    "out_channels": 128,
    "vec_in_dim": None,
    "mlp_ratio": 3.0,
    "axes_dim": [8, 8, 8, 8],
    "theta": 2000,
    "patch_size": 1,
    "qkv_bias": False,
    "txt_ids_dims": [3],
    "guidance_embed": True,
    "global_modulation": True,
    "mlp_silu_act": True,
    "ops_bias": False,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
}
_CHROMA = {
    **_FLUX,
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "vec_in_dim": None,
    "in_dim": 64,
    "out_dim": 64,
    "hidden_dim": 96,
    "n_layers": 2,
}
_QWEN_IMAGE = {
    "image_model": "qwen_image",
    "in_channels": 64,
    "num_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 48,
    "axes_dims_rope": (8, 12, 12),
}
_LUMINA2 = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 96,
    "cap_feat_dim": 48,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "axes_dims": [8, 8, 8],
    "axes_lens": [300, 512, 512],
    "rope_theta": 10000.0,
    "ffn_dim_multiplier": 4.0,
    "qk_norm": True,
}
_Z_IMAGE = {
    **_LUMINA2,
    "dim": 256,
    "n_kv_heads": 4,
    "axes_dims": [16, 24, 24],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
_SD3_GRID = 24
_SD3 = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "input_size": None,
    "depth": 2,  # heads of 64 channels
    "num_blocks": 3,
    "adm_in_channels": 24,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 48, "out_features": 128}},
    "num_patches": _SD3_GRID**2,
    "pos_embed_max_size": _SD3_GRID,
    "pos_embed_scaling_factor": None,
    "x_block_self_attn_layers": [],
}
_SD35_MEDIUM = {**_SD3, "qk_norm": "rms", "x_block_self_attn_layers": [0]}
_KREA2 = {
    "image_model": "krea2",
    "features": 64,
    "channels": 16,
    "patch": 2,
    "layers": 4,
    "heads": 4,
    "kvheads": 2,
    "txtlayers": 3,
    "txtdim": 32,
    "txtheads": 2,
    "txtkvheads": 2,
}
_HIDREAM = {
    "image_model": "hidream",
    "attention_head_dim": 32,
    "axes_dims_rope": [16, 8, 8],
    "caption_channels": [48, LLAMA_DIM],
    "max_resolution": [128, 128],
    "in_channels": 16,
    "llama_layers": [0, 1, 2, 2],
    "num_attention_heads": 2,
    "num_routed_experts": 2,
    "num_activated_experts": 2,
    "num_layers": 2,
    "num_single_layers": 2,
    "out_channels": 16,
    "patch_size": 2,
    "text_emb_dim": 24,
}
_COSMOS = {
    "image_model": "cosmos_predict2",
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 64,
    "concat_padding_mask": True,
    "crossattn_emb_channels": 48,
    "pos_emb_cls": "rope3d",
    "pos_emb_learnable": True,
    "pos_emb_interpolation": "crop",
    "min_fps": 1,
    "max_fps": 30,
    "use_adaln_lora": True,
    "adaln_lora_dim": 32,
    "num_blocks": 4,
    "num_heads": 2,
    "extra_per_block_abs_pos_emb": False,
    "rope_h_extrapolation_ratio": 4.0,
    "rope_w_extrapolation_ratio": 4.0,
    "rope_t_extrapolation_ratio": 1.0,
    "extra_h_extrapolation_ratio": 1.0,
    "extra_w_extrapolation_ratio": 1.0,
    "extra_t_extrapolation_ratio": 1.0,
    "rope_enable_fps_modulation": False,
}
_LLM_ADAPTER = {"source_dim": 48, "target_dim": 48, "model_dim": 48, "num_layers": 2, "num_heads": 2}
"""Anima's, which the host's config says nothing of."""
_WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 64,
    "out_dim": 16,
    "num_heads": 2,
    "ffn_dim": 128,
    "num_layers": 4,
    "patch_size": (1, 2, 2),
    "freq_dim": 256,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "in_dim": 16,
    "text_dim": 48,
}
_CONFIG: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "flux": (comfy.supported_models.Flux, {**_FLUX, "guidance_embed": True}),
    "flux_fill": (comfy.supported_models.FluxInpaint, {**_FLUX, "guidance_embed": True, "in_channels": 96}),
    "flux2": (comfy.supported_models.Flux2, _FLUX2),
    "chroma": (comfy.supported_models.Chroma, _CHROMA),
    "qwen_image": (comfy.supported_models.QwenImage, _QWEN_IMAGE),
    "z_image": (comfy.supported_models.ZImage, _Z_IMAGE),
    "lumina2": (comfy.supported_models.Lumina2, _LUMINA2),
    "sd3": (comfy.supported_models.SD3, _SD3),
    "sd35_medium": (comfy.supported_models.SD3, _SD35_MEDIUM),
    "krea2": (comfy.supported_models.Krea2, _KREA2),
    "hidream": (comfy.supported_models.HiDream, _HIDREAM),
    "anima": (comfy.supported_models.Anima, {**_COSMOS, "image_model": "anima"}),
    "cosmos": (comfy.supported_models.CosmosT2IPredict2, _COSMOS),
    "wan": (comfy.supported_models.WAN21_T2V, _WAN),
    "wan_i2v": (comfy.supported_models.WAN21_I2V, {**_WAN, "model_type": "i2v", "in_dim": 36}),
}

_QUERY_NORMS = ("query_norm", "q_norm", "norm_q", "norm_added_q", "ln_q", "q_rms_norm", "q_rms_norm_t", "qnorm")
_SHARPNESS = 1.6
"""Normed queries and keys give raw scores of this deviation: a softmax that is neither flat nor saturated."""


def small_transformer(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float32
) -> comfy.model_patcher.ModelPatcher:
    """A small model of `family` on the CPU.

    The weights depend on `family` and `seed` only: `dtype` rounds the same numbers.
    """
    config_class, network_config = _CONFIG[family]
    config = config_class(network_config)
    config.set_inference_dtype(dtype, None)
    anima = comfy.ldm.anima.model
    with mock.patch.object(anima, "LLMAdapter", partial(anima.LLMAdapter, **_LLM_ADAPTER)):
        model = config.get_model({})
    _randomise(model.diffusion_model, seed)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def latent_shape(family: str, height: int, width: int, batch: int = 1) -> tuple[int, ...]:
    """The shape of a latent of `height` x `width` cells."""
    frames = (1,) if family in VIDEO_LATENT else ()
    return (batch, LATENT_CHANNELS[family], *frames, height, width)


def transformer_conditioning(
    family: str, seed: int, tokens: int, batch: int = 1, with_words: Mapping[str, Any] | None = None, masked: int = 0
) -> list:
    """Host CONDITIONING with a random text [batch, tokens, context] and what else `family`'s text encoder gives.

    `with_words`: further entries, such as what a node tells of the prompt's words. `masked`: how many of the last tokens
    Qwen-Image's mask leaves out; where it leaves none out, the encoder gives none. HiDream's second text has `LLAMA_TOKENS`.
    Anima's `tokens` are T5's, and its text has `MORE_QWEN_TOKENS` more.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = tokens + (MORE_QWEN_TOKENS if family == "anima" else 0)
    text = torch.randn(batch, rows, CONTEXT_DIM[family], generator=generator)
    # The host's encoders give None where they have no pooled output.
    entries: dict[str, Any] = {"pooled_output": None}
    if family in POOLED_DIM:
        entries["pooled_output"] = torch.randn(batch, POOLED_DIM[family], generator=generator)
    if family in ("flux", "flux_fill", "flux2"):
        entries["guidance"] = 3.5
    if family in ("flux2", "z_image", "lumina2", "anima", "cosmos"):
        entries["attention_mask"] = torch.ones(batch, rows, dtype=torch.long)
    if family in ("qwen_image", "krea2") and masked:
        entries["attention_mask"] = (torch.arange(tokens) < tokens - masked).long().expand(batch, tokens).clone()
    if family == "hidream":
        entries["conditioning_llama3"] = torch.randn(batch, LLAMA_LAYERS, LLAMA_TOKENS, LLAMA_DIM, generator=generator)
    if family == "anima":
        entries["t5xxl_ids"] = torch.randint(T5_VOCABULARY, (tokens,), generator=generator, dtype=torch.int)
        entries["t5xxl_weights"] = 0.5 + torch.rand(tokens, generator=generator)
    if family == "wan_i2v":
        seen = torch.randn(1, VISION_TOKENS, VISION_DIM, generator=torch.Generator().manual_seed(0))
        entries["clip_vision_output"] = SimpleNamespace(penultimate_hidden_states=seen)
    return [[text, {**entries, **(with_words or {})}]]


def _randomise(network: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name.endswith("pad_token") or name == "llm_adapter.embed.weight":
            pass  # as large as the other tokens, as large as what is added to them
        elif parameter.ndim > 1:
            values *= 1.0 / parameter[0].numel() ** 0.5
        else:
            values = 0.1 * values + _centre(name)
        parameter.data.copy_(values)
    for name, buffer in network.named_buffers():
        if name == "pos_embed":
            buffer.copy_(torch.from_numpy(get_2d_sincos_pos_embed(buffer.shape[-1], _SD3_GRID))[None])


def _centre(name: str) -> float:
    """Biases are around 0, the factors of a norm around 1; Krea 2 writes those as what is added to 1."""
    if not name.endswith((".weight", ".scale")):
        return 0.0
    factor = _SHARPNESS if name.split(".")[-2] in _QUERY_NORMS else 1.0
    return factor - 1.0 if name.endswith(".scale") else factor
