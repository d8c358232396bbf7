"""Segment Anything, SAM-HQ and SAM 2 under the host's memory manager: a mask for points, boxes or a rough mask.

The image encoder, which takes most of the time, runs once for a picture; what it found is kept for the next clicks.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import comfy.model_management
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher

from ..imaging.imagenet import normalized
from ..imaging.masks import as_mask_batch, hole_of, resize_mask
from ..imaging.morphology import bounding_boxes
from ..imaging.pictures import check_pictures, resampled
from ..imaging.prompts import Box, Marks, Point
from .placed import Placed

KEPT_PICTURES = 16
"""So many pictures' embeddings are kept (4 MB each for Segment Anything, 16 to 24 MB for SAM-HQ and SAM 2)."""

Pick = Literal["best", "smallest", "middle", "largest", "all together"]

# The logit of a rough mask's hole; the network's own masks reach about this far.
_CERTAIN = 8.0
# A rough mask's box is larger than the mask by this share of its size on every side.
_BOX_MARGIN = 0.05


@dataclass(frozen=True)
class Prompt:
    """What says where one thing is: points on it, points beside it, its box, a rough mask [H, W] of any size."""

    include: Sequence[Point] = ()
    exclude: Sequence[Point] = ()
    box: Box | None = None
    rough: torch.Tensor | None = None


