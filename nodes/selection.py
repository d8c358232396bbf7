"""Step 1, by pointing or by words: boxes and masks from points, boxes, a rough mask, or what a text names."""

import json
from typing import Any, get_args

from comfy_api.latest import io, ui
from typing_extensions import TypedDict, Unpack

from ..imaging.detections import PICKS, Choice, Pick, split_phrases
from ..imaging.masks import log_noise
from ..imaging.pictures import check_pictures
from ..imaging.prompts import as_bounding_box, check_touching, parse_boxes, parse_marks
from ..selection.detectors import Detector, detect_batch
from ..selection.segmenters import Pick as SegmentPick
from ..selection.segmenters import Prompt, Segmenter, batch_prompts, segment_batch
from ..weights import demo_model, detectors, segmenters
from ..weights.engines import GROUNDING_DINO, SEGMENT_ANYTHING, TRANSFORMERS
from ..weights.grounding_dino import tokenizer
from .model_files import ModelFiles
from .schema import engine_input

DEMO = "demo"
SEGMENTERS = ModelFiles(
    ("sams", "sam2"),
    "Segment Anything",
    segmenters.WHERE_TO_GET,
    {DEMO: demo_model.FOLDER / demo_model.SEGMENTER_FILE},
)
DETECTORS = ModelFiles(("grounding-dino", "groundingdino"), "Grounding DINO", detectors.WHERE_TO_GET)

SegmenterType = io.Custom("SEGMENTER")
DetectorType = io.Custom("DETECTOR")


def _mark_inputs() -> list[io.Input]:
    """What the editor in the node writes; by hand, or from another node, it works as well."""
    return [
        io.String.Input(
            "include",
            default="",
            tooltip='Points on the thing, in pixels: [{"x": 120, "y": 80}]. All pictures of a batch have the same. In the '
            "editor, click.",
        ),
        io.String.Input(
            "exclude",
            default="",
            tooltip="Points beside the thing, in the same format as 'include'. In the editor, right-click.",
        ),
        io.String.Input(
            "drawn",
            default="",
            tooltip='Boxes around things: [{"x": 100, "y": 60, "width": 50, "height": 40}]. In the editor, drag.',
        ),
    ]


