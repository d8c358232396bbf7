"""Pictures of one pixel, one row, one column, and little more: every node makes masks and boxes of them, by every network."""

from __future__ import annotations

import json
from math import isfinite
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from devtools.pack import pack_module
from truefill_testing.random_segmenters import SIDE, predicted, small_sam, small_sam_hq, smooth_picture

reader = pack_module("weights.segmenters")
segment = pack_module("selection.segmenters")
nodes = pack_module("nodes.selection")
Prompt = segment.Prompt

# Height and width. Scaled for a network, one side of all but the last becomes less than a pixel, or hardly more.
LONG = [(1, 300), (4096, 1), (7, 4096), (8, 4096), (4096, 8), (2, 1500), (24, 1024)]
THIN = [*LONG, (1, 1), (3, 2)]
SEARCH = {
    "text": "red cup. spoon.",
    "threshold": 0.1,
    "pick": "all",
    "index": 0,
    "count": 5,
    "overlap": 0.8,
    "smallest": 0.0,
    "largest": 100.0,
}


class SameBrightness(torch.nn.Module):
    """What a segmenter touches of a network; it finds all that is as bright as the pixel of the point."""

    dtype = torch.float32

    def __init__(self, model_type: str) -> None:
        super().__init__()
        size = {"image_size": 256, "patch_size": 16}
        heads = SimpleNamespace(num_attention_heads_per_stage=[1, 1, 1, 1])
        self.config = SimpleNamespace(
            model_type=model_type,
            prompt_encoder_config=SimpleNamespace(**size),
            vision_config=SimpleNamespace(num_attention_heads=1, backbone_config=heads, **size),
        )

    def get_image_embeddings(self, pixels: torch.Tensor) -> Any:
        return [pixels] if self.config.model_type == "sam2" else pixels

    def forward(self, image_embeddings: Any, input_points: torch.Tensor, **rest: Any) -> SimpleNamespace:
        seen = (image_embeddings[0] if self.config.model_type == "sam2" else image_embeddings)[0, 0]
        x, y = input_points[0, 0, 0].int().tolist()
        logits = 0.2 - (seen[::4, ::4] - seen[y, x]).abs()
        return SimpleNamespace(pred_masks=logits.expand(1, 1, 3, -1, -1), iou_scores=torch.ones(1, 1, 3))