@dataclass(frozen=True)
class Found:
    """The network's answers for one thing: a part, a larger part, the whole.

    `logits` [answers, H, W], above 0 where the thing is; `scores` [answers], how good the network thinks they are (IoU).
    """

    logits: torch.Tensor
    scores: torch.Tensor

    def pick(self, which: Pick) -> tuple[torch.Tensor, float]:
        """One of the answers as a mask, bool [H, W], and its score; "all together" is their union and the best score."""
        masks = self.logits > 0.0
        if which == "all together":
            return masks.any(dim=0), float(self.scores.max())
        order = masks.flatten(1).sum(dim=1).argsort()
        places = {"smallest": order[0], "middle": order[len(order) // 2], "largest": order[-1]}
        index = int(self.scores.argmax() if which == "best" else places[which])
        return masks[index], float(self.scores[index])


@dataclass(frozen=True)
class _Family:
    """How a family of networks wants its pictures, and what a picture becomes.

    `stretched`: to a square; else the longer side is scaled and the rest is padded. `look` makes the embeddings of framed
    pixels; `given` are the network's arguments for them. `attention` tells the heads and tokens of its widest attention.
    """

    stretched: bool
    look: Callable[[Any, torch.Tensor], tuple[torch.Tensor, ...]]
    given: Callable[[tuple[torch.Tensor, ...]], dict[str, Any]]
    attention: Callable[[Any], tuple[int, int]]


def _vit_attention(config: Any) -> tuple[int, int]:
    vision = config.vision_config
    return vision.num_attention_heads, (vision.image_size // vision.patch_size) ** 2


def _hiera_attention(config: Any) -> tuple[int, int]:
    # The third of its stages, at 1/16, is the one with attention over the whole picture.
    prompts = config.prompt_encoder_config
    heads = config.vision_config.backbone_config.num_attention_heads_per_stage[2]
    return heads, (prompts.image_size // prompts.patch_size) ** 2


def _look_hq(network: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    embedding, of_blocks = network.get_image_embeddings(pixels)
    # The decoder reads the first of them alone.
    return embedding, of_blocks[0]


_FAMILIES = {
    "sam": _Family(
        False,
        lambda network, pixels: (network.get_image_embeddings(pixels),),
        lambda found: {"image_embeddings": found[0]},
        _vit_attention,
    ),
    "sam_hq": _Family(
        False,
        _look_hq,
        lambda found: {"image_embeddings": found[0], "intermediate_embeddings": [found[1]]},
        _vit_attention,
    ),
    "sam2": _Family(
        True,
        lambda network, pixels: tuple(network.get_image_embeddings(pixels)),
        lambda found: {"image_embeddings": list(found)},
        _hiera_attention,
    ),
}


@dataclass
class Segmenter:
    """transformers' SamModel, SamHQModel or Sam2Model, or what has the interface of the first, placed by the host."""

    patcher: ModelPatcher
    _embeddings: OrderedDict[tuple[str, torch.Size], tuple[torch.Tensor, ...]] = field(default_factory=OrderedDict)

    @classmethod
    def of(cls, model: Any, half: bool = True) -> Segmenter:
        """A segmenter of such a network: half precision where the host uses it, if `half` allows it; float32 on a CPU."""
        device = comfy.model_management.get_torch_device()
        half = half and comfy.model_management.should_use_fp16(device)
        placed = Placed(model.to(torch.float16 if half else torch.float32))
        return cls(ModelPatcher(placed, device, comfy.model_management.unet_offload_device()))

    @torch.inference_mode()
    def segment(self, picture: torch.Tensor, prompts: Sequence[Prompt]) -> list[Found]:
        """What each prompt points at in a picture [H, W, 3 or 4] in [0, 1]; points and boxes count its pixels.

        The result lies on the host's intermediate device. Raises ValueError for a prompt that says nothing, and for a picture
        of another shape or with values that are NaN or infinite.
        """
        check_pictures(picture[None], "'image'")
        if any(not prompt.include and prompt.box is None and prompt.rough is None for prompt in prompts):
            raise ValueError("A segmenter needs a point on the thing, a box around it, or a rough mask of it.")
        comfy.model_management.load_models_gpu([self.patcher], memory_required=self.memory, force_full_load=True)
        embedding = self._embedding(picture)
        return [self._found(embedding, prompt, picture.shape[:2]) for prompt in prompts]

    @property
    def _network(self) -> Any:
        return self.patcher.model.network

    @property
    def _family(self) -> _Family:
        return _FAMILIES[self._network.config.model_type]

    @property
    def _side(self) -> int:
        return self._network.config.prompt_encoder_config.image_size

    @property
    def memory(self) -> int:
        """Bytes that looking at a picture takes: the image encoder's attention, its softmax and its positions at once."""
        heads, tokens = self._family.attention(self._network.config)
        return 3 * heads * tokens**2 * self._network.dtype.itemsize

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of a picture as the network sees it, without padding, rounded as its authors do.

        Of a picture so thin that their rule leaves nothing of a side, one pixel is left.
        """
        if self._family.stretched:
            return self._side, self._side
        scale = self._side / max(size)
        return max(int(size[0] * scale + 0.5), 1), max(int(size[1] * scale + 0.5), 1)

    def _framed(self, pixels: torch.Tensor) -> torch.Tensor:
        """[C, H, W] scaled to the network's size and padded below and to the right: [1, C, side, side]."""
        size = self._resized((pixels.shape[1], pixels.shape[2]))
        if size != pixels.shape[1:]:
            pixels = resampled(pixels[None], size, "bilinear")[0]
        return F.pad(pixels, (0, self._side - size[1], 0, self._side - size[0]))[None]

    def _embedding(self, picture: torch.Tensor) -> tuple[torch.Tensor, ...]:
        picture = picture[..., :3].contiguous()
        digest = hashlib.blake2b(picture.cpu().numpy().tobytes(), digest_size=16).hexdigest()
        key = (digest, picture.shape)
        if key in self._embeddings:
            self._embeddings.move_to_end(key)
        else:
            device = self.patcher.load_device
            pixels = picture.to(device, torch.float32).movedim(-1, 0).clamp(0.0, 1.0)
            framed = self._framed(normalized(pixels)).to(self._network.dtype)
            kept = comfy.model_management.intermediate_device()
            self._embeddings[key] = tuple(part.to(kept) for part in self._family.look(self._network, framed))
            while len(self._embeddings) > KEPT_PICTURES:
                self._embeddings.popitem(last=False)
        return self._embeddings[key]

    def _found(self, embedding: tuple[torch.Tensor, ...], prompt: Prompt, size: torch.Size) -> Found:
        model, device = self._network, self.patcher.load_device
        height, width = self._resized((size[0], size[1]))
        scale = torch.tensor([width / size[1], height / size[0]], device=device)
        box, rough = prompt.box, None
        if prompt.rough is not None:
            mask = resize_mask(prompt.rough, (size[0], size[1])).to(device)
            box = box or _around(mask)
            grid = 4 * (self._side // model.config.prompt_encoder_config.patch_size)
            rough = resampled(self._framed(mask[0]), (grid, grid), "bilinear")
            rough = ((2.0 * rough - 1.0) * _CERTAIN).to(model.dtype)
        points = [*prompt.include, *prompt.exclude]
        labels = [1] * len(prompt.include) + [0] * len(prompt.exclude)
        output = model(
            **self._family.given(tuple(part.to(device, model.dtype) for part in embedding)),
            # In float32: a place in a picture has more digits than half precision keeps.
            input_points=torch.tensor([[points]], device=device) * scale if points else None,
            input_labels=torch.tensor([[labels]], device=device) if points else None,
            input_boxes=torch.tensor([[box]], device=device) * scale.repeat(2) if box else None,
            input_masks=rough,
            multimask_output=True,
        )
        logits = output.pred_masks[0].float()
        if not self._family.stretched:
            logits = F.interpolate(logits, size=(self._side, self._side), mode="bilinear")[..., :height, :width]
        logits = F.interpolate(logits, size=(size[0], size[1]), mode="bilinear")[0]
        to = comfy.model_management.intermediate_device()
        return Found(logits.to(to), output.iou_scores[0, 0].float().to(to))


def segment_batch(
    segmenter: Segmenter,
    pictures: torch.Tensor,
    prompts: Sequence[Sequence[Prompt]],
    pick: Pick,
    separate: bool = False,
) -> tuple[torch.Tensor, list[float]]:
    """Masks [B, H, W] of 0 and 1 for pictures [B, H, W, C] in [0, 1], each with its own prompts, and their scores.

    A picture's things are one mask, with their mean score; a picture without prompts has an empty one, of score 0. With
    `separate` every thing has a mask of its own, in the order of pictures and prompts. Raises ValueError as
    `Segmenter.segment`.
    """
    masks, scores = [], []
    for picture, mine in zip(pictures, prompts, strict=True):
        comfy.model_management.throw_exception_if_processing_interrupted()
        found = [thing.pick(pick) for thing in segmenter.segment(picture, mine)] if mine else []
        if separate and found:
            masks += [mask for mask, _ in found]
            scores += [score for _, score in found]
        else:
            nothing = torch.zeros(
                picture.shape[:2], dtype=torch.bool, device=comfy.model_management.intermediate_device()
            )
            masks.append(torch.stack([nothing, *(mask for mask, _ in found)]).any(dim=0))
            scores.append(sum(score for _, score in found) / max(len(found), 1))
    return torch.stack(masks).float(), scores


def batch_prompts(
    marks: Marks, boxes: Sequence[Sequence[Box]], rough: torch.Tensor | None = None
) -> list[list[Prompt]]:
    """The prompts of each picture of a batch: the same marks for all, and boxes for each.

    A picture has one prompt for each of its boxes, with the points of `include` inside of it; without boxes it has one for all
    points. `rough` is one mask for all pictures or one for each, as for `as_mask_batch`, of any size; it goes with each prompt,
    and an empty one says nothing. A picture has no prompt where nothing says where something is.

    Raises ValueError for another number of rough masks.
    """
    roughs = None if rough is None else as_mask_batch(rough)[:, 0]
    if roughs is not None and len(roughs) not in (1, len(boxes)):
        raise ValueError(
            f"'rough' has {len(roughs)} masks, but 'image' is a batch of {len(boxes)}: connect one mask, or one for each picture."
        )
    return [
        _prompts(marks, [*marks.drawn, *mine], None if roughs is None else roughs[min(index, len(roughs) - 1)])
        for index, mine in enumerate(boxes)
    ]


def _prompts(marks: Marks, boxes: Sequence[Box], rough: torch.Tensor | None) -> list[Prompt]:
    """The prompts of one picture with these boxes and this rough mask [H, W]."""
    if rough is not None and not hole_of(rough).any():
        rough = None
    if not boxes:
        return [Prompt(marks.include, marks.exclude, None, rough)] if marks.include or rough is not None else []
    return [
        Prompt(
            [(x, y) for x, y in marks.include if box[0] <= x <= box[2] and box[1] <= y <= box[3]],
            marks.exclude,
            box,
            rough,
        )
        for box in boxes
    ]


def _around(mask: torch.Tensor) -> Box:
    """The box of a rough mask [1, 1, H, W], a little larger; of a soft edge the inner half counts."""
    solid = (mask > 0.5).float()
    left, top, right, bottom = (float(side) for side in bounding_boxes(solid if solid.any() else mask)[0])
    across, down = _BOX_MARGIN * (right - left), _BOX_MARGIN * (bottom - top)
    height, width = mask.shape[-2:]
    return max(left - across, 0.0), max(top - down, 0.0), min(right + across, width), min(bottom + down, height)
