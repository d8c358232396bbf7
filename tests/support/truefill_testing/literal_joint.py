"""Joint attention written out, with semantic boundary control (PILOT) and PAIntA put in: all scores and softmaxes in float64.

One attention of one row, q and k as the host's attention function gets them (after RoPE), N = text + image + what else is there:

    A = q k^T                                                                        [heads, N, N]
    A_ij *= w_j      image token i in the hole, image token j not: w_j = 1 - strength (1 - c_j)             PAIntA
    S = A / sqrt(d) + mask                                                           the host's mask, where it has one
    o1 = softmax(S) v
    o2 = softmax(S without the columns of the text) v
    out_i = (1 - strength) o1_i + strength o2_i   where token i is known, or pads the image    semantic boundary control

    c = clip((s - median(s)) / max(s), 0, 1),   s_j = sum over the prompt's own words t of mean over heads of P_jt
    P = softmax over the text's columns of (q k^T / sqrt(d) + mask), rows of the image

A negative prompt's row takes the mean of the c of its picture's conditional rows. References are neither hole nor known. Where
the tokens lie, as the host's networks put them:

    flux                           text, image, references
    flux_fill, chroma              text, image
    flux2                          padding of the text to 512, text, image, references
    qwen_image, krea2              text, image, references
    lumina2                        text, image
    z_image                        text, its padding to a multiple of 32, image, its padding to a multiple of 32
    sd3, sd35_medium               text, image
    hidream                        image, T5's text, llama's text (its last layer), llama's text (the block's own layer)
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from .literal_painta import level_mask, relevance_weights, score_factors

Layers = Literal["all", "alternate", "first half", "second half"]

FLUX2_TEXT = 512
PADDED_TO = 32
"""Z-Image: both texts and images have a multiple of this many tokens."""

_FUNCTIONS = {
    "flux": ("comfy.ldm.flux.math", "optimized_attention"),
    "flux_fill": ("comfy.ldm.flux.math", "optimized_attention"),
    "flux2": ("comfy.ldm.flux.math", "optimized_attention"),
    "chroma": ("comfy.ldm.flux.math", "optimized_attention"),
    "qwen_image": ("comfy.ldm.qwen_image.model", "optimized_attention_masked"),
    "z_image": ("comfy.ldm.lumina.model", "optimized_attention_masked"),
    "lumina2": ("comfy.ldm.lumina.model", "optimized_attention_masked"),
    "sd3": ("comfy.ldm.modules.diffusionmodules.mmdit", "optimized_attention"),
    "sd35_medium": ("comfy.ldm.modules.diffusionmodules.mmdit", "optimized_attention"),
    "krea2": ("comfy.ldm.krea2.model", "optimized_attention_masked"),
    "hidream": ("comfy.ldm.hidream.model", "optimized_attention"),
}
_WITH_REFERENCES = ("flux", "flux2", "qwen_image", "krea2")


@dataclass
class LiteralRows:
    """What the B rows of one prompt are in a model call.

    Positions count the tokens of the prompt's CONDITIONING from 0, before any padding. HiDream has two texts: T5's tokens come
    first and llama's after them, and `text_tokens` is their sum.
    """

    conditional: bool
    text_tokens: int
    words: list[int]
    """The prompt's own words. Those of a negative prompt are not looked at."""


@dataclass
class Tokens:
    """Where a row's tokens lie in the joint sequence of `total` tokens."""

    image: list[int]
    """Row by row of the token grid."""
    text: list[int]
    """All of the text, its padding included."""
    words: list[int]
    padding: list[int]
    """Of the image."""
    total: int


RowsOf = Callable[[list[int]], Sequence[LiteralRows]]


