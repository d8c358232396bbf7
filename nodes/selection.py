"""Step 1, by pointing: a mask from points, boxes or a rough mask."""

import json
from typing import Any, get_args

from comfy_api.latest import io, ui

from ..imaging.masks import as_mask_batch
from ..imaging.prompts import as_bounding_box, check_inside, check_touching, parse_boxes, parse_drawn, parse_points
from ..selection.segmenters import Pick, Segmenter, prompts_for, segment_batch
from ..weights import demo_model
from ..weights.engines import SEGMENT_ANYTHING, TRANSFORMERS
from ..weights.segmenters import WHERE_TO_GET, read_segmenter
from .model_files import ModelFiles
from .schema import engine_input

DEMO = "demo"
FILES = ModelFiles(
    ("sams", "sam2"),
    "Segment Anything",
    WHERE_TO_GET,
    {DEMO: demo_model.FOLDER / demo_model.SEGMENTER_FILE},
)

SegmenterType = io.Custom("SEGMENTER")


def _mark_inputs() -> list[io.Input]:
    """What the editor in the node writes; by hand, or from another node, it works as well."""
    return [
        io.String.Input(
            "include",
            default="",
            tooltip='Points on the thing, in pixels: [{"x": 120, "y": 80}]. The same for all pictures of a batch. In the editor: '
            "click.",
        ),
        io.String.Input(
            "exclude", default="", tooltip="Points beside the thing, in the same format. In the editor: right click."
        ),
        io.String.Input(
            "drawn",
            default="",
            tooltip='Boxes around things: [{"x": 100, "y": 60, "width": 50, "height": 40}]. In the editor: drag.',
        ),
    ]


class TrueFillLoadSegmenter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillLoadSegmenter",
            display_name="Load Segmenter (TrueFill)",
            category="TrueFill/0 load",
            description="Loads a Segment Anything (ViT-B, L or H), SAM-HQ or SAM 2 model, for Segment.",
            search_aliases=["sam", "segment anything", "sam loader", "load sam", "sam2", "sam hq", "high quality sam"],
            inputs=[
                io.Combo.Input(
                    "segmenter",
                    options=FILES.names(),
                    # Not the demo's, which knows no photo.
                    default=next((name for name in FILES.names() if name != DEMO), "sam_vit_b_01ec64.pth"),
                    tooltip="The file, in models/sams or models/sam2: .pth, .pt or .safetensors. Its contents tell what it is. "
                    "demo: ships with the pack, and knows only the demo model's world.",
                ),
                engine_input(SEGMENT_ANYTHING),
            ],
            outputs=[SegmenterType.Output(display_name="SEGMENTER", tooltip="For Segment.")],
        )

    @classmethod
    def validate_inputs(cls, segmenter: str | None = None, engine: str | None = None) -> bool | str:
        found = FILES.check(segmenter)
        return found if isinstance(found, str) else SEGMENT_ANYTHING.check(engine)

    @classmethod
    def execute(cls, segmenter: str, engine: str = TRANSFORMERS) -> io.NodeOutput:
        # The package mixes its weights with float32.
        return io.NodeOutput(Segmenter.of(read_segmenter(FILES.path(segmenter), engine), half=engine == TRANSFORMERS))


