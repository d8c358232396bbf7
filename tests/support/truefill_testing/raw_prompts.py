"""Prompts as texts: what their tokens are, small text encoders of the host's, and what the literal forms read of a UNet call.

Nothing here asks the pack which token is which. The ids of the host's own tokenizers say it:

    49406   start of each chunk of 77          49407   the first one behind the start: end of the text
    behind the end there is padding: 49407 in SD1.5's encoder and SDXL's L, 0 in SD2's and SDXL's G; 0 is a word, too ("!")
    all between start and end are words
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from devtools.pack import ensure_host

from .literal_boundary import Boundary, known_pixels
from .literal_painta import Painta, Row
from .literal_pilot import SELECTED_FACTORS, semantic_centralisation
from .literal_rasg import objective
from .literal_unet import literal_unet
from .small_models import POOLED_DIM

ensure_host()

import comfy.sd  # noqa: E402
import comfy.sd1_clip  # noqa: E402
import comfy.sdxl_clip  # noqa: E402
import comfy.text_encoders.sd2_clip  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402

from nodes import CLIPTextEncode  # noqa: E402

START, END = 49406, 49407
CHUNK = 77
PADDING = {"l": END, "h": 0, "g": 0}
"""By the name of the text encoder."""

PROMPTS = {
    "plain": "a red rose in a blue vase",
    "weighted": "a (red:1.3) ((rose)) in a [blue] (vase:0.4)",
    "exclamations": "wow !!! a rose ! now",
    "long": "a red rose in a blue vase, " * 12,
    # A short weighted part is not cut in two: there is padding behind the first chunk's end.
    "padding in the middle": "rose " * 73 + "(in a blue vase:1.2) of glass",
    "empty": "",
}
SUFFIX = "Full HD, 4K, high quality, high resolution"

# The encoders' widths add up to the small UNets' contexts; SDXL needs a last layer but one.
_ENCODERS = {
    "sd15": (comfy.sd1_clip.SD1ClipModel, comfy.sd1_clip.SD1Tokenizer, {"clip_l": 24}),
    "sd2": (
        comfy.text_encoders.sd2_clip.SD2ClipModel,
        comfy.text_encoders.sd2_clip.SD2Tokenizer,
        {"clip_h": 32},
    ),
    "sdxl": (comfy.sdxl_clip.SDXLClipModel, comfy.sdxl_clip.SDXLTokenizer, {"clip_l": 16, "clip_g": 24}),
}


@cache
def small_clip(family: str, dtype: torch.dtype = torch.float32, embeddings: str | None = None) -> comfy.sd.CLIP:
    """The host's CLIP of a family: its tokenizer, and its text encoder with three random layers. Don't set anything on it."""
    encoder, tokenizer, widths = _ENCODERS[family]
    configs = {
        f"{name}_model_config": {
            "num_hidden_layers": 3,
            "hidden_size": width,
            "num_attention_heads": 4,
            "intermediate_size": 2 * width,
        }
        for name, width in widths.items()
    }
    target = SimpleNamespace(params={}, clip=encoder, tokenizer=tokenizer)
    clip = comfy.sd.CLIP(target, embedding_directory=embeddings, model_options={"dtype": dtype, **configs})
    generator = torch.Generator().manual_seed(1)
    for name, parameter in clip.cond_stage_model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if "embedding" in name:
            # SDXL's last layer but one is not normalized: this makes its rows as large as the other families'.
            values *= 0.3
        elif parameter.ndim > 1:
            values /= parameter.shape[1] ** 0.5
        else:
            values = 0.1 * values + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        parameter.data.copy_(values)
    return clip


def encoded(clip: comfy.sd.CLIP, text: str) -> list[list[Any]]:
    """CONDITIONING by the host's own CLIP Text Encode."""
    with torch.inference_mode():
        (conditioning,) = CLIPTextEncode().encode(clip, text)
    return conditioning


