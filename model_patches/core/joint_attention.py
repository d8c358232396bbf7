"""Edits of a diffusion transformer's attention: the joint one, in which text and picture attend to each other in one sequence, or
self-attention and cross-attention in turn.

Through the host's `optimized_attention_override` alone: some queries see fewer keys, or keys with scaled scores. No N x N mask is
made, so that memory stays linear and fast kernels, which drop masks, stay right. An override that is there already does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .autograd import full_precision
from .call_rows import PromptRows
from .token_layout import TokenLayout

LAYERS = ("all", "alternate", "first half", "second half")
"""In which blocks a method acts; "alternate" is the second, the fourth and so on."""
_SCORES_AT_ONCE = 2**22


@dataclass(frozen=True, eq=False, kw_only=True)
class JointCall:
    """One call of a diffusion transformer by the host."""

    layout: TokenLayout
    rows: tuple[PromptRows, ...]
    """What the rows are: an entry for each conditioning, each with as many rows as there are pictures."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TextAttention:
    """How the picture reads the text in one block: q and k as the host attends with them, behind position and norm."""

    q: torch.Tensor
    """Of the image tokens, [rows, heads, height x width, channels]."""
    k: torch.Tensor
    """Of the text, [rows, heads or a part of as many, text, channels]."""
    number: int
    """Which of the call's attentions it is used in, from 0."""
    scale: float
    """What scores are multiplied by before the softmax."""
    mask: torch.Tensor | None
    """The host's mask of the text, bool or added to the scores, [1 or rows, 1, 1, text]; None where there is none, or where it
    says more than which keys."""

    def paid_to(self, rows: slice, tokens: torch.Tensor) -> torch.Tensor:
        """The attention that each image token pays to some of the text among all of it, in [0, 1]: [rows, height x width].

        `tokens` bool [1 or rows, n], the first n of the text. Softmax over the text, sum over `tokens`, mean over heads.
        """
        query, key = self.q[rows], self.k[rows]
        if (shared := query.shape[1] // key.shape[1]) > 1:
            key = key.repeat_interleave(shared, dim=1)
        chosen = torch.zeros(len(tokens), key.shape[2], device=query.device, dtype=torch.bool)
        chosen[:, : tokens.shape[1]] = tokens
        mask = None if self.mask is None else self.mask[rows if len(self.mask) > 1 else slice(None)]
        total = None
        # A few heads at a time: one by one they would keep a GPU waiting for its next small task.
        at_once = max(1, _SCORES_AT_ONCE // (len(query) * query.shape[2] * key.shape[2]))
        for q, k in zip(query.split(at_once, dim=1), key.split(at_once, dim=1), strict=True):
            scores = full_precision(q) @ full_precision(k).transpose(-1, -2) * self.scale
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            paid = (scores.softmax(dim=-1) * chosen[:, None, None]).sum(dim=(1, -1))
            total = paid if total is None else total + paid
        assert total is not None
        return total / query.shape[1]


@dataclass(frozen=True, eq=False, kw_only=True)
class JointEdit:
    """What some queries of the joint attentions of a call see otherwise."""

    queries: torch.Tensor
    """Bool [rows, tokens], on the CPU."""
    layers: str = "all"
    """One of LAYERS."""
    left_out: torch.Tensor | None = None
    """Bool [rows, tokens], on the CPU: keys that these queries don't see. Of the text it is all or nothing; in a cross-attention
    nothing comes instead."""
    strength: float = 1.0
    """Between what they would see (0) and what they see without the keys that are left out (1)."""
    key_scale: Callable[[TextAttention], torch.Tensor] | None = None
    """What their scores with each key are multiplied by, [rows, tokens]; of the image alone in front of a cross-attention, by how
    the text was read in the block before. So it does not act in the first."""

    def acts_in(self, number: int, blocks: int) -> bool:
        """Whether it acts in a call's joint attention of this number."""
        return {
            "all": True,
            "alternate": number % 2 == 1,
            "first half": 2 * number < blocks,
            "second half": 2 * number >= blocks,
        }[self.layers]


def install(options: dict[str, Any], layout: TokenLayout, edits: Sequence[JointEdit], who: str) -> None:
    """Edits the joint attentions of one call by its own `transformer_options`; an override that is there is used, not lost.

    `who` begins the message for a model whose tokens another node has merged or cut.
    """
    edits = [edit for edit in edits if bool(edit.queries.any())]
    if edits:
        earlier = options.get("optimized_attention_override")
        kind = _EditedCrossAttention if layout.crosses else _EditedAttention
        options["optimized_attention_override"] = kind(layout, edits, earlier, who)


@dataclass(frozen=True, eq=False)
class _QueryClass:
    """Queries for which the same edits hold, in rows whose edits are alike."""

    rows: torch.Tensor | slice
    """Their numbers; a slice where it is all, which spares copies."""
    queries: torch.Tensor
    edits: tuple[tuple[JointEdit, torch.Tensor | None], ...]
    """With the numbers of the keys that are kept."""


class _EditedAttention:
    """An attention override for the length of one call."""

    _NAMES = ("q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")

    def __init__(
        self,
        layout: TokenLayout,
        edits: Sequence[JointEdit],
        earlier: Callable[..., torch.Tensor] | None,
        who: str,
    ) -> None:
        self._layout, self._edits, self._earlier, self._who = layout, edits, earlier, who
        self._seen = 0
        self._classes: dict[tuple[int, ...], list[_QueryClass]] = {}
        """By how many keys there are, which other packs may change from block to block, and the acting edits' numbers."""

    def __call__(self, chosen: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        attend = chosen if self._earlier is None else _through(self._earlier, chosen)
        given = dict(zip(self._NAMES, args, strict=False)) | kwargs
        q, k, v = given.pop("q"), given.pop("k"), given.pop("v")
        if v.ndim > q.ndim:
            # SD3 splits the values into heads, and q and k not.
            v = v.flatten(2)
        options = given.get("transformer_options") or {}
        if not self._is_joint(q.shape[-2], k.shape[-2], options):
            return attend(*args, **kwargs)
        number = self._number(options)
        acting = self._acting(number)
        if not acting:
            return attend(*args, **kwargs)
        case = (k.shape[-2], *acting)
        if case not in self._classes:
            self._classes[case] = _query_classes([self._edits[i] for i in acting], k.shape[-2], q.device)
        classes = self._classes[case]
        scales = self._scales(classes, q, k, number, given)
        return self._attend(attend, classes, scales, (q, k, v), given)

    def _is_joint(self, queries: int, keys: int, options: Mapping[str, Any]) -> bool:
        """Others are a refiner's, which see the text or the picture alone, and what packs add."""
        if queries == self._layout.tokens and keys >= queries:
            # What another pack appends to the keys is seen by all.
            return True
        if queries == keys and options.get("block_type") in ("double", "single"):
            raise ValueError(
                f"{self._who} expected {self._layout.tokens} tokens of text and picture and found {queries}: another node "
                f"merges, cuts or adds tokens; take it or {self._who} out."
            )
        return False

    def _acting(self, number: int) -> list[int]:
        return [i for i, edit in enumerate(self._edits) if edit.acts_in(number, sum(self._layout.blocks))]

    def _number(self, options: Mapping[str, Any]) -> int:
        """Which joint attention of the call this is: as the model says, since others may skip blocks, else by counting."""
        counted, self._seen = self._seen, self._seen + 1
        if "block_index" not in options:
            return counted
        first, *second = self._layout.blocks
        return options["block_index"] + (first if second and options.get("block_type") == "single" else 0)

    def _scales(
        self,
        classes: Sequence[_QueryClass],
        q: torch.Tensor,
        k: torch.Tensor,
        number: int,
        given: Mapping[str, Any],
    ) -> dict[int, torch.Tensor]:
        """What the edits multiply the scores of keys by, by the edit's identity."""
        wanted = {id(edit): edit for one in classes for edit, _ in one.edits if edit.key_scale is not None}
        if not wanted:
            return {}
        attention = self._text_attention(q, k, number, given)
        return {key: edit.key_scale(attention) for key, edit in wanted.items() if edit.key_scale is not None}

    def _text_attention(self, q: torch.Tensor, k: torch.Tensor, number: int, given: Mapping[str, Any]) -> TextAttention:
        return _read_by(q, k, number, given, self._layout.image, self._layout.text)

    def _attend(
        self,
        attend: Callable[..., torch.Tensor],
        classes: Sequence[_QueryClass],
        scales: Mapping[int, torch.Tensor],
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        given: Mapping[str, Any],
    ) -> torch.Tensor:
        q, k, v = qkv
        mask, rest = given.get("mask"), {name: value for name, value in given.items() if name not in ("heads", "mask")}
        is_split = bool(given.get("skip_reshape"))
        out: torch.Tensor | None = None
        if self._earlier is not None:
            # What another pack has put here may want all queries at once.
            out = attend(q, k, v, given["heads"], mask=mask, **rest)
        for one in classes:
            if self._earlier is not None and not one.edits:
                continue
            rows, keys = one.rows, k[one.rows]
            for edit, _ in one.edits:
                if id(edit) in scales:
                    keys = _scaled(keys, scales[id(edit)][rows], is_split)
            seen = (q[rows].index_select(-2, one.queries), keys, v[rows])
            found = self._seen_by(one, attend, seen, mask, given["heads"], rest)
            if out is None:
                out = found.new_empty(q.shape[0], *found.shape[1:-2], q.shape[-2], found.shape[-1])
            found = found.to(out.dtype)
            if isinstance(rows, slice):
                out.index_copy_(-2, one.queries, found)
            else:
                out[rows] = out[rows].index_copy(-2, one.queries, found)
        assert out is not None
        return out

    @staticmethod
    def _seen_by(
        one: _QueryClass,
        attend: Callable[..., torch.Tensor],
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        heads: int,
        rest: Mapping[str, Any],
    ) -> torch.Tensor:
        q, k, v = qkv
        mask = _cut_mask(mask, one.rows, one.queries, None)
        out: torch.Tensor | None = None
        for edit, kept in one.edits:
            if kept is None:
                continue
            cut = _cut_mask(mask, slice(None), None, kept)
            without = attend(q, k.index_select(-2, kept), v.index_select(-2, kept), heads, mask=cut, **rest)
            if edit.strength < 1:
                out = attend(q, k, v, heads, mask=mask, **rest) if out is None else out
                without = torch.lerp(out, without, edit.strength)
            out = without
        return attend(q, k, v, heads, mask=mask, **rest) if out is None else out


class _EditedCrossAttention(_EditedAttention):
    """The same for the length of one call where the picture reads the text in an attention behind that among its own tokens.

    What is left out of the text takes its part from the cross-attention's answer, which is not normalised again: as in a UNet.
    """

    def __init__(
        self,
        layout: TokenLayout,
        edits: Sequence[JointEdit],
        earlier: Callable[..., torch.Tensor] | None,
        who: str,
    ) -> None:
        image = layout.image
        pixels = image.stop - image.start
        super().__init__(
            replace(layout, tokens=pixels, image=slice(0, pixels), text=slice(0, 0)),
            [_of_image(edit, image) for edit in edits if edit.key_scale is not None],
            earlier,
            who,
        )
        self._text = layout.text.stop - layout.text.start
        self._silent = [
            (edit, edit.queries[:, image] & edit.left_out[:, layout.text].all(dim=1, keepdim=True))
            for edit in edits
            if edit.left_out is not None
        ]
        self._block: int | None = None
        self._last: TextAttention | None = None

    def __call__(self, chosen: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        given = dict(zip(self._NAMES, args, strict=False)) | kwargs
        q, k = given["q"], given["k"]
        number = self._number(given.get("transformer_options") or {})
        if number != self._block:
            # The first attention of each block is that among the image tokens, whatever the lengths are.
            self._block = number
            return super().__call__(chosen, *args, **kwargs)
        attend = chosen if self._earlier is None else _through(self._earlier, chosen)
        out = attend(*args, **kwargs)
        if k.shape[-2] != self._text:
            # Of CLIP's vision tokens, say.
            return out
        if self._edits:
            self._last = _read_by(q, k, number, given, slice(None), slice(None))
        for edit, queries in self._silent:
            if edit.acts_in(number, sum(self._layout.blocks)):
                kept = torch.where(queries, 1.0 - edit.strength, 1.0).to(out)[..., None]
                out = out * (kept[:, None] if given.get("skip_output_reshape") else kept)
        return out

    def _is_joint(self, queries: int, keys: int, options: Mapping[str, Any]) -> bool:
        if queries != self._layout.tokens:
            raise ValueError(
                f"{self._who} expected {self._layout.tokens} tokens of the picture and found {queries}: another node merges, "
                f"cuts or adds tokens; take it or {self._who} out."
            )
        return True

    def _number(self, options: Mapping[str, Any]) -> int:
        return options["block_index"]

    def _acting(self, number: int) -> list[int]:
        return [] if self._last is None else super()._acting(number)

    def _text_attention(self, q: torch.Tensor, k: torch.Tensor, number: int, given: Mapping[str, Any]) -> TextAttention:
        assert self._last is not None
        return replace(self._last, number=number)


def _of_image(edit: JointEdit, image: slice) -> JointEdit:
    """What an edit of text and picture does among the image tokens."""
    scale = edit.key_scale
    assert scale is not None
    return replace(
        edit, queries=edit.queries[:, image], left_out=None, key_scale=lambda attention: scale(attention)[:, image]
    )


def _read_by(
    q: torch.Tensor, k: torch.Tensor, number: int, given: Mapping[str, Any], image: slice, text: slice
) -> TextAttention:
    """How the image tokens of q read the text in k, both as the host's attention function gets them."""
    if not given.get("skip_reshape"):
        q, k = (of.unflatten(-1, (given["heads"], -1)).transpose(1, 2) for of in (q, k))
    mask = _key_mask(given.get("mask"))
    return TextAttention(
        q=q[:, :, image],
        k=k[:, :, text],
        number=number,
        scale=given.get("scale") or q.shape[-1] ** -0.5,
        mask=None if mask is None else mask[..., text],
    )


def _query_classes(edits: Sequence[JointEdit], keys: int, device: torch.device) -> list[_QueryClass]:
    code = sum(edit.queries.int() << i for i, edit in enumerate(edits))
    assert isinstance(code, torch.Tensor)
    parts = [code, *(edit.left_out.int() for edit in edits if edit.left_out is not None)]
    rows_of: dict[bytes, list[int]] = {}
    for row, of_row in enumerate(torch.stack(parts, dim=1)):
        rows_of.setdefault(of_row.numpy().tobytes(), []).append(row)
    classes = []
    for rows in rows_of.values():
        for value in code[rows[0]].unique().tolist():
            queries = (code[rows[0]] == value).nonzero()[:, 0].to(device)
            active = [edit for i, edit in enumerate(edits) if value >> i & 1]
            kept = [
                None if edit.left_out is None else _kept(edit.left_out[rows[0]], keys).to(device) for edit in active
            ]
            numbers = slice(None) if len(rows) == len(code) else torch.tensor(rows, device=device)
            classes.append(_QueryClass(numbers, queries, tuple(zip(active, kept, strict=True))))
    return classes


def _kept(left_out: torch.Tensor, keys: int) -> torch.Tensor:
    return torch.cat(((~left_out).nonzero()[:, 0], torch.arange(len(left_out), keys)))


def _key_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask that says which keys are seen, the same for all queries and heads, [1 or rows, 1, 1, keys]."""
    if mask is None:
        return None
    while mask.ndim < 4:
        mask = mask[None] if mask.ndim == 2 else mask[:, None]
    return mask if mask.shape[1] == mask.shape[2] == 1 else None


def _cut_mask(
    mask: torch.Tensor | None, rows: torch.Tensor | slice, queries: torch.Tensor | None, keys: torch.Tensor | None
) -> torch.Tensor | None:
    """The part of the host's mask, [queries, keys], [rows, queries, keys] or [rows, heads, queries, keys], that is theirs."""
    if mask is None:
        return None
    if mask.ndim > 2 and mask.shape[0] > 1:
        mask = mask[rows if isinstance(rows, slice) else rows.to(mask.device)]
    if queries is not None and mask.shape[-2] > 1:
        mask = mask.index_select(-2, queries.to(mask.device))
    return mask if keys is None else mask.index_select(-1, keys.to(mask.device))


def _scaled(keys: torch.Tensor, scale: torch.Tensor, is_split: bool) -> torch.Tensor:
    """Keys [rows, heads, keys, channels], or without heads, times a factor for each of the first, [rows, tokens]."""
    factors = scale.to(keys.dtype)[..., None]
    factors = factors[:, None] if is_split else factors
    known = factors.shape[-2]
    scaled = keys[..., :known, :] * factors
    return scaled if keys.shape[-2] == known else torch.cat((scaled, keys[..., known:, :]), dim=-2)


def _through(earlier: Callable[..., torch.Tensor], chosen: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
        return earlier(chosen, *args, **kwargs)

    return attend