@contextmanager
def literal_joint_attention(
    family: str,
    network: torch.nn.Module,
    latent_size: tuple[int, int],
    hole: torch.Tensor,
    rows: Sequence[LiteralRows] | RowsOf,
    *,
    boundary: float = 0.0,
    painta: float = 0.0,
    smooth: bool = True,
    boundary_layers: Layers = "all",
    painta_layers: Layers = "all",
    references: Sequence[tuple[int, int]] = (),
) -> Iterator[None]:
    """While it is open, `network` (a diffusion model of the host) attends as written above, whatever overrides it is given.

    `hole` [B, 1, *latent_size] in [0, 1]. `rows` tells the prompts of a model call, in the order of the batch, whose rows are
    those of the first prompt's B pictures, then the second's, ...: a list, the same for every call, or a function of
    the call's transformer_options["cond_or_uncond"] (one number a prompt, 0 = positive), which a sampler gives. Where a call has
    negative rows only, their c is that of the last call with conditional rows, of the same timestep. `references`: latent sizes.
    """
    call = _Calls(
        family, network, latent_size, hole, rows, boundary, painta, smooth, boundary_layers, painta_layers, references
    )
    module_name, name = _FUNCTIONS[family]
    module = importlib.import_module(module_name)
    original = getattr(module, name)
    hooks = [
        network.register_forward_pre_hook(call.begins, with_kwargs=True),
        network.register_forward_hook(call.ended),
    ]
    setattr(module, name, call.attention)
    try:
        yield
    finally:
        setattr(module, name, original)
        for hook in hooks:
            hook.remove()


def joint_calls(family: str, network: Any) -> list[bool]:
    """The network's calls of the attention function in one forward pass, in order: True where text and image attend jointly."""
    if family == "qwen_image":
        return [True] * len(network.transformer_blocks)
    if family in ("z_image", "lumina2"):
        alone = len(network.context_refiner) + len(network.noise_refiner)
        return [False] * alone + [True] * len(network.layers)
    if family in ("sd3", "sd35_medium"):
        calls = []
        for block in network.joint_blocks:
            # A block of SD3.5 medium attends a second time, the image to itself.
            calls += [True, False] if block.x_block.x_block_self_attn else [True]
        return calls
    if family == "krea2":
        alone = len(network.txtfusion.layerwise_blocks) + len(network.txtfusion.refiner_blocks)
        return [False] * alone + [True] * len(network.blocks)
    if family == "hidream":
        return [True] * (len(network.double_stream_blocks) + len(network.single_stream_blocks))
    return [True] * (len(network.double_blocks) + len(network.single_blocks))


def in_layers(layers: Layers, number: int, count: int) -> bool:
    """Whether joint block `number` of `count`, from 0, is one of `layers`."""
    if layers == "alternate":
        return number % 2 == 1
    if layers == "first half":
        return number < count / 2
    if layers == "second half":
        return number >= count / 2
    assert layers == "all", layers
    return True


def token_grid(family: str, size: tuple[int, int]) -> tuple[int, int]:
    """A latent's size -> rows and columns of image tokens: an odd size is padded."""
    side = 1 if family == "flux2" else 2
    return math.ceil(size[0] / side), math.ceil(size[1] / side)


def tokens_of(
    family: str,
    total: int,
    latent_size: tuple[int, int],
    rows: LiteralRows,
    references: Sequence[tuple[int, int]] = (),
) -> Tokens:
    """Where the tokens of a row of `rows` lie in a joint sequence of `total` tokens."""
    cells = math.prod(token_grid(family, latent_size))
    beside = sum(math.prod(token_grid(family, size)) for size in references)
    text_tokens = rows.text_tokens
    padding: list[int] = []

    if family == "hidream":
        llama = total - cells - text_tokens
        t5 = text_tokens - llama
        # llama's tokens are there twice.
        copies = [[cells + token] + ([cells + token + llama] if token >= t5 else []) for token in range(text_tokens)]
        assert t5 >= 0 and total == cells + t5 + 2 * llama, (total, cells, text_tokens)
        image = list(range(cells))
        text = list(range(cells, total))
    elif family == "z_image":
        text_end = PADDED_TO * math.ceil(text_tokens / PADDED_TO)
        image_end = text_end + PADDED_TO * math.ceil(cells / PADDED_TO)
        assert total == image_end, (total, text_tokens, cells)
        image = list(range(text_end, text_end + cells))
        text = list(range(text_end))
        copies = [[token] for token in range(text_tokens)]
        padding = list(range(text_end + cells, image_end))
    else:
        text_end = max(text_tokens, FLUX2_TEXT) if family == "flux2" else text_tokens
        assert total == text_end + cells + beside, (total, text_tokens, cells, beside)
        image = list(range(text_end, text_end + cells))
        text = list(range(text_end))
        copies = [[text_end - text_tokens + token] for token in range(text_tokens)]
    return Tokens(
        image=image,
        text=text,
        words=[place for token in rows.words for place in copies[token]],
        padding=padding,
        total=total,
    )


