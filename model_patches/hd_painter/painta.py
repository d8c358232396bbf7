"""Prompt-Aware Introverted Attention: the hole looks less at known pixels that have nothing to do with the prompt.

HD-Painter, section 3.3, equation 5. In self-attention the scores between a query in the hole and a known key j are
multiplied by c_j in [0, 1], the prompt relevance of pixel j. Since c_j (q_i . k_j) = q_i . (c_j k_j), this is done by
scaling keys and by attending once more for the hole's queries alone: no N x N matrix exists, and the host's own
attention function does the work.

In models without a UNet the same is done in the joint attention of text and picture, whose picture's keys alone are scaled; the
relevance is read there as well, by a softmax over the text. Positions are in q and k as rotations, with which scaling commutes.
Where the picture reads the text in a cross-attention the relevance is that of the block before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ...imaging.masks import hole_cells
from ..core.call_rows import Area, Conds, PromptRows, by_role, joined
from ..core.joint_attention import JointCall, JointEdit, TextAttention
from ..core.prompt_tokens import prompt_attention
from ..core.protocol import Method, MethodRun, UNetCall
from ..core.sampling_run import SamplingRun
from ..core.token_layout import require_attention
from ..core.unet_attention import Place, TransformerPlace, add_patch, attention

FACTORS = (2, 4)
"""Latent cells per grid cell where PAIntA acts: 1/16 and 1/32 of the picture."""

SMOOTHING = (0.2119, 0.5761, 0.2119)
"""Separable 3x3 kernel of the released code (not in the paper)."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PAIntA(Method):
    """Settings of PAIntA; `smooth` is the released code's smoothing of the relevance.

    `layers`: in which blocks of a model without a UNet it acts (LAYERS); in a UNet it is those at 1/16 and 1/32 of the picture.
    """

    name: ClassVar = "PAIntA"
    order: ClassVar = 200

    end_percent: float = 0.5
    smooth: bool = True
    layers: str = "all"

    def check(self, model: object) -> None:
        require_attention(model, self.name)

    def begin(self, run: SamplingRun, hole: torch.Tensor) -> MethodRun:
        return PAIntARun(self, run, hole)


class NeedsConditionalRows(Exception):
    """The rows of a negative prompt came before those of the positive one, from which they take their relevance."""


@dataclass(frozen=True, eq=False)
class SameHole:
    """Rows of a UNet call whose holes are the same on one grid."""

    rows: torch.Tensor | slice
    """Row numbers; a slice where it is all rows, which spares copies."""
    hole: torch.Tensor
    """Numbers of the pixels in the hole."""
    is_hole: torch.Tensor
    """Bool [pixels]."""


