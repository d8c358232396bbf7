"""Semantic boundary control: known pixels read none of the prompt's words.

PILOT (arXiv 2407.08019), section 4.1.2, equation 16, as in the released code: in every cross-attention the probabilities of all
tokens but the start of the text are set to 0 at known pixels, after the softmax and without normalising them again. Since these
probabilities are factors of the tokens' values, this is the host's own attention with these values at 0, taken for the known
pixels alone.

Most models without a UNet have one attention for text and picture, which PILOT did not know. There known pixels attend to the
picture and to reference pictures, and the softmax is over these alone. None of the text is left, though a template may be part of
it: its tokens read the prompt's words from the first block on, and pass them on. So would what pads the picture: it reads no text
either. Those that have a cross-attention (Anima, Wan) read T5's tokens there, which have no start: known pixels read nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ..core.call_rows import Area, PromptRows
from ..core.joint_attention import JointCall, JointEdit
from ..core.prompt_tokens import CHUNK
from ..core.protocol import Method, MethodRun, UNetCall
from ..core.sampling_run import SamplingRun
from ..core.token_layout import TokenLayout, require_attention
from ..core.unet_attention import attention


@dataclass(frozen=True, eq=False, kw_only=True)
class SemanticBoundary(Method):
    """Settings: those of every method, and in which blocks of a model without a UNet it acts (LAYERS); a UNet's are all read."""

    name: ClassVar = "Semantic Boundary"
    order: ClassVar = 100

    layers: str = "all"

    def check(self, model: object) -> None:
        require_attention(model, self.name)

    def begin(self, run: SamplingRun, hole: torch.Tensor) -> MethodRun:
        return BoundaryRun(self, hole)


def known_cells(hole: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Which cells of a grid (height, width) count as known, bool [B, height, width]: all that are not entirely hole.

    `hole` is [B, 1, h, w] in [0, 1] on the latent grid. It is resized bilinearly, and a cell is hole where it then is 1.
    """
    resized = F.interpolate(hole, size=grid, mode="bilinear", align_corners=False)[:, 0]
    # The weights add up to 1 only within rounding.
    return resized < 1.0 - 1e-5


class KnownPixels:
    """The known pixels of a run's calls, on each grid. `hole` is [B, 1, h, w] on the latent grid."""

    def __init__(self, hole: torch.Tensor) -> None:
        # Ordinary tensors, not inference ones: RASG's backward pass goes through the boundary.
        with torch.inference_mode(False):
            self._hole = hole.clone()
            self._has_hole = self._hole.flatten(1).any(dim=1)
        self._known: dict[tuple[Any, ...], torch.Tensor] = {}

    def of(self, rows: Sequence[PromptRows], grid: tuple[int, int], device: torch.device) -> torch.Tensor:
        """Bool [rows, pixels, 1]: the known pixels of a call's rows on `grid`; none in pictures that have no hole."""
        areas: tuple[Area | None, ...] = tuple(of_prompt.area for of_prompt in rows)
        key = (grid, device, areas)
        if key not in self._known:
            with torch.inference_mode(False):
                known = self._find(rows, grid, lambda plane: plane)
                self._known[key] = known[..., None].to(device)
        return self._known[key]

    def of_tokens(self, rows: Sequence[PromptRows], layout: TokenLayout) -> torch.Tensor:
        """Bool [rows, height x width], on the CPU: the known image tokens of a call's rows."""
        return self._find(rows, layout.grid, layout.whole).cpu()

    def _find(
        self, rows: Sequence[PromptRows], grid: tuple[int, int], completed: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        cells = [known_cells(completed(of_prompt.cut(self._hole)), grid).flatten(1) for of_prompt in rows]
        return torch.cat([known & self._has_hole[:, None] for known in cells])


class BoundaryRun(MethodRun):
    """Semantic boundary control in one run."""

    def __init__(self, settings: SemanticBoundary, hole: torch.Tensor) -> None:
        self._settings = settings
        self._known = KnownPixels(hole)

    def edit(self, call: UNetCall) -> AbstractContextManager[None]:
        """Adds the edit around every replacement of an attention that is there."""
        replace = dict(call.options.get("patches_replace", {}))
        attn2 = dict(replace.get("attn2", {}))
        for t in call.places:
            attn2[t.place] = self._bounded(call, attn2.get(t.place, attn2.get(t.place[:2])) or attention)
        replace["attn2"] = attn2
        call.options["patches_replace"] = replace
        return nullcontext()

    def edit_joint(self, call: JointCall) -> JointEdit:
        layout = call.layout
        known = self._known.of_tokens(call.rows, layout)
        queries = layout.placed(known)
        queries[:, layout.padding] = known.any(dim=1, keepdim=True)
        left_out = torch.zeros_like(queries)
        left_out[:, layout.text] = True
        return JointEdit(
            queries=queries,
            layers=self._settings.layers,
            left_out=left_out,
            strength=self._settings.strength,
        )

    def _bounded(self, call: UNetCall, attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def bounded(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any], **kwargs: Any
        ) -> torch.Tensor:
            out = attend(q, k, v, extra_options, **kwargs)
            height, width = extra_options["activations_shape"][-2:]
            known = self._known.of(call.rows, (height, width), out.device)
            if out.shape[:2] != known.shape[:2]:
                raise ValueError(
                    f"Semantic Boundary expected {known.shape[1]} pixels in cross-attention and found {out.shape[1]}: another "
                    "node merges or cuts them; take it or Semantic Boundary out."
                )
            silenced = attend(q, k, v * self._weights(v, call.text_tokens), extra_options, **kwargs)
            return torch.where(known, silenced, out)

        return bounded

    def _weights(self, value: torch.Tensor, text: int) -> torch.Tensor:
        """What the values of the tokens are multiplied by at known pixels, [1, tokens, 1]."""
        places = torch.arange(value.shape[1], device=value.device)
        said = (places % CHUNK != 0) & (places < text)
        return torch.where(said, 1.0 - self._settings.strength, 1.0).to(value.dtype)[None, :, None]