def with_pooled_of(family: str, conditioning: list[list[Any]]) -> list[list[Any]]:
    """The conditioning with a pooled output as wide as a small SDXL model wants it; for the others as it is."""
    if family != "sdxl":
        return conditioning
    pooled = torch.randn(1, POOLED_DIM[family], generator=torch.Generator().manual_seed(2))
    return [[text, {**options, "pooled_output": pooled}] for text, options in conditioning]


@dataclass(frozen=True)
class TextTokens:
    """The places of a text's tokens in its embedding."""

    ids: list[Any]
    starts: list[int]
    words: list[int]
    ends: list[int]

    @property
    def all_but_starts(self) -> list[int]:
        return [place for place in range(len(self.ids)) if place not in self.starts]

    def as_mask(self, places: list[int]) -> torch.Tensor:
        """Bool [tokens]."""
        mask = torch.zeros(len(self.ids), dtype=torch.bool)
        mask[places] = True
        return mask


def text_tokens(clip: comfy.sd.CLIP, text: str) -> TextTokens:
    """By the ids of the host's tokenizers; all encoders of the family must agree."""
    found = [
        _places([[token for token, _ in chunk] for chunk in chunks], PADDING[name])
        for name, chunks in clip.tokenize(text).items()
    ]
    assert all((of.starts, of.words, of.ends) == (found[0].starts, found[0].words, found[0].ends) for of in found)
    return found[0]


def _places(chunks: list[list[Any]], padding: int) -> TextTokens:
    starts, words, ends = [], [], []
    for number, chunk in enumerate(chunks):
        first = number * CHUNK
        # An embedding's vectors stand where ids would.
        ids = [-1 if isinstance(token, torch.Tensor) else token for token in chunk]
        assert len(ids) == CHUNK and ids[0] == START
        end = ids.index(END, 1)
        assert all(token == padding for token in ids[end + 1 :])
        starts.append(first)
        words += range(first + 1, first + end)
        ends.append(first + end)
    return TextTokens([token for chunk in chunks for token in chunk], starts, words, ends)


def _same(token: Any, other: Any) -> bool:
    return torch.equal(token, other) if isinstance(token, torch.Tensor) else token == other


@dataclass(frozen=True)
class Expected:
    """What the methods shall read of a prompt: bool [tokens]."""

    words: torch.Tensor
    """PILOT's semantic loss."""
    words_and_ends: torch.Tensor
    """HD-Painter: PAIntA's relevance, RASG's score."""
    starts: list[int]
    """The tokens that semantic boundary control leaves."""


