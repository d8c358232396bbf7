"""Step 1, by words: boxes and masks of what a text names."""

import json
from dataclasses import dataclass

import torch
from comfy_api.latest import io, ui
from typing_extensions import Self, TypedDict, Unpack

from ..imaging.detections import PICKS, Choice, Detection, Pick, shown, split_phrases
from ..selection.detectors import Detector, detect_batch
from ..selection.segmenters import Prompt, Segmenter, segment_batch
from ..weights.detectors import WHERE_TO_GET, read_detector
from ..weights.engines import GROUNDING_DINO, TRANSFORMERS
from ..weights.grounding_dino import tokenizer
from .model_files import ModelFiles
from .schema import engine_input
from .selection import SegmenterType

FILES = ModelFiles(("grounding-dino", "groundingdino"), "Grounding DINO", WHERE_TO_GET)

DetectorType = io.Custom("DETECTOR")


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
                    options=FILES.names(),
                    tooltip="The file, in models/grounding-dino or models/groundingdino: .pth, .pt or .safetensors.",
                ),
                engine_input(GROUNDING_DINO),
            ],
            outputs=[DetectorType.Output(display_name="DETECTOR", tooltip="For Detect and Mask From Text.")],
        )

    @classmethod
    def validate_inputs(cls, detector: str | None = None, engine: str | None = None) -> bool | str:
        found = FILES.check(detector)
        return found if isinstance(found, str) else GROUNDING_DINO.check(engine)

    @classmethod
    def execute(cls, detector: str, engine: str = TRANSFORMERS) -> io.NodeOutput:
        return io.NodeOutput(Detector.of(read_detector(FILES.path(detector), engine), tokenizer()))


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
            tooltip="How sure the detector has to be. Lower finds more, and more that is wrong.",
        ),
        io.Combo.Input(
            "pick",
            options=list(PICKS),
            default="all",
            tooltip="Which of the things that were found. by index: the one at 'index' in the order of their scores.",
        ),
        io.Int.Input("index", default=0, min=0, max=899, tooltip="For 'by index': 0 is the best.", advanced=True),
        io.Int.Input(
            "count",
            default=16,
            min=1,
            max=900,
            tooltip="For 'all': not more than so many, the best ones.",
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
            tooltip="Least area of a box, in percent of the picture.",
            advanced=True,
        ),
        io.Float.Input(
            "largest",
            default=100.0,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="Greatest area of a box, in percent of the picture: 90 leaves out boxes around everything.",
            advanced=True,
        ),
    ]


def _boxes_output() -> io.Output:
    return io.BoundingBox.Output(
        display_name="boxes", tooltip="For each picture the boxes that were found: for Segment, SAM3 Detect and others."
    )


def _labels_output() -> io.Output:
    return io.String.Output(
        display_name="labels", tooltip='For each picture which phrase found each box, as text: [["red cup", "spoon"]].'
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


@dataclass(frozen=True)
class Result:
    """What a search found in each picture of a batch."""

    phrases: list[str]
    each: list[list[Detection]]

    @classmethod
    def of(cls, detector: Detector, pictures: torch.Tensor, search: Search) -> Self:
        phrases = split_phrases(search["text"])
        if search["smallest"] > search["largest"]:
            raise ValueError(
                f"'smallest' ({search['smallest']:g} %) is greater than 'largest' ({search['largest']:g} %): no box can have "
                "such an area."
            )
        choice = Choice(
            threshold=search["threshold"],
            overlap=search["overlap"],
            smallest=search["smallest"] / 100.0,
            largest=search["largest"] / 100.0,
            pick=search["pick"],
            index=search["index"],
            count=search["count"],
        )
        return cls(phrases, detect_batch(detector, pictures, phrases, choice))

    @property
    def boxes(self) -> list[list[dict[str, float | str]]]:
        return [[one.bounding_box for one in found] for found in self.each]

    @property
    def labels(self) -> str:
        return json.dumps([[one.label for one in found] for found in self.each])

    @property
    def scores(self) -> str:
        return json.dumps([[round(one.score, 4) for one in found] for found in self.each])

    def preview(self, pictures: torch.Tensor, masks: torch.Tensor | None = None) -> ui.PreviewImage:
        """The first picture."""
        mask = None if masks is None else masks[0]
        return ui.PreviewImage(shown(pictures[0], self.each[0], self.phrases, mask))


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
                DetectorType.Input("detector", tooltip="From Load Detector."),
                io.Image.Input("image", tooltip="The picture; of a batch each one by itself."),
                *_search_inputs(),
            ],
            outputs=[
                _boxes_output(),
                _labels_output(),
                io.String.Output(
                    display_name="scores", tooltip="How sure the detector is of each, as text: [[0.71, 0.45]]."
                ),
            ],
        )

    @classmethod
    def execute(cls, detector: Detector, image: io.Image.Type, **search: Unpack[Search]) -> io.NodeOutput:
        result = Result.of(detector, image, search)
        return io.NodeOutput(result.boxes, result.labels, result.scores, ui=result.preview(image))


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
                DetectorType.Input("detector", tooltip="From Load Detector."),
                SegmenterType.Input("segmenter", tooltip="From Load Segmenter."),
                io.Image.Input("image", tooltip="The picture; of a batch each one by itself."),
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
        result = Result.of(detector, image, search)
        prompts = [[Prompt(box=one.box) for one in found] for found in result.each]
        masks, _ = segment_batch(segmenter, image, prompts, "best")
        return io.NodeOutput(masks, result.boxes, result.labels, ui=result.preview(image, masks))