@pytest.mark.parametrize("model_type", ["sam", "sam2"])
@pytest.mark.parametrize("size", LONG, ids=str)
def test_a_point_means_the_pixel_that_it_is_on(model_type: str, size: tuple[int, int]) -> None:
    """Of a picture with a dark and a bright half, a point on one, in any row or column, finds this half."""
    height, width = size
    bright = torch.zeros(size, dtype=torch.bool)
    (bright[:, width // 2 :] if width > height else bright[height // 2 :]).fill_(True)
    picture = torch.where(bright, 0.9, 0.2)[..., None].expand(-1, -1, 3)
    segmenter = segment.Segmenter.of(SameBrightness(model_type))
    for x in {0, width // 3, 2 * width // 3, width - 1}:
        for y in {0, height // 3, 2 * height // 3, height - 1}:
            (found,) = segmenter.segment(picture, [Prompt([(float(x), float(y))])])
            mask, _ = found.pick("best")
            wrong = mask != (bright == bright[y, x])
            assert mask.shape == size
            # All of it lies within the one of 64 cells that has the edge.
            assert wrong.sum() <= min(size) * (max(size) / 64 + 1), (x, y)


def means(image: torch.Tensor, length: int, axis: int) -> torch.Tensor:
    """An axis of another length: anti-aliased bilinear resampling, literally."""
    stretch = image.shape[axis] / length
    reach = max(stretch, 1.0)
    middles = (torch.arange(length) + 0.5)[:, None] * stretch
    weights = (1.0 - (torch.arange(image.shape[axis]) + 0.5 - middles).abs() / reach).clamp(min=0.0)
    return torch.tensordot(weights / weights.sum(dim=1, keepdim=True), image, dims=([1], [axis])).movedim(0, axis)


@pytest.mark.parametrize("size", [size for size in LONG if size != (24, 1024)], ids=str)
@pytest.mark.parametrize("make", [small_sam, small_sam_hq], ids=["sam", "sam_hq"])
def test_the_package_answers_the_same_for_the_picture_as_it_is_seen(make: Any, size: tuple[int, int]) -> None:
    """The package itself can't scale them: it is given one row, or column, and what is pointed at in it."""
    height, width = size
    image, sam = smooth_picture(height, width), make()
    seen = tuple(max(round(side * SIDE / max(size)), 1) for side in size)
    assert min(seen) == 1 and max(seen) == SIDE
    across, down = seen[1] / width, seen[0] / height
    box = (0.2 * width, 0.0, 0.7 * width, float(height)) if width > height else (0.0, 0.2 * height, width, 0.7 * height)
    point = (0.4 * width, 0.0) if width > height else (0.0, 0.4 * height)
    prompt = Prompt([point], box=box)
    scaled = Prompt(
        [(point[0] * across, point[1] * down)], box=tuple(a * b for a, b in zip(box, (across, down) * 2, strict=True))
    )
    (found,) = segment.Segmenter.of(reader.segmenter_from_state(sam.state_dict(), "sam.pth")).segment(image, [prompt])
    row = means(means(image, seen[0], 0), seen[1], 1)
    logits, scores = predicted(sam, row, scaled)
    expected = F.interpolate(logits[None], size=size, mode="bilinear")[0]
    ours = found.logits[: len(expected)]
    assert ours.shape[1:] == size and float(logits.std()) > 0.05
    assert float((ours - expected).abs().max()) < 1e-4 * max(1.0, float(expected.abs().max()))
    assert torch.allclose(found.scores[: len(expected)], scores, atol=1e-4)


@pytest.fixture(autouse=True)
def _previews(tmp_path, monkeypatch) -> None:
    """Where the nodes leave the pictures that they show."""
    monkeypatch.setattr(pack_module("nodes.model_files").folder_paths, "temp_directory", str(tmp_path))


@pytest.fixture(scope="module")
def segmenters(small_sam2) -> dict[str, Any]:
    plain, hq = small_sam().state_dict(), small_sam_hq().state_dict()
    return {
        "sam": segment.Segmenter.of(reader.segmenter_from_state(plain, "sam.pth")),
        "segment-anything": segment.Segmenter.of(reader.segmenter_from_state(plain, "sam.pth", "segment-anything")),
        "sam_hq": segment.Segmenter.of(reader.segmenter_from_state(hq, "sam_hq.pth")),
        "sam2": small_sam2,
    }


def written(height: int, width: int) -> dict[str, dict[str, Any]]:
    """What may be written into, or connected to, Segment for two pictures."""
    point, box = json.dumps([{"x": width - 1, "y": height // 2}]), {"x": 0, "y": 0, "width": width, "height": height}
    rough = torch.zeros(2, height, width)
    rough[:, height // 3 :, : width // 2 + 1] = 1.0
    return {
        "include": {"include": point},
        "exclude": {"include": point, "exclude": json.dumps([{"x": 0, "y": 0}])},
        "drawn": {"drawn": json.dumps([box])},
        "boxes": {"boxes": [[box], []]},
        "rough": {"rough": rough},
        "rough of another size": {"rough": torch.ones(64, 64)},
        "all": {"include": point, "drawn": json.dumps([box]), "boxes": box, "rough": rough},
    }


def run(segmenter: Any, image: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, list[float]]:
    empty = {"include": "", "exclude": "", "drawn": "", "pick": "best", "separate": False}
    masks, scores = nodes.TrueFillSegment.execute(segmenter, image, **{**empty, **inputs}).result
    return masks, json.loads(scores)


def pictures(height: int, width: int) -> torch.Tensor:
    return torch.stack([smooth_picture(height, width, seed) for seed in range(2)])


@pytest.mark.parametrize(
    ("name", "size"),
    [(name, size) for name in ("sam", "sam2") for size in THIN]
    # By the same code as "sam".
    + [(name, size) for name in ("segment-anything", "sam_hq") for size in ((1, 300), (4096, 8), (1, 1))],
    ids=str,
)
def test_segment_makes_masks_of_the_pictures_size(segmenters, name: str, size: tuple[int, int]) -> None:
    kind, inputs = "", {}
    for kind, inputs in written(*size).items():
        masks, scores = run(segmenters[name], pictures(*size), **inputs)
        assert masks.shape == (2, *size) and set(masks.unique().tolist()) <= {0.0, 1.0}, kind
        assert len(scores) == 2 and all(isfinite(score) for score in scores), kind
        # The second picture has no boxes.
        assert (scores[1] == 0.0 and not masks[1].any()) == (kind == "boxes"), kind
    apart, _ = run(segmenters[name], pictures(*size), separate=True, **inputs)
    assert kind == "all" and apart.shape == (4, *size)


@pytest.mark.parametrize("size", THIN, ids=str)
def test_detect_and_mask_from_text(segmenters, small_detector, size: tuple[int, int]) -> None:
    height, width = size
    image = pictures(*size)
    boxes, labels, scores = nodes.TrueFillDetect.execute(small_detector, image, **SEARCH).result
    labels, scores = json.loads(labels), json.loads(scores)
    assert [len(found) for found in boxes] == [len(found) for found in labels] == [len(found) for found in scores]
    assert all(0 < len(found) <= 5 for found in boxes)
    for box in (box for found in boxes for box in found):
        assert box["width"] > 0 and box["height"] > 0 and box["x"] >= 0 and box["y"] >= 0
        assert box["x"] + box["width"] <= width + 1e-3 and box["y"] + box["height"] <= height + 1e-3
    masks, same, _ = nodes.TrueFillMaskFromText.execute(small_detector, segmenters["sam"], image, **SEARCH).result
    assert masks.shape == (2, *size) and same == boxes
    # Segment takes the boxes as they are.
    assert torch.equal(run(segmenters["sam"], image, boxes=boxes)[0], masks)


@pytest.mark.parametrize("size", THIN, ids=str)
def test_points(size: tuple[int, int]) -> None:
    height, width = size
    last, whole = {"x": width - 1, "y": height - 1}, {"x": 0, "y": 0, "width": width, "height": height}
    texts = {"include": json.dumps([last]), "exclude": "[]", "drawn": json.dumps([whole])}
    include, exclude, boxes = nodes.TrueFillPoints.execute(pictures(*size), **texts).result
    assert (json.loads(include), exclude, boxes) == ([last], "", [whole])
    with pytest.raises(
        ValueError, match=rf"'include' has the point .* outside of the picture of {width}x{height} pixels"
    ):
        nodes.TrueFillPoints.execute(pictures(*size), **{**texts, "include": json.dumps([{"x": 0, "y": height}])})
