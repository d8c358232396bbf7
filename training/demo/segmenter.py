"""A small Segment Anything of the world: the mask of the object at a point, around points, in a box, or below a rough mask.

As Segment Anything was trained (arXiv 2304.02643, appendix A), with rough masks in the place of its rounds of corrections: focal
and dice loss of the best of three masks, and a head that predicts their IoU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn

from ...imaging.imagenet import MEAN, normalized
from ..loop import Batch, Task, step_seed
from ..world.attributes import SIZE
from ..world.scenes import make_scene

Example = tuple[np.ndarray, np.ndarray]
"""A picture, float [256, 256, 3] in [0, 1], and the masks of what is in it, bool [things, 256, 256]."""

_SCENES = 1_000_000
_DEV_SCENES = 128
PROMPTS = 4
"""Things that are asked for in each picture."""
KINDS = ("point", "points", "box", "box and point", "rough")
_KIND_SHARES = (0.35, 0.15, 0.25, 0.1, 0.15)
# Objects of which less can be seen are not asked for.
_LEAST_PIXELS = 150
# So many pictures are four scenes in one, and so many have padding, as pictures that are not square get.
_MOSAICS, _CUTS = 0.35, 0.4
_SMALLEST_SIDE = 96
# A rough mask is larger by up to so many pixels, or smaller by half of that.
_ROUGHNESS = 8
# The logit of its inside, as `model_patches.segment` sets it.
_CERTAIN = 8.0
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
        model = SamModel(config)
        # transformers makes room for published weights: what it draws is for networks of their width, and its frequencies are 64
        # times Segment Anything's own, with which places next to each other have nothing in common.
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.Embedding):
                module.reset_parameters()
    with torch.no_grad():
        places = model.shared_image_embedding
        places.positional_embedding.div_(places.scale)
    return model


def _point(rng: np.random.Generator, mask: np.ndarray) -> tuple[float, float]:
    rows, columns = np.nonzero(mask)
    place = rng.integers(len(rows))
    return columns[place] + 0.5, rows[place] + 0.5


def _box(rng: np.random.Generator, mask: np.ndarray) -> list[float]:
    rows, columns = np.nonzero(mask)
    corners = np.asarray([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], dtype=np.float64)
    size = np.tile(corners[2:] - corners[:2], 2)
    return np.clip(corners + rng.uniform(-_BOX_ERROR, _BOX_ERROR, 4) * size, 0, SIZE).tolist()


def _rough(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """The mask [256, 256], larger or smaller."""
    pixels = int(rng.integers(-_ROUGHNESS // 2, _ROUGHNESS + 1))
    if not pixels:
        return mask
    change = ndimage.binary_dilation if pixels > 0 else ndimage.binary_erosion
    changed = change(mask, iterations=abs(pixels))
    return changed if changed.any() else mask


def _prompts(rng: np.random.Generator, examples: list[Example], kind: str) -> Batch:
    """What is asked for in each picture, as the network takes it, and the masks that are right."""
    wanted, points, boxes, roughs = [], [], [], []
    for _, masks in examples:
        for _ in range(PROMPTS):
            mask = masks[rng.integers(len(masks))]
            wanted.append(mask)
            inside = [_point(rng, mask) for _ in range(2 if kind == "points" else 1)]
            points.append([*inside, _point(rng, ~mask)] if kind == "points" else inside)
            roughs.append(_rough(rng, mask) if kind == "rough" else mask)
            boxes.append(_box(rng, roughs[-1]))
    count = len(examples)
    batch = {
        "pixels": torch.from_numpy(np.stack([picture for picture, _ in examples])).movedim(-1, 1).float(),
        "masks": torch.from_numpy(np.stack(wanted)).view(count, PROMPTS, SIZE, SIZE),
    }
    if "point" in kind:
        batch["points"] = torch.tensor(points, dtype=torch.float32).view(count, PROMPTS, -1, 2)
        labels = torch.tensor([1, 1, 0] if kind == "points" else [1])
        batch["labels"] = labels.expand(count, PROMPTS, -1).clone()
    if "box" in kind or kind == "rough":
        batch["boxes"] = torch.tensor(boxes, dtype=torch.float32).view(count, PROMPTS, 4)
    if kind == "rough":
        batch["rough"] = torch.from_numpy(np.stack(roughs)).view(count, PROMPTS, SIZE, SIZE)
    return batch


def _example(split: str, rng: np.random.Generator) -> Example:
    """A scene as the network may get one: as it is, four in one at half their size, or a part of it beside padding."""
    while True:
        count = 4 if rng.random() < _MOSAICS else 1
        scenes = [make_scene(split, int(rng.integers(_SCENES))) for _ in range(count)]
        picture, masks = scenes[0].picture / 255.0, scenes[0].masks
        if count == 4:
            whole = np.zeros((sum(len(scene.masks) for scene in scenes), 2, SIZE, 2, SIZE), dtype=bool)
            first = 0
            for place, scene in enumerate(scenes):
                whole[first : first + len(scene.masks), place // 2, :, place % 2] = scene.masks
                first += len(scene.masks)
            halves = [np.concatenate([scene.picture for scene in scenes[row : row + 2]], axis=1) for row in (0, 2)]
            picture = np.concatenate(halves).reshape(SIZE, 2, SIZE, 2, 3).mean(axis=(1, 3)) / 255.0
            masks = whole.reshape(-1, SIZE, 2, SIZE, 2).mean(axis=(2, 4)) > 0.5
        if rng.random() < _CUTS:
            height, width = rng.permutation([SIZE, int(rng.integers(_SMALLEST_SIDE, SIZE))])
            top, left = rng.integers(SIZE - height + 1), rng.integers(SIZE - width + 1)
            rows, columns = slice(top, top + height), slice(left, left + width)
            padded, kept = np.broadcast_to(MEAN, picture.shape).copy(), np.zeros_like(masks)
            padded[:height, :width], kept[:, :height, :width] = picture[rows, columns], masks[:, rows, columns]
            picture, masks = padded, kept
        masks = masks[masks.sum(axis=(1, 2)) >= _LEAST_PIXELS]
        if len(masks):
            return picture, masks


class SegmenterTask(Task):
    """Trains a SamModel on scenes."""

    name = "segmenter"

    def __init__(self, seed: int) -> None:
        self.segmenter = new_segmenter(seed)
        self.networks = nn.ModuleDict({"segmenter": self.segmenter})

    def batch(self, seed: int, step: int, size: int) -> Batch:
        rng = np.random.default_rng(step_seed(seed, step))
        kind = str(rng.choice(KINDS, p=_KIND_SHARES))
        return _prompts(rng, [_example("train", rng) for _ in range(size)], kind)

    def _answers(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, prompts, 3, 128, 128] and predicted IoUs [B, prompts, 3]."""
        pixels = normalized(batch["pixels"])
        if "rough" not in batch:
            output = self.segmenter(
                pixel_values=pixels,
                input_points=batch.get("points"),
                input_labels=batch.get("labels"),
                input_boxes=batch.get("boxes"),
                multimask_output=True,
            )
            return output.pred_masks.float(), output.iou_scores.float()
        # The network takes one mask a picture.
        embeddings = self.segmenter.vision_encoder(pixels)[0].repeat_interleave(PROMPTS, dim=0)
        grid = 4 * embeddings.shape[-1]
        rough = F.interpolate(batch["rough"].flatten(0, 1)[:, None].float(), size=(grid, grid), mode="area")
        output = self.segmenter(
            image_embeddings=embeddings,
            input_boxes=batch["boxes"].flatten(0, 1)[:, None],
            input_masks=(2.0 * rough - 1.0) * _CERTAIN,
            multimask_output=True,
        )
        of_each = (len(pixels), PROMPTS)
        return output.pred_masks[:, 0].float().unflatten(0, of_each), output.iou_scores[:, 0].float().unflatten(
            0, of_each
        )

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
                examples = [_example("dev", rng) for _ in range(16)]
                batch = {name: part.to(device) for name, part in _prompts(rng, examples, kind).items()}
                logits, scores = self._answers(batch)
                chosen = scores.argmax(dim=-1)[..., None, None, None].expand(*scores.shape[:2], 1, *logits.shape[-2:])
                masks = F.interpolate(logits.gather(2, chosen)[:, :, 0], size=(SIZE, SIZE), mode="bilinear") > 0
                true = batch["masks"]
                found.append((masks & true).sum(dim=(-2, -1)) / (masks | true).sum(dim=(-2, -1)))
            figures[f"iou_{kind.replace(' ', '_')}"] = float(torch.cat(found).mean())
        return figures
