"""Attention of transformers written out, with semantic boundary control (PILOT) and PAIntA: scores and softmaxes in float64.

One joint attention of one row, q and k as the host's function gets them (after RoPE), N = text + image + what else is there:

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

Other networks let the image attend to itself, then to the text. Block n of those, from 0, in words as above:

    self-attention                 A_ij *= w_j (PAIntA, but in block 0), out = softmax(A / sqrt(d)) v
    cross-attention to the text    out = softmax(A / sqrt(d)) v, out_i *= 1 - strength where token i is known (boundary control)

c in block n is found as above from P in the cross-attention of block n - 1. Its columns are the text that the network gets:

    anima                          T5's text as the adapter puts it, zeros up to 512
    cosmos, wan                    text (the encoder has padded it)
    wan_i2v                        text; before each attention to it there is one to 257 vision tokens, which nothing touches
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from .literal_painta import level_mask, relevance_weights, score_factors

Layers = Literal["all", "alternate", "first half", "second half"]
Kind = Literal["joint", "self", "text", "other"]
"""What attends: text and image to both, the image to itself, the image to the text; `other` stays as it is."""

FLUX2_TEXT = 512
ANIMA_TEXT = 512
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
    "anima": ("comfy.ldm.cosmos.predict2", "optimized_attention"),
    "cosmos": ("comfy.ldm.cosmos.predict2", "optimized_attention"),
    "wan": ("comfy.ldm.wan.model", "optimized_attention"),
    "wan_i2v": ("comfy.ldm.wan.model", "optimized_attention"),
}
_WITH_REFERENCES = ("flux", "flux2", "qwen_image", "krea2")


@dataclass
class LiteralRows:
    """What the B rows of one prompt are in a model call.

    Positions count the tokens of the prompt's CONDITIONING from 0, before any padding. HiDream has two texts: T5's tokens come
    first and llama's after them, and `text_tokens` is their sum. Anima's are T5's tokens alone.
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
    parts: Mapping[tuple[int, int], torch.Tensor] | None = None,
) -> Iterator[None]:
    """While it is open, `network` (a diffusion model of the host) attends as written above, whatever overrides it is given.

    `hole` [B, 1, *latent_size] in [0, 1]. `rows` tells the prompts of a model call, in the order of the batch, whose rows are
    those of the first prompt's B pictures, then the second's, ...: a list, the same for every call, or a function of
    the call's transformer_options["cond_or_uncond"] (one number a prompt, 0 = positive), which a sampler gives. Where a call has
    negative rows only, their c is that of the last call with conditional rows, of the same timestep. `references`: latent sizes.
    `parts`: the holes of calls with latents of other sizes (prompts for a part of the picture), by that size.
    """
    layers = (boundary_layers, painta_layers)
    call = _Calls(
        family, network, latent_size, hole, rows, boundary, painta, smooth, *layers, references, dict(parts or {})
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


def attention_calls(family: str, network: Any) -> list[Kind]:
    """The network's calls of the attention function in one forward pass, in order."""
    if family == "qwen_image":
        return ["joint"] * len(network.transformer_blocks)
    if family in ("z_image", "lumina2"):
        alone = len(network.context_refiner) + len(network.noise_refiner)
        return ["other"] * alone + ["joint"] * len(network.layers)
    if family in ("sd3", "sd35_medium"):
        calls: list[Kind] = []
        for block in network.joint_blocks:
            calls.append("joint")
            if block.x_block.x_block_self_attn:
                calls.append("other")  # a block of SD3.5 medium attends a second time, the image to itself
        return calls
    if family == "krea2":
        alone = len(network.txtfusion.layerwise_blocks) + len(network.txtfusion.refiner_blocks)
        return ["other"] * alone + ["joint"] * len(network.blocks)
    if family == "hidream":
        return ["joint"] * (len(network.double_stream_blocks) + len(network.single_stream_blocks))
    if family in ("anima", "cosmos", "wan"):
        return ["self", "text"] * len(network.blocks)
    if family == "wan_i2v":
        return ["self", "other", "text"] * len(network.blocks)
    return ["joint"] * (len(network.double_blocks) + len(network.single_blocks))


def in_layers(layers: Layers, number: int, count: int) -> bool:
    """Whether block `number` of `count`, from 0, is one of `layers`."""
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


def word_columns(family: str, total: int, rows: LiteralRows) -> torch.Tensor:
    """The prompt's own words in a text of `total` tokens that a cross-attention reads: bool [total]."""
    expected = max(rows.text_tokens, ANIMA_TEXT) if family == "anima" else rows.text_tokens
    assert total == expected and all(word < rows.text_tokens for word in rows.words), (total, rows)
    return torch.tensor([column in rows.words for column in range(total)])


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
    holes: dict[tuple[int, int], torch.Tensor]

    def __post_init__(self) -> None:
        assert self.hole.ndim == 4 and self.hole.shape[1] == 1, self.hole.shape
        assert tuple(self.hole.shape[-2:]) == tuple(self.latent_size), (self.hole.shape, self.latent_size)
        assert not self.references or self.family in _WITH_REFERENCES, f"{self.family} appends no references"
        assert not getattr(self.network, "register_length", 0), "registers are no part of the text"
        assert getattr(self.network, "context_processor", None) is None
        self.holes[self.latent_size] = self.hole
        self.grid = token_grid(self.family, self.latent_size)
        self.kinds = attention_calls(self.family, self.network)
        self.call: int | None = None  # None outside of a forward pass of `network`
        # One entry a row of the model call: its prompt, and the number of its picture.
        self.prompts: list[LiteralRows] = []
        self.pictures: list[int] = []
        self.timestep: list[float] = []
        # (number of the block, picture) -> c of each conditional row; (number of the block, row of this model call) -> its own
        self.c: dict[tuple[int, int], list[torch.Tensor]] = {}
        self.own_c: dict[tuple[int, int], torch.Tensor] = {}

    def begins(self, _network: torch.nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.latent_size = (arguments[0].shape[-2], arguments[0].shape[-1])
        self.hole = self.holes[self.latent_size]
        self.grid = token_grid(self.family, self.latent_size)
        pictures = self.hole.shape[0]
        if callable(self.rows):
            groups = self.rows(options["transformer_options"]["cond_or_uncond"])
        else:
            groups = self.rows
        count = arguments[0].shape[0]
        assert count == pictures * len(groups), (
            f"the model call has {count} rows, {len(groups)} prompts of {pictures} pictures were told"
        )
        if self.family == "wan_i2v":
            assert options.get("clip_fea") is not None, "without vision tokens the host attends to the text twice"
        self.prompts = [group for group in groups for _ in range(pictures)]
        self.pictures = list(range(pictures)) * len(groups)
        timestep = arguments[1].flatten()[:1].tolist()
        if timestep != self.timestep or any(group.conditional for group in groups):
            self.c = {}
        self.own_c = {}
        self.timestep = timestep
        self.call = 0

    def ended(self, *_: Any) -> None:
        assert self.call == len(self.kinds), f"{self.call} attentions instead of {len(self.kinds)}"
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
        kind, number, count = self._next()
        boundary = self.boundary if in_layers(self.boundary_layers, number, count) else 0.0
        painta = self.painta if in_layers(self.painta_layers, number, count) else 0.0
        if kind == "joint":
            out = self._joint(scores, added, v, number, boundary, painta)
        elif kind == "self":
            out = self._to_image(scores, added, v, number, painta)
        elif kind == "text":
            out = self._to_text(scores, added, v, number, boundary)
        else:
            out = (scores + added).softmax(dim=-1) @ v
        if not skip_output_reshape:
            out = out.transpose(1, 2).flatten(2)
        return out.to(dtype)

    def _next(self) -> tuple[Kind, int, int]:
        """What this call of the attention function is, the number of its block among the blocks that have one, and theirs."""
        if self.call is None:
            return "other", 0, 1
        assert self.call < len(self.kinds), "more attentions than the network has"
        kind = self.kinds[self.call]
        number = self.kinds[: self.call].count(kind)
        self.call += 1
        return kind, number, self.kinds.count(kind)

    def _joint(
        self,
        scores: torch.Tensor,
        added: torch.Tensor,
        values: torch.Tensor,
        number: int,
        boundary: float,
        painta: float,
    ) -> torch.Tensor:
        """Scores and what the mask adds to them [rows, heads, N, N], values [rows, heads, N, channels] -> the joint answer."""
        rows, _, queries, keys = scores.shape
        assert queries == keys and rows == len(self.prompts)
        tokens = [tokens_of(self.family, keys, self.latent_size, prompt, self.references) for prompt in self.prompts]

        if painta:
            for row in self._edited_rows():
                if self.prompts[row].conditional:
                    to_text = (scores + added)[row][:, tokens[row].image][:, :, tokens[row].text]
                    is_word = torch.tensor([place in tokens[row].words for place in tokens[row].text])
                    self._found(number, row, to_text, is_word)
            scores = self._painta(scores, painta, number, [places.image for places in tokens])
        scores = scores + added
        out = scores.softmax(dim=-1) @ values
        if boundary:
            for row in range(rows):
                known = known_tokens(self.hole[self.pictures[row], 0], self.grid)
                without_text = scores[row].clone()
                without_text[:, :, tokens[row].text] = -torch.inf
                other = without_text.softmax(dim=-1) @ values[row]
                silent = torch.tensor(tokens[row].image)[known].tolist()
                if known.any():
                    silent += tokens[row].padding
                for place in silent:
                    out[row, :, place] = (1 - boundary) * out[row, :, place] + boundary * other[:, place]
        return out

    def _to_image(
        self, scores: torch.Tensor, added: torch.Tensor, values: torch.Tensor, number: int, painta: float
    ) -> torch.Tensor:
        """The answer of the image's attention to itself."""
        rows, _, queries, keys = scores.shape
        assert queries == keys == math.prod(self.grid) and rows == len(self.prompts)
        if painta and number:
            scores = self._painta(scores, painta, number, [list(range(keys))] * rows)
        return (scores + added).softmax(dim=-1) @ values

    def _to_text(
        self, scores: torch.Tensor, added: torch.Tensor, values: torch.Tensor, number: int, boundary: float
    ) -> torch.Tensor:
        """The answer of the image's attention to the text, which is also where the next block's c is found."""
        rows, _, queries, keys = scores.shape
        assert queries == math.prod(self.grid) and rows == len(self.prompts)
        columns = [word_columns(self.family, keys, prompt) for prompt in self.prompts]
        scores = scores + added
        if self.painta:
            for row in self._edited_rows():
                if self.prompts[row].conditional:
                    self._found(number + 1, row, scores[row], columns[row])
        out = scores.softmax(dim=-1) @ values
        for row in range(rows):
            out[row, :, known_tokens(self.hole[self.pictures[row], 0], self.grid)] *= 1 - boundary
        return out

    def _edited_rows(self) -> list[int]:
        """The rows of pictures with both a hole and something known, as PAIntA has them."""
        holes = [hole_tokens(self.hole[picture, 0], self.grid) for picture in self.pictures]
        return [row for row, hole in enumerate(holes) if hole.any() and not hole.all()]

    def _found(self, number: int, row: int, to_text: torch.Tensor, is_word: torch.Tensor) -> None:
        """Keep the c of block `number` of a conditional row, whose image looks at the text with these scores."""
        c = relevance_weights(to_text, is_word, self.grid, self.smooth)
        self.own_c[number, row] = c
        self.c.setdefault((number, self.pictures[row]), []).append(c)

    def _painta(
        self, scores: torch.Tensor, strength: float, number: int, image: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Scores [rows, heads, N, N] before the mask, with the hole's look at the known image weakened.

        `image`: for each row, where its image tokens lie.
        """
        scores = scores.clone()
        for row in self._edited_rows():
            if self.prompts[row].conditional:
                c = self.own_c[number, row]
            else:
                found = self.c.get((number, self.pictures[row]))
                assert found, "a negative prompt's row before any conditional row of this timestep"
                c = torch.stack(found).mean(dim=0)
            factors = torch.ones(scores.shape[-2:], dtype=scores.dtype)
            places = torch.tensor(image[row])
            hole = hole_tokens(self.hole[self.pictures[row], 0], self.grid)
            factors[places[:, None], places[None, :]] = score_factors(c, hole, strength)
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