class TrueFillLoadSegmenter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillLoadSegmenter",
            display_name="Load Segmenter (TrueFill)",
            category="TrueFill/0 load",
            description="Loads a Segment Anything (ViT-B, L or H), SAM-HQ or SAM 2 model, for Segment and Mask From Text.",
            search_aliases=["sam", "segment anything", "sam loader", "load sam", "sam2", "sam hq", "high quality sam"],
            inputs=[
                io.Combo.Input(
                    "segmenter",
                    options=SEGMENTERS.names(),
                    # Not the demo's, which knows no photo.
                    default=next((name for name in SEGMENTERS.names() if name != DEMO), "sam_vit_b_01ec64.pth"),
                    tooltip="The file, in models/sams or models/sam2: .pth, .pt or .safetensors. Its contents tell what it is. "
                    "demo: ships with the pack, and knows only the demo model's world.",
                ),
                engine_input(SEGMENT_ANYTHING),
            ],
            outputs=[
                SegmenterType.Output(display_name="SEGMENTER", tooltip="The segmenter, for Segment and Mask From Text.")
            ],
        )

    @classmethod
    def validate_inputs(cls, segmenter: str | None = None, engine: str | None = None) -> bool | str:
        found = SEGMENTERS.check(segmenter)
        return found if isinstance(found, str) else SEGMENT_ANYTHING.check(engine)

    @classmethod
    def execute(cls, segmenter: str, engine: str = TRANSFORMERS) -> io.NodeOutput:
        # The package mixes its weights with float32.
        return io.NodeOutput(
            Segmenter.of(segmenters.read_segmenter(SEGMENTERS.path(segmenter), engine), half=engine == TRANSFORMERS)
        )


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
                SegmenterType.Input("segmenter", tooltip="The segmenter, from Load Segmenter."),
                io.Image.Input("image", tooltip="The picture. In a batch, each one is segmented by itself."),
                *_mark_inputs(),
                io.Combo.Input(
                    "pick",
                    options=list(get_args(SegmentPick)),
                    default="best",
                    tooltip="Which of the model's three answers counts: mostly a part, a larger part and the whole. best: the "
                    "one it is surest of. smallest, middle, largest: by area. all together: what is in any of them.",
                ),
                io.Boolean.Input(
                    "separate",
                    default=False,
                    tooltip="Off: one mask for each picture. On: one mask for each box; without boxes, one for the points.",
                ),
                io.BoundingBox.Input(
                    "boxes",
                    optional=True,
                    force_input=True,
                    tooltip="Boxes around things, from any node with bounding boxes. Points inside of a box are about what is in "
                    "it.",
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
        pick: SegmentPick,
        separate: bool,
        boxes: Any = None,
        rough: io.Mask.Type | None = None,
    ) -> io.NodeOutput:
        check_pictures(image, "'image'")
        pictures, height, width = image.shape[:3]
        marks = parse_marks(include, exclude, drawn, width, height)
        each = parse_boxes(boxes, pictures, "boxes")
        for found in each:
            check_touching(found, width, height, "boxes")
        if not marks.include and not marks.drawn and boxes is None and rough is None:
            raise ValueError(
                "Nothing says where the thing is: click on it ('include'), drag a box around it ('drawn'), or connect 'boxes' or "
                "'rough'."
            )
        log_noise("Segment", rough=rough)
        masks, scores = segment_batch(segmenter, image, batch_prompts(marks, each, rough), pick, separate)
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
                io.Image.Input("image", tooltip="The picture to click on: the first one of a batch."),
                *_mark_inputs(),
            ],
            outputs=[
                io.String.Output(
                    display_name="include", tooltip="Points on the thing, as text: SAM3 Detect's positive_coords."
                ),
                io.String.Output(
                    display_name="exclude", tooltip="Points beside it, as text: SAM3 Detect's negative_coords."
                ),
                io.BoundingBox.Output(display_name="boxes", tooltip="The boxes of 'drawn': SAM3 Detect's bboxes."),
            ],
        )

    @classmethod
    def execute(cls, image: io.Image.Type, include: str, exclude: str, drawn: str) -> io.NodeOutput:
        check_pictures(image, "'image'")
        height, width = image.shape[1:3]
        marks = parse_marks(include, exclude, drawn, width, height)
        # The texts as they came; an empty list is no text.
        texts = include if marks.include else "", exclude if marks.exclude else ""
        boxes = [as_bounding_box(box) for box in marks.drawn]
        return io.NodeOutput(*texts, boxes, ui={"picture": ui.PreviewImage(image[:1]).values})


class TrueFillLoadDetector(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillLoadDetector",
            display_name="Load Detector (TrueFill)",
            category="TrueFill/0 load",
            description="Loads a Grounding DINO model (Swin-T or Swin-B) for Detect and Mask From Text.",
            search_aliases=["grounding dino", "groundingdino", "text detector", "load grounding dino"],
            inputs=[
                io.Combo.Input(
                    "detector",
                    options=DETECTORS.names(),
                    tooltip="The file, in models/grounding-dino or models/groundingdino: .pth, .pt or .safetensors.",
                ),
                engine_input(GROUNDING_DINO),
            ],
            outputs=[
                DetectorType.Output(display_name="DETECTOR", tooltip="The detector, for Detect and Mask From Text.")
            ],
        )

    @classmethod
    def validate_inputs(cls, detector: str | None = None, engine: str | None = None) -> bool | str:
        found = DETECTORS.check(detector)
        return found if isinstance(found, str) else GROUNDING_DINO.check(engine)

    @classmethod
    def execute(cls, detector: str, engine: str = TRANSFORMERS) -> io.NodeOutput:
        return io.NodeOutput(Detector.of(detectors.read_detector(DETECTORS.path(detector), engine), tokenizer()))


def _search_inputs() -> list[io.Input]:
    return [
        io.String.Input(
            "text",
            default="",
            tooltip="What to look for, in English: one phrase or several with full stops between: red cup. spoon.",
        ),
        io.Float.Input(
            "threshold",
            default=0.3,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="The score that a thing must be above to count. A lower one finds more, and more that is wrong.",
        ),
        io.Combo.Input(
            "pick",
            options=list(PICKS),
            default="all",
            tooltip="Which of the things that were found count. all: the best ones, up to 'count'. largest, smallest: by the "
            "area of the box. by index: the one at 'index' in the order of their scores.",
        ),
        io.Int.Input(
            "index",
            default=0,
            min=0,
            max=899,
            tooltip="The place that 'by index' picks, in the order of the scores: 0 is the best.",
            advanced=True,
        ),
        io.Int.Input(
            "count",
            default=16,
            min=1,
            max=900,
            tooltip="How many things 'all' picks at most: the best ones.",
            advanced=True,
        ),
        io.Float.Input(
            "overlap",
            default=0.8,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Two boxes that share more than this (intersection over union) are one thing: the better one stays.",
            advanced=True,
        ),
        io.Float.Input(
            "smallest",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="The least area that a box may have, in percent of the picture.",
            advanced=True,
        ),
        io.Float.Input(
            "largest",
            default=100.0,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="The greatest area that a box may have, in percent of the picture: 90 leaves out boxes around everything.",
            advanced=True,
        ),
    ]


