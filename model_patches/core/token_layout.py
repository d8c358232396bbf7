"""Where text and picture are in the token sequence of a diffusion transformer.

These models have no UNet: in most of them text and image tokens attend to each other in one sequence, in an order of each
family's own; in some the picture reads the text in a cross-attention. FAMILIES is all that is known about them; a further family
is one entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from .unet_attention import require_unet


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """The sequence of one call. What is neither text nor image (reference pictures, padding) lies beside them.

    Where the picture `crosses` to the text it is a sequence in thought: the image tokens attend to each other, then to the text.
    """

    crosses: bool
    tokens: int
    text: slice
    image: slice
    """The tokens of the picture that is sampled, row by row."""
    padding: slice
    """Tokens behind the image that make its number a multiple of something."""
    grid: tuple[int, int]
    """Height and width of the picture in tokens."""
    patch: int
    """How many latent cells a token's side has."""
    blocks: tuple[int, ...]
    """How many joint attentions a call has, in each of the network's lists of blocks."""

    def whole(self, plane: torch.Tensor) -> torch.Tensor:
        """A plane [B, C, h, w] of the latent, its edge repeated where the last tokens reach beyond it."""
        height, width = (side * self.patch for side in self.grid)
        return F.pad(plane, (0, width - plane.shape[-1], 0, height - plane.shape[-2]), mode="replicate")

    def placed(self, cells: torch.Tensor) -> torch.Tensor:
        """Image tokens [rows, height x width] in the whole sequence, [rows, tokens], False or 0 elsewhere."""
        placed = torch.zeros(len(cells), self.tokens, dtype=cells.dtype, device=cells.device)
        placed[:, self.image] = cells
        return placed


@dataclass(frozen=True, kw_only=True)
class Family:
    """How the models of one class order their tokens."""

    name: str
    patch: str
    """The network's attribute with how many latent cells a token's side has, a number or (frames, height, width)."""
    blocks: tuple[str, ...]
    """The network's lists of blocks, in the order in which they run."""
    crosses: bool = False
    """Whether the picture reads the text in a cross-attention of its own, behind the self-attention of each block."""
    text: Callable[[Any, torch.Tensor, Mapping[str, Any]], int] = lambda network, context, inputs: context.shape[1]
    """How many tokens the text has, from the network, its context [rows, tokens, channels] and its further inputs."""
    image_first: bool = False
    padded_to: str | None = None
    """The network's attribute with the number of which text and picture are padded to a multiple; it may be None."""
    references: Callable[[Any, Mapping[str, Any]], bool] | None = None
    """Whether the network reads the reference pictures that it is given: they follow the picture, a token for each of their
    patches. Without it they are refused."""
    refused: tuple[str, ...] = ()
    """Further inputs that add tokens in places that are not known."""


def _always(_network: Any, _inputs: Mapping[str, Any]) -> bool:
    return True


def _where_told(network: Any, inputs: Mapping[str, Any]) -> bool:
    return inputs.get("ref_latents_method", network.default_ref_method) is not None


def _of_t5(_network: Any, context: torch.Tensor, inputs: Mapping[str, Any]) -> int:
    # Outside of inference mode the network itself makes the context of T5's tokens.
    ids = inputs.get("t5xxl_ids")
    return context.shape[1] if ids is None else max(512, ids.shape[1])


def _with_llama(_network: Any, context: torch.Tensor, inputs: Mapping[str, Any]) -> int:
    return context.shape[1] + 2 * inputs["encoder_hidden_states_llama3"].shape[2]