class PAIntARun(MethodRun):
    """PAIntA in one run. `hole` is [B, 1, h, w] on the latent grid."""

    def __init__(self, settings: PAIntA, run: SamplingRun, hole: torch.Tensor) -> None:
        self.settings = settings
        self.hole = hole
        self._relevance: dict[tuple[Place | int, Area | None], torch.Tensor] = {}
        """Relevance of the conditional rows, for the unconditional rows of the same evaluation: [B, pixels]."""
        self.plain_without_relevance = False
        """No rows of a positive prompt will come: rows for which no relevance is known stay plain."""
        self._run = run
        self._positive_first = False
        self._found_at: float | None = None
        """Noise level at which the relevance was found."""
        self._groups: dict[tuple[Any, ...], list[SameHole]] = {}

    def evaluate(self, call_next: Callable[[Conds], list[torch.Tensor]], conds: Conds) -> list[torch.Tensor]:
        positives, negatives = by_role(conds)
        if self._run.sigma != self._found_at:
            self._relevance.clear()
            self._found_at = self._run.sigma
        if positives is None:
            # Another node (SAG, say) asks for the negative prompt alone: it keeps the relevance found at this noise level.
            with self._without_positive():
                return call_next(conds)
        self._relevance.clear()
        if negatives is None:
            return call_next(conds)
        if not (self._positive_first or self._run.on_several_devices):
            try:
                return call_next(conds)
            except NeedsConditionalRows:
                # Short of memory the host evaluates the negative prompt by itself, and before the positive one.
                self._positive_first = True
        first = call_next(positives)
        with self._without_positive():
            return joined(first, call_next(negatives), negatives)

    def edit(self, call: UNetCall) -> AbstractContextManager[None]:
        return PAIntACall(self, call).installed()

    def edit_joint(self, call: JointCall) -> JointEdit:
        layout = call.layout
        hole = self.hole.cpu()
        cells = torch.cat([hole_cells(layout.whole(prompt.cut(hole)), layout.grid) for prompt in call.rows]).flatten(1)
        acts = cells.any(dim=1) & ~cells.all(dim=1)
        is_known = {torch.device("cpu"): layout.placed(~cells)}
        for prompt in call.rows:
            if prompt.conditional and not prompt.tokens.are_known:
                raise ValueError(
                    "PAIntA has to know which tokens of the positive prompt are its words, and with this model only TrueFill's "
                    "Encode Prompt says so: take it in the place of CLIP Text Encode."
                )

        def scale(attention: TextAttention) -> torch.Tensor:
            def relevance(rows: slice, prompt: PromptRows) -> torch.Tensor:
                words = prompt.tokens.words.to(attention.q.device)
                c = relevance_map(attention.paid_to(rows, words), layout.grid, self.settings.smooth)
                # Nothing is beside the point of a prompt that says nothing.
                return torch.where(words.any(dim=1, keepdim=True), c, 1.0)

            c = self.of_rows(attention.number, call.rows, relevance, cells.shape[1], attention.q.device)
            weakened = 1.0 - self.settings.strength * (1.0 - c)
            if c.device not in is_known:
                is_known[c.device] = layout.placed(~cells).to(c.device)
            return torch.where(is_known[c.device], layout.placed(weakened), 1.0)

        return JointEdit(queries=layout.placed(cells & acts[:, None]), layers=self.settings.layers, key_scale=scale)

    def of_rows(
        self,
        place: Place | int,
        rows: Sequence[PromptRows],
        relevance: Callable[[slice, PromptRows], torch.Tensor],
        pixels: int,
        device: torch.device,
    ) -> torch.Tensor:
        """The relevance of each row's pixels to the prompt, [rows, pixels]; `relevance` finds that of a prompt's rows.

        Rows of a negative prompt take the mean of the positive ones' at this place and noise level.
        """
        batch = self.hole.shape[0]
        by_area: dict[Area | None, list[torch.Tensor]] = {}
        of_prompt: dict[int, torch.Tensor] = {}
        for number, prompt in enumerate(rows):
            if prompt.conditional:
                c = relevance(slice(number * batch, (number + 1) * batch), prompt)
                of_prompt[number] = c
                by_area.setdefault(prompt.area, []).append(c)
        for area, relevances in by_area.items():
            self._relevance[place, area] = torch.stack(relevances).mean(dim=0).detach()
        for number, prompt in enumerate(rows):
            if prompt.conditional:
                continue
            shared = self._relevance.get((place, prompt.area))
            if shared is None:
                if not self.plain_without_relevance:
                    raise NeedsConditionalRows
                shared = torch.ones(batch, pixels)
            of_prompt[number] = shared.to(device)
        return torch.cat([of_prompt[number] for number in range(len(rows))])

    @contextmanager
    def _without_positive(self) -> Iterator[None]:
        self.plain_without_relevance = True
        try:
            yield
        finally:
            self.plain_without_relevance = False

    def rows_with_the_same_hole(
        self, rows: Sequence[PromptRows], grid: tuple[int, int], device: torch.device
    ) -> list[SameHole]:
        """Groups the rows of a call by their hole on `grid`; rows that are all known or all hole are left out."""
        key = (grid, device, *(of_prompt.area for of_prompt in rows))
        if key not in self._groups:
            # Ordinary tensors, not inference ones: RASG's backward pass goes through PAIntA.
            with torch.inference_mode(False):
                cells = torch.cat([hole_cells(of_prompt.cut(self.hole), grid) for of_prompt in rows]).flatten(1)
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
    `tokens` a bool tensor [1 or rows, text]. Softmax over all tokens, mean over heads.
    """
    return relevance_map(prompt_attention(query, key, heads, tokens), grid, smooth)


def relevance_map(s: torch.Tensor, grid: tuple[int, int], smooth: bool) -> torch.Tensor:
    """Relevance [rows, pixels] in [0, 1] of the attention `s` [rows, pixels] that a grid's pixels pay to the prompt's own tokens.

    Smoothed, then clip((s - median(s)) / max(s), 0, 1).
    """
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

    def __init__(self, run: PAIntARun, call: UNetCall):
        self._run = run
        self._call = call
        self._places = {
            t.place: t
            for t in call.places
            if t.factor in FACTORS and t.place[0] != "middle" and not t.module.disable_self_attn
        }
        self._block_input: dict[Place, torch.Tensor] = {}
        self._projections: dict[Place, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._earlier: dict[Place, Callable[..., torch.Tensor] | None] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Adds the edit to the call's options, behind every patch that is there, for the length of the call.

        The host hands no patch a block's input, only its norm: hooks on `norm1` catch it, and are gone afterwards.
        """
        options = self._call.options
        replace = dict(options.get("patches_replace", {}))
        attn1 = dict(replace.get("attn1", {}))
        for place in self._places:
            self._earlier[place] = attn1.get(place, attn1.get(place[:2]))
            attn1[place] = self._keep_projections(place)
        replace["attn1"] = attn1
        options["patches_replace"] = replace
        add_patch(options, "attn1_output_patch", self._edit_output)
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
        groups = self._run.rows_with_the_same_hole(self._call.rows, (height, width), y.device)
        if not groups:
            return y
        earlier = self._earlier[place]
        if not _in_pixel_order(q, k, y):
            # Another patch has cut the attention into tiles or merged tokens; the hole's rows look at the whole picture.
            n = module.norm1(x)
            q, k, v = module.attn1.to_q(n), module.attn1.to_k(n), module.attn1.to_v(n)
            earlier = None
        relevance = self._relevance_of_rows(t, x, y, (height, width))
        weakened = 1.0 - self._run.settings.strength * (1.0 - relevance)
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
        def relevance(rows: slice, prompt: PromptRows) -> torch.Tensor:
            own = prompt.tokens.words_and_ends
            length = own.shape[1]
            query = t.cross.to_q(t.module.norm2(x[rows] + y[rows]))
            key = t.cross.to_k(self._call.context[rows, :length])
            tokens = own.to(query.device)
            return prompt_relevance(query, key, t.module.n_heads, tokens, grid, self._run.settings.smooth)

        return self._run.of_rows(t.place, self._call.rows, relevance, grid[0] * grid[1], y.device)


def _scaled(keys: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`keys` [rows, pixels + others, C] times `scale` [rows, pixels]; what another patch has appended stays as it is."""
    pixels = scale.shape[1]
    scaled = keys[:, :pixels] * scale[..., None].to(keys.dtype)
    return scaled if keys.shape[1] == pixels else torch.cat((scaled, keys[:, pixels:]), dim=1)


def _in_pixel_order(q: torch.Tensor, k: torch.Tensor, y: torch.Tensor) -> bool:
    return q.shape[:2] == y.shape[:2] and k.shape[0] == y.shape[0] and k.shape[1] >= y.shape[1]