def expected_of_own(clip: comfy.sd.CLIP, prompt: str, suffix: str = "") -> Expected:
    """Of TrueFill's prompt node: the prompt's words, not the suffix's; the end of the text, and of each chunk with such words."""
    whole, own = text_tokens(clip, f"{prompt}, {suffix}" if suffix else prompt), text_tokens(clip, prompt)
    words = whole.words[: len(own.words)]
    assert all(_same(whole.ids[place], own.ids[other]) for place, other in zip(words, own.words, strict=True))
    chunks = {place // CHUNK for place in words} | {whole.ends[-1] // CHUNK}
    ends = [place for place in whole.ends if place // CHUNK in chunks]
    return Expected(whole.as_mask(words), whole.as_mask(words + ends), whole.starts)


def expected_of_hosts(clip: comfy.sd.CLIP, text: str) -> Expected:
    """Of CLIP Text Encode on SD1.5: words and end of the first chunk; of later ones all but their start count as words."""
    tokens = text_tokens(clip, text)
    later = [place for place in tokens.all_but_starts if place >= CHUNK]
    words = [place for place in tokens.words if place < CHUNK] + later
    return Expected(tokens.as_mask(words), tokens.as_mask([*words, tokens.ends[0]]), tokens.starts)


def expected_where_nothing_is_known(clip: comfy.sd.CLIP, text: str) -> Expected:
    """The documented rule: every token but the starts counts as a word."""
    tokens = text_tokens(clip, text)
    mask = tokens.as_mask(tokens.all_but_starts)
    return Expected(mask, mask, tokens.starts)


@dataclass
class Call:
    """A call of the UNet by the host, and its output; `roles` has 0 for each positive and 1 for each negative prompt."""

    x: torch.Tensor
    timesteps: torch.Tensor
    context: torch.Tensor
    y: torch.Tensor | None
    roles: list[int]
    output: torch.Tensor

    def of_positive(self) -> Call:
        """Its rows that belong to the one positive prompt."""
        pictures = len(self.x) // len(self.roles)
        first = self.roles.index(0) * pictures
        rows = slice(first, first + pictures)
        y = None if self.y is None else self.y[rows]
        return Call(self.x[rows], self.timesteps[rows], self.context[rows], y, [0], self.output[rows])


def recording(model: ModelPatcher) -> tuple[ModelPatcher, list[Call]]:
    """The model, and a list in which its calls are noted."""
    calls: list[Call] = []

    def note(
        executor: Callable[..., torch.Tensor], x: Any, timesteps: Any, context: Any, y: Any, *rest: Any, **more: Any
    ):
        output = executor(x, timesteps, context, y, *rest, **more)
        options = rest[1]
        kept = [None if of is None else of.detach().clone() for of in (x, timesteps, context, y, output)]
        calls.append(Call(*kept[:4], list(options["cond_or_uncond"]), kept[4]))
        return output

    model = model.clone()
    model.add_wrapper_with_key("diffusion_model", "test", note)
    return model, calls


@dataclass
class AllButStarts(Boundary):
    """Semantic boundary control that is told which tokens it leaves."""

    starts: tuple[int, ...] = ()

    def bounded(self, probabilities: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        changed = probabilities.clone()
        silenced = [token for token in range(changed.shape[-1]) if token not in self.starts]
        for row, hole in enumerate(self.hole):
            for pixel in known_pixels(hole[0], grid).nonzero().flatten().tolist():
                changed[row, :, pixel, silenced] *= 1.0 - self.strength
        return changed


@dataclass
class Reading:
    """What the literal forms find in a call: eps, RASG's S [pictures], PAIntA's c of each block and picture, in order."""

    output: torch.Tensor
    score: torch.Tensor
    c: list[torch.Tensor]


def hd_painters_reading(
    unet: torch.nn.Module, call: Call, hole: torch.Tensor, tokens: torch.Tensor, starts: list[int]
) -> Reading:
    """Of a call of the positive prompt with PAIntA, RASG and semantic boundary control on.

    `tokens` bool [tokens], or [pictures, tokens].
    """
    pictures, tokens = range(len(call.x)), tokens.expand(len(call.x), -1)
    rows = [Row(role="cond", sample=picture, tokens=tokens[picture]) for picture in pictures]
    painta = Painta(rows, hole.double())
    output, recorded = _literal(unet, call, hole, starts, painta=painta)
    scores = [
        objective(recorded, picture, tokens[picture], hole[picture : picture + 1].double()) for picture in pictures
    ]
    return Reading(output, torch.stack(scores), [c for of_place in painta.c.values() for c in of_place])


def pilots_reading(
    unet: torch.nn.Module, call: Call, hole: torch.Tensor, tokens: torch.Tensor, starts: list[int]
) -> torch.Tensor:
    """L_sc of each picture, [pictures], in a call of the positive prompt; `tokens` bool [tokens] or [pictures, tokens]."""
    _, recorded = _literal(unet, call, hole, starts, factors=SELECTED_FACTORS)
    of_pictures = tokens.expand(len(call.x), -1)
    losses = [
        semantic_centralisation(recorded, picture, of_pictures[picture], hole[picture, 0].double())
        for picture in range(len(call.x))
    ]
    return torch.stack(losses)


def _literal(unet: torch.nn.Module, call: Call, hole: torch.Tensor, starts: list[int], **options: Any) -> Any:
    with torch.no_grad():
        return literal_unet(
            unet,
            call.x.double(),
            call.timesteps,
            call.context.double(),
            None if call.y is None else call.y.double(),
            boundary=AllButStarts(hole.double(), starts=tuple(starts)),
            record=True,
            **options,
        )
