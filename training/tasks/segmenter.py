"""A small Segment Anything of the world: the mask of the object at a point, around points, or in a box.

As Segment Anything was trained (arXiv 2304.02643, appendix A), without its rounds of corrections: focal and dice loss of the best
of three masks, and a head that predicts their IoU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ...imaging.imagenet import normalized
from ..latents import as_pixels
from ..loop import Batch, Task, step_seed
from ..world.attributes import SIZE
from ..world.scenes import Scene, make_scene

_SCENES = 1_000_000
_DEV_SCENES = 128
PROMPTS = 4
"""Things that are asked for in each picture."""
KINDS = ("point", "points", "box", "box and point")
_KIND_SHARES = (0.4, 0.2, 0.3, 0.1)
# Objects of which less can be seen are not asked for.
_LEAST_PIXELS = 150
# A drawn box is off by up to this share of its size on every side.
_BOX_ERROR = 0.1
_FOCAL_WEIGHT, _FOCUS = 20.0, 2.0


def new_segmenter(seed: int) -> Any:
    """transformers' SamModel for pictures of the world."""
    from transformers import SamConfig, SamModel

    config = SamConfig(
        vision_config={
            "hidden_size": 128,
            "output_channels": 64,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "image_size": SIZE,
            "patch_size": 8,
            "window_size": 8,
            "global_attn_indexes": [2, 5],
            "mlp_dim": 384,
            "num_pos_feats": 32,
            "initializer_range": 0.02,
        },
        prompt_encoder_config={"hidden_size": 64, "image_size": SIZE, "patch_size": 8, "mask_input_channels": 16},
        mask_decoder_config={
            "hidden_size": 64,
            "mlp_dim": 256,
            "iou_head_hidden_dim": 64,
            # What files of Segment Anything are read with.
            "layer_norm_eps": 1e-5,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SamModel(config)


def _point(rng: np.random.Generator, mask: np.ndarray) -> tuple[float, float]:
    rows, columns = np.nonzero(mask)
    place = rng.integers(len(rows))
    return columns[place] + 0.5, rows[place] + 0.5


def _box(rng: np.random.Generator, mask: np.ndarray) -> list[float]:
    rows, columns = np.nonzero(mask)
    corners = np.asarray([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], dtype=np.float64)
    size = np.tile(corners[2:] - corners[:2], 2)
    return np.clip(corners + rng.uniform(-_BOX_ERROR, _BOX_ERROR, 4) * size, 0, SIZE).tolist()


def _prompts(rng: np.random.Generator, scenes: list[Scene], kind: str) -> Batch:
    """What is asked for in each scene, as the network takes it, and the masks that are right."""
    wanted, points, boxes = [], [], []
    for scene in scenes:
        for _ in range(PROMPTS):
            mask = scene.masks[rng.integers(len(scene.masks))]
            wanted.append(mask)
            inside = [_point(rng, mask) for _ in range(2 if kind == "points" else 1)]
            points.append([*inside, _point(rng, ~mask)] if kind == "points" else inside)
            boxes.append(_box(rng, mask))
    count = len(scenes)
    batch = {
        "pixels": as_pixels(np.stack([scene.picture for scene in scenes])),
        "masks": torch.from_numpy(np.stack(wanted)).view(count, PROMPTS, SIZE, SIZE),
    }
    if kind != "box":
        batch["points"] = torch.tensor(points, dtype=torch.float32).view(count, PROMPTS, -1, 2)
        labels = torch.tensor([1, 1, 0] if kind == "points" else [1])
        batch["labels"] = labels.expand(count, PROMPTS, -1).clone()
    if "box" in kind:
        batch["boxes"] = torch.tensor(boxes, dtype=torch.float32).view(count, PROMPTS, 4)
    return batch


def _scenes(split: str, rng: np.random.Generator, count: int) -> list[Scene]:
    """Scenes of which every object can be seen well enough."""
    found: list[Scene] = []
    while len(found) < count:
        scene = make_scene(split, int(rng.integers(_SCENES)))
        if min(mask.sum() for mask in scene.masks) >= _LEAST_PIXELS:
            found.append(scene)
    return found


class SegmenterTask(Task):
    """Trains a SamModel on scenes."""

    name = "segmenter"

    def __init__(self, seed: int) -> None:
        self.segmenter = new_segmenter(seed)
        self.networks = nn.ModuleDict({"segmenter": self.segmenter})

    def batch(self, seed: int, step: int, size: int) -> Batch:
        rng = np.random.default_rng(step_seed(seed, step))
        kind = str(rng.choice(KINDS, p=_KIND_SHARES))
        return _prompts(rng, _scenes("train", rng, size), kind)

    def _answers(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, prompts, 3, 128, 128] and predicted IoUs [B, prompts, 3]."""
        output = self.segmenter(
            pixel_values=normalized(batch["pixels"]),
            input_points=batch.get("points"),
            input_labels=batch.get("labels"),
            input_boxes=batch.get("boxes"),
            multimask_output=True,
        )
        return output.pred_masks.float(), output.iou_scores.float()

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        logits, scores = self._answers(batch)
        # Of a pixel at the network's resolution a share may belong to the object.
        shares = F.avg_pool2d(batch["masks"].float(), SIZE // logits.shape[-1])[:, :, None].expand_as(logits)
        unsure = (logits.sigmoid() - shares).abs() ** _FOCUS
        errors = F.binary_cross_entropy_with_logits(logits, shares, reduction="none")
        focal = _FOCAL_WEIGHT * (unsure * errors).mean(dim=(-2, -1))
        inside = logits.sigmoid()
        both = (inside * shares).sum(dim=(-2, -1))
        dice = 1.0 - (2.0 * both + 1.0) / (inside.sum(dim=(-2, -1)) + shares.sum(dim=(-2, -1)) + 1.0)
        best = (focal + dice).min(dim=-1)
        with torch.no_grad():
            drawn, true = logits > 0, shares > 0.5
            union = (drawn | true).sum(dim=(-2, -1)).clamp(min=1)
            overlaps = (drawn & true).sum(dim=(-2, -1)) / union
        guess = F.mse_loss(scores, overlaps)
        return {
            "loss": best.values.mean() + guess,
            "focal": focal.gather(-1, best.indices[..., None]).mean(),
            "dice": dice.gather(-1, best.indices[..., None]).mean(),
            "iou": overlaps.amax(dim=-1).mean(),
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean IoU of the mask with the highest predicted IoU, at full size, over scenes of the development split."""
        device = next(self.segmenter.parameters()).device
        figures = {}
        for kind in KINDS:
            rng = np.random.default_rng(0)
            found = []
            for _ in range(0, _DEV_SCENES, 16):
                batch = {name: part.to(device) for name, part in _prompts(rng, _scenes("dev", rng, 16), kind).items()}
                logits, scores = self._answers(batch)
                chosen = scores.argmax(dim=-1)[..., None, None, None].expand(*scores.shape[:2], 1, *logits.shape[-2:])
                masks = F.interpolate(logits.gather(2, chosen)[:, :, 0], size=(SIZE, SIZE), mode="bilinear") > 0
                true = batch["masks"]
                found.append((masks & true).sum(dim=(-2, -1)) / (masks | true).sum(dim=(-2, -1)))
            figures[f"iou_{kind.replace(' ', '_')}"] = float(torch.cat(found).mean())
        return figures