def known_tokens(hole: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """A picture's hole [h, w] -> bool [tokens]: where semantic boundary control takes the text away."""
    if not hole.any():
        return torch.zeros(math.prod(grid), dtype=torch.bool)
    resized = F.interpolate(
        _in_patches(hole, grid)[None, None].double(), size=grid, mode="bilinear", align_corners=False
    )
    return (resized < 1 - 1e-5).flatten()


def hole_tokens(hole: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """A picture's hole [h, w] -> bool [tokens]: PAIntA's hole, as in the UNet at a level of this many pixels."""
    return level_mask(_in_patches(hole, grid)[None, None], grid).flatten()


def _in_patches(hole: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """A hole [h, w] -> of a size that patches divide, its last row and column repeated."""
    height, width = hole.shape
    side = round(max(height / grid[0], width / grid[1]))
    rows = [min(row, height - 1) for row in range(grid[0] * side)]
    columns = [min(column, width - 1) for column in range(grid[1] * side)]
    return hole[rows][:, columns]


@dataclass
class _Calls:
    """The host's attention function, for one network, and where in its forward pass it is."""

    family: str
    network: torch.nn.Module
    latent_size: tuple[int, int]
    hole: torch.Tensor
    rows: Sequence[LiteralRows] | RowsOf
    boundary: float
    painta: float
    smooth: bool
    boundary_layers: Layers
    painta_layers: Layers
    references: Sequence[tuple[int, int]]

    def __post_init__(self) -> None:
        assert self.hole.ndim == 4 and self.hole.shape[1] == 1, self.hole.shape
        assert tuple(self.hole.shape[-2:]) == tuple(self.latent_size), (self.hole.shape, self.latent_size)
        assert not self.references or self.family in _WITH_REFERENCES, f"{self.family} appends no references"
        assert not getattr(self.network, "register_length", 0), "registers are no part of the text"
        assert getattr(self.network, "context_processor", None) is None
        self.grid = token_grid(self.family, self.latent_size)
        self.is_joint = joint_calls(self.family, self.network)
        self.call: int | None = None  # None outside of a forward pass of `network`
        self.groups: Sequence[LiteralRows] = ()
        self.timestep: list[float] = []
        # (number of the joint block, picture) -> c of each conditional row
        self.c: dict[tuple[int, int], list[torch.Tensor]] = {}

    def begins(self, _network: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        pictures = self.hole.shape[0]
        if callable(self.rows):
            self.groups = self.rows(options["transformer_options"]["cond_or_uncond"])
        else:
            self.groups = self.rows
        count = arguments[0].shape[0]
        assert count == pictures * len(self.groups), (
            f"the model call has {count} rows, {len(self.groups)} prompts of {pictures} pictures were told"
        )
        timestep = arguments[1].flatten()[:1].tolist()
        if timestep != self.timestep or any(group.conditional for group in self.groups):
            self.c = {}
        self.timestep = timestep
        self.call = 0

    def ended(self, *_: Any) -> None:
        assert self.call == len(self.is_joint), f"{self.call} attentions instead of {len(self.is_joint)}"
        self.call = None

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int,
        mask: torch.Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **options: Any,
    ) -> torch.Tensor:
        """What stands in for the host's function. `attn_precision` asks for float32, which float64 is more than."""
        del attn_precision
        dtype = v.dtype
        if skip_reshape:  # [rows, heads, tokens, channels]
            q, k, v = (tensor.double() for tensor in (q, k, v))
        else:
            channels = q.flatten(2).shape[-1] // heads
            q, k, v = (tensor.double().flatten(2).unflatten(2, (-1, channels)).transpose(1, 2) for tensor in (q, k, v))
        if k.shape[1] != heads:
            assert options.get("enable_gqa", False)
            k, v = (tensor.repeat_interleave(heads // tensor.shape[1], dim=1) for tensor in (k, v))
        scale = options.get("scale") or q.shape[-1] ** -0.5

        scores = q @ k.transpose(-1, -2) * scale
        added = _added(mask, scores.shape)
        if self._next_is_joint():
            out = self._edited(scores, added, v)
        else:
            out = (scores + added).softmax(dim=-1) @ v
        if not skip_output_reshape:
            out = out.transpose(1, 2).flatten(2)
        return out.to(dtype)

    def _next_is_joint(self) -> bool:
        if self.call is None:
            return False
        assert self.call < len(self.is_joint), "more attentions than the network has"
        self.call += 1
        return self.is_joint[self.call - 1]

    def _edited(self, scores: torch.Tensor, added: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Scores and what the mask adds to them [rows, heads, N, N], values [rows, heads, N, channels] -> the joint answer."""
        assert self.call is not None
        number = sum(self.is_joint[: self.call]) - 1
        count = sum(self.is_joint)
        rows, _, queries, keys = scores.shape
        assert queries == keys and rows == self.hole.shape[0] * len(self.groups)
        boundary = self.boundary if in_layers(self.boundary_layers, number, count) else 0.0
        painta = self.painta if in_layers(self.painta_layers, number, count) else 0.0
        # One entry a row.
        pictures = [row % self.hole.shape[0] for row in range(rows)]
        groups = [self.groups[row // self.hole.shape[0]] for row in range(rows)]
        tokens = [tokens_of(self.family, keys, self.latent_size, group, self.references) for group in groups]

        if painta:
            scores = self._painta(scores, added, painta, number, pictures, groups, tokens)
        scores = scores + added
        out = scores.softmax(dim=-1) @ values
        if boundary:
            for row in range(rows):
                known = known_tokens(self.hole[pictures[row], 0], self.grid)
                without_text = scores[row].clone()
                without_text[:, :, tokens[row].text] = -torch.inf
                other = without_text.softmax(dim=-1) @ values[row]
                silent = torch.tensor(tokens[row].image)[known].tolist()
                if known.any():
                    silent += tokens[row].padding
                for place in silent:
                    out[row, :, place] = (1 - boundary) * out[row, :, place] + boundary * other[:, place]
        return out

    def _painta(
        self,
        scores: torch.Tensor,
        added: torch.Tensor,
        strength: float,
        number: int,
        pictures: list[int],
        groups: list[LiteralRows],
        tokens: list[Tokens],
    ) -> torch.Tensor:
        """Scores [rows, heads, N, N] before the mask, with the hole's look at the known image weakened."""
        holes = [hole_tokens(self.hole[picture, 0], self.grid) for picture in pictures]
        edited = [row for row, hole in enumerate(holes) if hole.any() and not hole.all()]
        own_c = {}
        for row in edited:
            if groups[row].conditional:
                to_text = (scores + added)[row][:, tokens[row].image][:, :, tokens[row].text]
                is_word = torch.tensor([place in tokens[row].words for place in tokens[row].text])
                own_c[row] = relevance_weights(to_text, is_word, self.grid, self.smooth)
                self.c.setdefault((number, pictures[row]), []).append(own_c[row])
        scores = scores.clone()
        for row in edited:
            if row in own_c:
                c = own_c[row]
            else:
                found = self.c.get((number, pictures[row]))
                assert found, "a negative prompt's row before any conditional row of this timestep"
                c = torch.stack(found).mean(dim=0)
            factors = torch.ones(tokens[row].total, tokens[row].total, dtype=scores.dtype)
            image = torch.tensor(tokens[row].image)
            factors[image[:, None], image[None, :]] = score_factors(c, holes[row], strength)
            scores[row] *= factors
        return scores


def _added(mask: torch.Tensor | None, shape: torch.Size) -> torch.Tensor:
    """The host's mask (True = attend, or what is added) -> what is added to the scores, in their shape."""
    if mask is None:
        return torch.zeros(shape, dtype=torch.float64)
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    # [queries, keys], [rows, queries or 1, keys] or [rows, heads or 1, queries or 1, keys]
    while mask.ndim < 4:
        mask = mask[None] if mask.ndim == 2 else mask[:, None]
    return mask.double().expand(shape)
