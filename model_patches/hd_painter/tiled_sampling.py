"""Evaluates a model in overlapping tiles: the sampler sees one latent, the model never more than a tile of it.

All tiles are joined in every step, as in MultiDiffusion, so that neighbours agree before they drift apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...imaging.region_plan import Box
from ...imaging.tiling import tile_weight

KEY = "TrueFill tiles"


def with_tiles(
    model: ModelPatcher, boxes: Sequence[Box], size: tuple[int, int], overlap: int, outside: torch.Tensor
) -> ModelPatcher:
    """Returns a clone of `model` that is evaluated in the tiles `boxes` of a latent of `size` (height, width) in cells.

    Where tiles share cells they are mixed by `tile_weight`; cells in no tile are taken for `outside`, a clean latent
    [1, C, h, w] as VAE Encode gives it. The host is told to make room for a tile only.

    Sampling raises ValueError for a latent of another size and for conditioning with a ControlNet, whose picture the host
    would squeeze into every tile.
    """
    tiles = _Tiles(boxes, size, overlap, outside)
    model = model.clone()
    for kind, wrapper in (
        (WrappersMP.PREPARE_SAMPLING, tiles.prepare),
        (WrappersMP.CALC_COND_BATCH, tiles.calc_cond_batch),
    ):
        model.remove_wrappers_with_key(kind, KEY)
        model.add_wrapper_with_key(kind, KEY, wrapper)
    return model


class _Tiles:
    def __init__(self, boxes: Sequence[Box], size: tuple[int, int], overlap: int, outside: torch.Tensor):
        self._boxes, self._size, self._outside = tuple(boxes), size, outside
        self._weights = [tile_weight(box, size, overlap) for box in boxes]

    def prepare(
        self, executor: Any, model: Any, noise_shape: Sequence[int], conds: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Wrapper around the host's loading of the models, whose memory estimate goes by the latent's shape."""
        largest = max(self._boxes, key=lambda box: box.height * box.width)
        return executor(model, [*noise_shape[:-2], largest.height, largest.width], conds, *args, **kwargs)

    def calc_cond_batch(
        self,
        executor: Any,
        model: Any,
        conds: list[Any],
        x: torch.Tensor,
        timestep: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> list[torch.Tensor]:
        """Wrapper around the host's evaluation of all conditionings at one noise level."""
        if tuple(x.shape[-2:]) != self._size:
            raise ValueError(
                f"The tiles were laid out for {self._size[1]}x{self._size[0]} cells and the latent has {x.shape[-1]}x"
                f"{x.shape[-2]}."
            )
        totals = [torch.zeros_like(x) for _ in conds]
        count = x.new_zeros(self._size)
        for box, weight in zip(self._boxes, self._weights, strict=True):
            rows, columns = slice(box.top, box.bottom), slice(box.left, box.right)
            weight = weight.to(x)
            parts = executor(model, [_narrowed(entries, box) for entries in conds], x, timestep, *args, **kwargs)
            for total, part in zip(totals, parts, strict=True):
                total[..., rows, columns] += weight * part[..., rows, columns]
            count[rows, columns] += weight
        covered = count > 0
        outside = model.process_latent_in(self._outside.to(x))
        return [torch.where(covered, total / count.clamp(min=1e-6), outside) for total in totals]


def _narrowed(entries: list[dict[str, Any]] | None, box: Box) -> list[dict[str, Any]] | None:
    """The conditioning of one role, set to what a tile has of it."""
    if entries is None:
        return None
    narrowed = []
    for entry in entries:
        if entry.get("control") is not None:
            raise ValueError(
                "A ControlNet can't be cut into tiles: make the tile as large as the region, or take the ControlNet out."
            )
        height, width, top, left = entry.get("area") or (box.bottom, box.right, 0, 0)
        first, last = max(box.top, top), min(box.bottom, top + height)
        start, stop = max(box.left, left), min(box.right, left + width)
        if first < last and start < stop:
            narrowed.append({**entry, "area": (last - first, stop - start, first, start)})
    return narrowed