def _boxes_output() -> io.Output:
    return io.BoundingBox.Output(
        display_name="boxes", tooltip="The boxes that were found in each picture, for Segment, SAM3 Detect and others."
    )


def _labels_output() -> io.Output:
    return io.String.Output(
        display_name="labels",
        tooltip='The phrase that found each box of each picture, as text: [["red cup", "spoon"]].',
    )


class Search(TypedDict):
    """The values of `_search_inputs`."""

    text: str
    threshold: float
    pick: Pick
    index: int
    count: int
    overlap: float
    smallest: float
    largest: float


def _choice(search: Search) -> Choice:
    if search["smallest"] > search["largest"]:
        raise ValueError(
            f"'smallest' ({search['smallest']:g} %) is greater than 'largest' ({search['largest']:g} %): no box can have such an "
            "area."
        )
    return Choice(
        threshold=search["threshold"],
        overlap=search["overlap"],
        smallest=search["smallest"] / 100.0,
        largest=search["largest"] / 100.0,
        pick=search["pick"],
        index=search["index"],
        count=search["count"],
    )


class TrueFillDetect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillDetect",
            display_name="Detect (TrueFill)",
            category="TrueFill/1 mask",
            description="Boxes around what a text names. The picture under the node shows them, or says that there are none.",
            search_aliases=["grounding dino", "text to box", "find object", "bounding box", "object detection"],
            inputs=[
                DetectorType.Input("detector", tooltip="The detector, from Load Detector."),
                io.Image.Input("image", tooltip="The picture. In a batch, each one is searched by itself."),
                *_search_inputs(),
            ],
            outputs=[
                _boxes_output(),
                _labels_output(),
                io.String.Output(
                    display_name="scores", tooltip="How sure the detector is of each box, as text: [[0.71, 0.45]]."
                ),
            ],
        )

    @classmethod
    def execute(cls, detector: Detector, image: io.Image.Type, **search: Unpack[Search]) -> io.NodeOutput:
        found = detect_batch(detector, image, split_phrases(search["text"]), _choice(search))
        shown = ui.PreviewImage(found.preview(image))
        return io.NodeOutput(found.boxes, found.labels, found.scores, ui=shown)


class TrueFillMaskFromText(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillMaskFromText",
            display_name="Mask From Text (TrueFill)",
            category="TrueFill/1 mask",
            description="The mask of what a text names: Detect and Segment in one node. Where nothing is found the mask is "
            "empty, and the picture under the node says so.",
            search_aliases=[
                "grounding dino sam",
                "grounded sam",
                "text to mask",
                "clipseg",
                "mask by prompt",
                "find object",
            ],
            inputs=[
                DetectorType.Input("detector", tooltip="The detector, from Load Detector."),
                SegmenterType.Input("segmenter", tooltip="The segmenter, from Load Segmenter."),
                io.Image.Input("image", tooltip="The picture. In a batch, each one is searched by itself."),
                *_search_inputs(),
            ],
            outputs=[
                io.Mask.Output(tooltip="White is what was found, all of it in one mask for each picture."),
                _boxes_output(),
                _labels_output(),
            ],
        )

    @classmethod
    def execute(
        cls, detector: Detector, segmenter: Segmenter, image: io.Image.Type, **search: Unpack[Search]
    ) -> io.NodeOutput:
        found = detect_batch(detector, image, split_phrases(search["text"]), _choice(search))
        prompts = [[Prompt(box=thing.box) for thing in things] for things in found.each]
        masks, _ = segment_batch(segmenter, image, prompts, "best")
        shown = ui.PreviewImage(found.preview(image, masks))
        return io.NodeOutput(masks, found.boxes, found.labels, ui=shown)


NODES = [
    TrueFillLoadSegmenter,
    TrueFillLoadDetector,
    TrueFillPoints,
    TrueFillSegment,
    TrueFillDetect,
    TrueFillMaskFromText,
]
