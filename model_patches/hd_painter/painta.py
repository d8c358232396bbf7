"""Prompt-Aware Introverted Attention: the hole looks less at known pixels that have nothing to do with the prompt.

HD-Painter, section 3.3, equation 5. In self-attention the scores between a query in the hole and a known key j are
multiplied by c_j in [0, 1], the prompt relevance of pixel j. Since c_j (q_i . k_j) = q_i . (c_j k_j), this is done by
scaling keys and by attending once more for the hole's queries alone: no N x N matrix exists, and the host's own
attention function does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ...imaging.masks import hole_cells
from ..core.call_rows import Area, Chunk
from ..core.prompt_tokens import prompt_attention
from ..core.unet_attention import Place, TransformerPlace, add_patch, attention

FACTORS = (2, 4)
"""Latent cells per grid cell where PAIntA acts: 1/16 and 1/32 of the picture."""

SMOOTHING = (0.2119, 0.5761, 0.2119)
"""Separable 3x3 kernel of the released code (not in the paper)."""


class NeedsConditionalRows(Exception):
    """The rows of a negative prompt came before those of the positive one, from which they take their relevance."""


@dataclass(frozen=True, eq=False)
class PAIntA:
    """Settings of PAIntA. `strength` 0 is the plain model, 1 the paper; percentages are of sampling; `mask` [B, 1, H, W]."""

    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 0.5
    smooth: bool = True
    mask: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class SameHole:
    """Rows of a UNet call whose holes are the same on one grid."""

    rows: torch.Tensor | slice
    """Row numbers; a slice where it is all rows, which spares copies."""
    hole: torch.Tensor
    """Numbers of the pixels in the hole."""
    is_hole: torch.Tensor
    """Bool [pixels]."""


class PAIntAState:
    """What one run of a sampler keeps between UNet calls. `hole` is [B, 1, h, w] on the latent grid."""

    def __init__(self, hole: torch.Tensor) -> None:
        self.hole = hole
        self.relevance: dict[tuple[Place, Area | None], torch.Tensor] = {}
        """Relevance of the conditional rows, for the unconditional rows of the same evaluation: [B, pixels]."""
        self._groups: dict[tuple[Any, ...], list[SameHole]] = {}

    def rows_with_the_same_hole(
        self, chunks: Sequence[Chunk], grid: tuple[int, int], device: torch.device
    ) -> list[SameHole]:
        """Groups the rows of a call by their hole on `grid`; rows that are all known or all hole are left out."""
        key = (grid, device, *(chunk.area for chunk in chunks))
        if key not in self._groups:
            # Ordinary tensors, not inference ones: RASG's backward pass goes through PAIntA.
            with torch.inference_mode(False):
                cells = torch.cat([hole_cells(chunk.cut(self.hole), grid) for chunk in chunks]).flatten(1)
                self._groups[key] = _group_rows(cells, device)
        return self._groups[key]


def _group_rows(cells: torch.Tensor, device: torch.device) -> list[SameHole]:
    rows_of: dict[bytes, list[int]] = {}
    for row, mask in enumerate(cells.cpu()):
        if mask.any() and not mask.all():
            rows_of.setdefault(mask.numpy().tobytes(), []).append(row)
    groups = []
    for rows in rows_of.values():
        is_hole = cells[rows[0]].to(device)
        numbers = slice(None) if len(rows) == len(cells) else torch.tensor(rows, device=device)
        groups.append(SameHole(numbers, is_hole.nonzero()[:, 0], is_hole))
    return groups


def prompt_relevance(
    query: torch.Tensor, key: torch.Tensor, heads: int, tokens: torch.Tensor, grid: tuple[int, int], smooth: bool
) -> torch.Tensor:
    """Relevance c of each pixel of a grid to the prompt: [rows, pixels] in [0, 1].

    `query` [rows, pixels, channels] and `key` [rows, text, channels] are the projections of the block's cross-attention,
    `tokens` a bool tensor [1, text]. The attention paid to the prompt's own tokens (softmax over all tokens, mean over
    heads), smoothed, then clip((s - median(s)) / max(s), 0, 1).
    """
    s = prompt_attention(query, key, heads, tokens)
    rows, pixels = s.shape
    if smooth:
        weights = torch.tensor(SMOOTHING, dtype=s.dtype, device=s.device)
        image = s.view(rows, 1, *grid)
        image = F.conv2d(image, weights.view(1, 1, 3, 1), padding=(1, 0))
        s = F.conv2d(image, weights.view(1, 1, 1, 3), padding=(0, 1)).view(rows, pixels)
    median = s.median(dim=1, keepdim=True).values
    peak = s.amax(dim=1, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny)
    return ((s - median) / peak).clamp(0.0, 1.0)


class PAIntACall:
    """PAIntA within one call of the UNet: reads each block's projections and recomputes the rows that are in the hole."""

    def __init__(
        self,
        settings: PAIntA,
        places: Sequence[TransformerPlace],
        chunks: Sequence[Chunk],
        context: torch.Tensor,
        state: PAIntAState,
        plain_without_relevance: bool,
    ):
        self._settings = settings
        self._places = {
            t.place: t
            for t in places
            if t.factor in FACTORS and t.place[0] != "middle" and not t.module.disable_self_attn
        }
        self._chunks = chunks
        self._context = context
        self._state = state
        self._plain_without_relevance = plain_without_relevance
        self._block_input: dict[Place, torch.Tensor] = {}
        self._projections: dict[Place, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._earlier: dict[Place, Callable[..., torch.Tensor] | None] = {}

    @contextmanager
    def installed(self, transformer_options: dict[str, Any]) -> Iterator[None]:
        """Adds the edit to a call's own `transformer_options`, behind every patch that is there, for the length of the call.

        The host hands no patch a block's input, only its norm: hooks on `norm1` catch it, and are gone afterwards.
        """
        replace = dict(transformer_options.get("patches_replace", {}))
        attn1 = dict(replace.get("attn1", {}))
        for place in self._places:
            self._earlier[place] = attn1.get(place, attn1.get(place[:2]))
            attn1[place] = self._keep_projections(place)
        replace["attn1"] = attn1
        transformer_options["patches_replace"] = replace
        add_patch(transformer_options, "attn1_output_patch", self._edit_output)
        with ExitStack() as hooks:
            for place, t in self._places.items():
                handle = t.module.norm1.register_forward_pre_hook(self._keep_input(place))
                hooks.callback(handle.remove)
            yield

    def _keep_input(self, place: Place) -> Callable[..., None]:
        def hook(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self._block_input[place] = args[0]

        return hook

    def _keep_projections(self, place: Place) -> Callable[..., torch.Tensor]:
        attend = self._earlier[place] or attention

        def keep(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any], **kwargs: Any
        ) -> torch.Tensor:
            self._projections[place] = (q, k, v)
            return attend(q, k, v, options, **kwargs)

        return keep

    def _edit_output(self, y: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
        block = extra_options.get("block")
        if block is None:
            return y
        place = (block[0], block[1], extra_options["block_index"])
        t = self._places.get(place)
        if t is None:
            return y
        module = t.module
        x = self._block_input.pop(place)
        q, k, v = self._projections.pop(place)
        height, width = extra_options["activations_shape"][-2:]
        groups = self._state.rows_with_the_same_hole(self._chunks, (height, width), y.device)
        if not groups:
            return y
        earlier = self._earlier[place]
        if not _in_pixel_order(q, k, y):
            # Another patch has cut the attention into tiles or merged tokens; the hole's rows look at the whole picture.
            n = module.norm1(x)
            q, k, v = module.attn1.to_q(n), module.attn1.to_k(n), module.attn1.to_v(n)
            earlier = None
        relevance = self._relevance_of_rows(t, x, y, (height, width))
        weakened = 1.0 - self._settings.strength * (1.0 - relevance)
        scale = torch.ones_like(weakened)
        for group in groups:
            scale[group.rows] = torch.where(group.is_hole, scale[group.rows], weakened[group.rows])
        keys = _scaled(k, scale)
        # A replacement of this block's attention by another pack may want all rows and all queries.
        replaced = None if earlier is None else earlier(q, keys, v, extra_options)
        y = y.clone()
        for group in groups:
            if replaced is None:
                attended = attention(q[group.rows][:, group.hole], keys[group.rows], v[group.rows], extra_options)
            else:
                attended = replaced[group.rows][:, group.hole]
            rows = group.rows if isinstance(group.rows, slice) else group.rows[:, None]
            y[rows, group.hole] = module.attn1.to_out(attended).to(y.dtype)
        return y

    def _relevance_of_rows(
        self, t: TransformerPlace, x: torch.Tensor, y: torch.Tensor, grid: tuple[int, int]
    ) -> torch.Tensor:
        batch = self._state.hole.shape[0]
        by_area: dict[Area | None, list[torch.Tensor]] = {}
        of_chunk: dict[int, torch.Tensor] = {}
        for number, chunk in enumerate(self._chunks):
            if not chunk.conditional:
                continue
            rows = slice(number * batch, (number + 1) * batch)
            own = chunk.tokens.words_and_ends
            length = own.shape[1]
            query = t.cross.to_q(t.module.norm2(x[rows] + y[rows]))
            key = t.cross.to_k(self._context[rows, :length])
            tokens = own.to(query.device)
            c = prompt_relevance(query, key, t.module.n_heads, tokens, grid, self._settings.smooth)
            of_chunk[number] = c
            by_area.setdefault(chunk.area, []).append(c)
        for area, relevances in by_area.items():
            self._state.relevance[t.place, area] = torch.stack(relevances).mean(dim=0).detach()
        for number, chunk in enumerate(self._chunks):
            if chunk.conditional:
                continue
            shared = self._state.relevance.get((t.place, chunk.area))
            if shared is None:
                if not self._plain_without_relevance:
                    raise NeedsConditionalRows
                shared = torch.ones(batch, grid[0] * grid[1])
            of_chunk[number] = shared.to(y.device)
        return torch.cat([of_chunk[number] for number in range(len(self._chunks))])


def _scaled(keys: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`keys` [rows, pixels + others, C] times `scale` [rows, pixels]; what another patch has appended stays as it is."""
    pixels = scale.shape[1]
    scaled = keys[:, :pixels] * scale[..., None].to(keys.dtype)
    return scaled if keys.shape[1] == pixels else torch.cat((scaled, keys[:, pixels:]), dim=1)


def _in_pixel_order(q: torch.Tensor, k: torch.Tensor, y: torch.Tensor) -> bool:
    return q.shape[:2] == y.shape[:2] and k.shape[0] == y.shape[0] and k.shape[1] >= y.shape[1]