class TrueFillSegment(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillSegment",
            display_name="Segment (TrueFill)",
            category="TrueFill/1 mask",
            description="The mask of what you point at: points on it, points beside it, a box around it, or a rough mask to make "
            "exact. The picture is looked at once; another point takes a moment.",
            search_aliases=[
                "sam",
                "segment anything",
                "click",
                "points to mask",
                "box to mask",
                "refine mask",
                "select object",
            ],
            inputs=[
                SegmenterType.Input("segmenter", tooltip="From Load Segmenter."),
                io.Image.Input("image", tooltip="The picture; of a batch each one by itself."),
                *_mark_inputs(),
                io.Combo.Input(
                    "pick",
                    options=list(get_args(Pick)),
                    default="best",
                    tooltip="The model has three answers, a part, a larger part and the whole. best: the one it is surest of.",
                ),
                io.Boolean.Input(
                    "separate",
                    default=False,
                    tooltip="Off: one mask for each picture. On: one for each box (and for the points, without boxes).",
                ),
                io.BoundingBox.Input(
                    "boxes",
                    optional=True,
                    force_input=True,
                    tooltip="One mask for each box; points inside of a box are about what is in it. From any node with bounding "
                    "boxes.",
                ),
                io.Mask.Input(
                    "rough",
                    optional=True,
                    tooltip="A rough mask of the thing, of any size: it is made to follow the thing's outline.",
                ),
            ],
            outputs=[
                io.Mask.Output(tooltip="White is the thing; empty where there is nothing to find."),
                io.String.Output(
                    display_name="scores", tooltip="How good the model thinks each mask is, as text: [0.97, ...]."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        segmenter: Segmenter,
        image: io.Image.Type,
        include: str,
        exclude: str,
        drawn: str,
        pick: Pick,
        separate: bool,
        boxes: Any = None,
        rough: io.Mask.Type | None = None,
    ) -> io.NodeOutput:
        pictures, height, width = image.shape[:3]
        points = {"include": parse_points(include, "include"), "exclude": parse_points(exclude, "exclude")}
        for name, found in points.items():
            check_inside(found, width, height, name)
        own, others = parse_drawn(drawn, "drawn"), parse_boxes(boxes, pictures, "boxes")
        check_touching(own, width, height, "drawn")
        for found in others:
            check_touching(found, width, height, "boxes")
        each = [[*own, *found] for found in others]
        roughs = None if rough is None else as_mask_batch(rough)
        if roughs is not None and len(roughs) not in (1, pictures):
            raise ValueError(
                f"'rough' has {len(roughs)} masks for {pictures} pictures: connect one mask, or one for each."
            )
        if not points["include"] and not own and boxes is None and roughs is None:
            raise ValueError(
                "Nothing says where the thing is: click on it, drag a box around it, or connect 'boxes' or 'rough'."
            )
        prompts = [
            prompts_for(
                points["include"],
                points["exclude"],
                each[index],
                None if roughs is None else roughs[min(index, len(roughs) - 1), 0],
            )
            for index in range(pictures)
        ]
        masks, scores = segment_batch(segmenter, image, prompts, pick, separate)
        shown = {"picture": ui.PreviewImage(image[:1]).values, "mask": ui.PreviewMask(masks[:1]).values}
        return io.NodeOutput(masks, json.dumps([round(score, 4) for score in scores]), ui=shown)


class TrueFillPoints(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillPoints",
            display_name="Points (TrueFill)",
            category="TrueFill/1 mask",
            description="Points and boxes, set by clicking on the picture, for any node that takes them: ComfyUI's SAM3 Detect, "
            "Segment, and others with points as text or bounding boxes.",
            search_aliases=["points editor", "click", "coordinates", "bounding box editor", "sam3 points"],
            inputs=[
                io.Image.Input("image", tooltip="The picture to click on."),
                *_mark_inputs(),
            ],
            outputs=[
                io.String.Output(
                    display_name="include", tooltip="Points on the thing, as text: SAM3 Detect's positive_coords."
                ),
                io.String.Output(display_name="exclude", tooltip="Points beside it: SAM3 Detect's negative_coords."),
                io.BoundingBox.Output(display_name="boxes", tooltip="The boxes."),
            ],
        )

    @classmethod
    def execute(cls, image: io.Image.Type, include: str, exclude: str, drawn: str) -> io.NodeOutput:
        height, width = image.shape[1:3]
        texts = []
        for name, text in (("include", include), ("exclude", exclude)):
            points = parse_points(text, name)
            check_inside(points, width, height, name)
            texts.append(text if points else "")
        own = parse_drawn(drawn, "drawn")
        check_touching(own, width, height, "drawn")
        boxes = [as_bounding_box(box) for box in own]
        return io.NodeOutput(*texts, boxes, ui={"picture": ui.PreviewImage(image[:1]).values})