FAMILIES: dict[tuple[str, str], Family] = {
    ("comfy.ldm.flux.model", "Flux"): Family(
        name="Flux", patch="patch_size", blocks=("double_blocks", "single_blocks"), references=_always
    ),
    ("comfy.ldm.chroma.model", "Chroma"): Family(
        name="Chroma", patch="patch_size", blocks=("double_blocks", "single_blocks")
    ),
    ("comfy.ldm.qwen_image.model", "QwenImageTransformer2DModel"): Family(
        name="Qwen-Image", patch="patch_size", blocks=("transformer_blocks",), references=_always
    ),
    ("comfy.ldm.lumina.model", "NextDiT"): Family(
        name="Z-Image", patch="patch_size", blocks=("layers",), padded_to="pad_tokens_multiple"
    ),
    ("comfy.ldm.modules.diffusionmodules.mmdit", "OpenAISignatureMMDITWrapper"): Family(
        name="SD3", patch="patch_size", blocks=("joint_blocks",)
    ),
    ("comfy.ldm.krea2.model", "SingleStreamDiT"): Family(
        name="Krea2", patch="patch", blocks=("blocks",), references=_where_told
    ),
    ("comfy.ldm.hidream.model", "HiDreamImageTransformer2DModel"): Family(
        name="HiDream",
        patch="patch_size",
        blocks=("double_stream_blocks", "single_stream_blocks"),
        text=_with_llama,
        image_first=True,
        refused=("image_cond",),
    ),
    ("comfy.ldm.anima.model", "Anima"): Family(
        name="Anima", patch="patch_spatial", blocks=("blocks",), crosses=True, text=_of_t5
    ),
    ("comfy.ldm.cosmos.predict2", "MiniTrainDIT"): Family(
        name="Cosmos Predict2", patch="patch_spatial", blocks=("blocks",), crosses=True
    ),
    ("comfy.ldm.wan.model", "WanModel"): Family(
        name="Wan",
        patch="patch_size",
        blocks=("blocks",),
        crosses=True,
        refused=("reference_latent", "context_latents", "time_dim_concat"),
    ),
}
"""By the network's module and class."""


def family_of(network: object) -> Family | None:
    """The family of a model's network; None for all that are not in the table."""
    return FAMILIES.get((type(network).__module__, type(network).__qualname__))


def require_attention(model: object, who: str) -> None:
    """Raises ValueError, in one sentence that names the families that work, for a host MODEL that `who` can't act on."""
    inner = getattr(model, "model", model)
    network = getattr(inner, "diffusion_model", None)
    if isinstance(network, UNetModel):
        require_unet(model, who)
    elif family_of(network) is None:
        families = ", ".join(family.name for family in FAMILIES.values())
        raise ValueError(
            f"{who} works on SD1.5, SD2 and SDXL, and on {families}, as ComfyUI's own loaders load them; this MODEL is "
            f"{type(inner).__name__} with a network of class {type(network).__name__}. Load one of those."
        )


def token_layout(
    network: Any, size: Sequence[int], context: torch.Tensor, inputs: Mapping[str, Any], who: str
) -> TokenLayout:
    """The layout of a call of `network` with latents of `size`, (height, width) or (frames, height, width).

    `context` [rows, tokens, channels] and `inputs` are what the network is given. Raises ValueError, which names `who`, for
    several frames, and for inputs that put further tokens in places that are not known.
    """
    family = family_of(network)
    assert family is not None, type(network)
    if len(size) == 3 and size[0] > 1:
        raise ValueError(
            f"{who} works on single pictures, and these latents have {size[0]} frames: give it latents of one frame."
        )
    size = size[-2:]
    patch = getattr(network, family.patch)
    patch = patch if isinstance(patch, int) else patch[-1]
    grid = _tokens_of(size, patch)
    pictures = [_tokens_of(latent.shape[-2:], patch) for latent in inputs.get("ref_latents") or ()]
    extra = [name for name in family.refused if inputs.get(name) is not None]
    if extra or (pictures and family.references is None):
        raise ValueError(
            f"{who} does not know where {family.name} puts the tokens of reference pictures: take Reference Latent (or what "
            f"else gives the conditioning a picture) or {who} out."
        )
    if family.references is not None and not family.references(network, inputs):
        pictures = []
    multiple = getattr(network, family.padded_to) if family.padded_to else None
    text = _padded(family.text(network, context, inputs), multiple)
    image, seen = grid[0] * grid[1], sum(height * width for height, width in pictures)
    first = image if family.image_first else text
    parts = slice(0, first), slice(first, text + image)
    return TokenLayout(
        crosses=family.crosses,
        tokens=text + _padded(image, multiple) + seen,
        text=parts[1] if family.image_first else parts[0],
        image=parts[0] if family.image_first else parts[1],
        padding=slice(text + image, text + _padded(image, multiple)),
        grid=grid,
        patch=patch,
        blocks=tuple(len(getattr(network, name)) for name in family.blocks),
    )


def _tokens_of(size: Sequence[int], patch: int) -> tuple[int, int]:
    return -(-size[0] // patch), -(-size[1] // patch)


def _padded(tokens: int, multiple: int | None) -> int:
    return tokens if multiple is None else tokens + -tokens % multiple
