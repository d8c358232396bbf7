"""Step 1: what shall change."""

from typing import get_args

from comfy_api.latest import io

from ..imaging import morphology
from ..imaging.examples import EXAMPLES, load_example
from ..imaging.mask_shapes import Shape, mask_shape
from ..imaging.masks import log_noise


class TrueFillExamplePhoto(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillExamplePhoto",
            display_name="Example Photo (TrueFill)",
            category="TrueFill/1 mask",
            description="A picture that ships with TrueFill, with a hole to fill, so that a workflow runs before you have "
            "picked one of yours. Replace it by Load Image: paint the hole there with Open in MaskEditor.",
            search_aliases=["demo image", "sample image", "test picture", "load image"],
            inputs=[io.Combo.Input("photo", options=list(EXAMPLES), tooltip="Which picture.")],
            outputs=[
                io.Image.Output(tooltip="The picture."),
                io.Mask.Output(
                    tooltip="Its hole: 1 where the picture shall change. Of coffee cup and toy subject, where the subject is."
                ),
            ],
        )

    @classmethod
    def execute(cls, photo: str) -> io.NodeOutput:
        return io.NodeOutput(*load_example(photo))


def _mask_input(text: str = "The mask: white is hole.") -> io.Mask.Input:
    return io.Mask.Input("mask", tooltip=text)


class TrueFillGrowMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillGrowMask",
            display_name="Grow Mask (TrueFill)",
            category="TrueFill/1 mask",
            description="Grows the hole by so many pixels in every direction, or shrinks it: round corners, true distance, exact "
            "to the pixel. Gray edges keep their gray.",
            search_aliases=["expand mask", "shrink mask", "dilate", "erode", "grow mask", "mask offset"],
            inputs=[
                _mask_input(),
                io.Float.Input(
                    "pixels",
                    default=16.0,
                    min=-4096.0,
                    max=4096.0,
                    step=1.0,
                    round=0.01,
                    tooltip="How far the hole grows; a negative number shrinks it.",
                ),
            ],
            outputs=[io.Mask.Output(tooltip="The grown mask.")],
        )

    @classmethod
    def execute(cls, mask: io.Mask.Type, pixels: float) -> io.NodeOutput:
        log_noise("Grow Mask", mask=mask)
        return io.NodeOutput(morphology.grow(mask, pixels)[:, 0])


class TrueFillFeatherMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillFeatherMask",
            display_name="Feather Mask (TrueFill)",
            category="TrueFill/1 mask",
            description="Softens the edge of the hole over so many pixels of true distance, on the side you choose.",
            search_aliases=["blur mask", "soften mask", "mask falloff", "feather"],
            inputs=[
                _mask_input("The mask: all that is not black is hole, gray like white."),
                io.Float.Input(
                    "pixels",
                    default=16.0,
                    min=0.0,
                    max=4096.0,
                    step=1.0,
                    round=0.01,
                    tooltip="Width of the soft edge. 0 leaves the mask as it is.",
                ),
                io.Combo.Input(
                    "where",
                    options=list(get_args(morphology.Where)),
                    default="outside",
                    tooltip="outside: the whole hole stays white and the softness reaches into the known picture. inside: "
                    "nothing known is touched; a narrow hole does not get fully white. centered: half of each.",
                ),
                io.Combo.Input(
                    "curve",
                    options=list(get_args(morphology.Curve)),
                    default="smooth",
                    tooltip="smooth starts and ends flat, linear is a straight ramp.",
                ),
            ],
            outputs=[io.Mask.Output(tooltip="The feathered mask.")],
        )

    @classmethod
    def execute(
        cls, mask: io.Mask.Type, pixels: float, where: morphology.Where, curve: morphology.Curve
    ) -> io.NodeOutput:
        log_noise("Feather Mask", mask=mask)
        return io.NodeOutput(morphology.feather(mask, pixels, where, curve)[:, 0])


class TrueFillCleanMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillCleanMask",
            display_name="Clean Mask (TrueFill)",
            category="TrueFill/1 mask",
            description="Makes a mask from a detector or a quick brush usable: removes specks, closes islands, smooths the "
            "outline, and, if you like, turns it into its box or convex hull.",
            search_aliases=[
                "fix mask",
                "fill mask holes",
                "remove small regions",
                "stabilize mask",
                "mask bounding box",
                "convex hull",
            ],
            inputs=[
                _mask_input(),
                io.Int.Input(
                    "remove_specks",
                    default=64,
                    min=0,
                    max=2**24,
                    tooltip="Parts of the hole with fewer pixels than this vanish. 0 keeps all.",
                ),
                io.Int.Input(
                    "fill_islands",
                    default=2**24,
                    min=0,
                    max=2**24,
                    tooltip="Known islands inside the hole of up to so many pixels become hole. 0 keeps all of them.",
                ),
                io.Float.Input(
                    "smooth",
                    default=0.0,
                    min=0.0,
                    max=512.0,
                    step=1.0,
                    round=0.01,
                    tooltip="Radius in pixels: thinner whiskers are cut off and narrower gaps closed. 0 leaves "
                    "the outline as it is.",
                ),
                io.Combo.Input(
                    "shape",
                    options=list(get_args(morphology.Shape)),
                    default="as it is",
                    tooltip="What the hole of each picture is turned into at the end.",
                ),
            ],
            outputs=[io.Mask.Output(tooltip="The cleaned mask.")],
        )

    @classmethod
    def execute(
        cls, mask: io.Mask.Type, remove_specks: int, fill_islands: int, smooth: float, shape: morphology.Shape
    ) -> io.NodeOutput:
        log_noise("Clean Mask", mask=mask)
        return io.NodeOutput(morphology.clean(mask, remove_specks, fill_islands, smooth, shape)[:, 0])


class TrueFillMaskShape(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillMaskShape",
            display_name="Mask Shape (TrueFill)",
            category="TrueFill/1 mask",
            description="Turns a mask that follows an object into one such as people draw: a box, a brushed outline, a hull, a "
            "scribble. PainterNet's mask generator; an exact outline makes a model draw the same shape again.",
            search_aliases=[
                "painternet",
                "random mask",
                "box mask",
                "irregular mask",
                "scribble",
                "brush mask",
                "augment",
            ],
            inputs=[
                _mask_input("The mask of an object; everything that is not black counts."),
                io.Combo.Input(
                    "shape",
                    options=list(get_args(Shape)),
                    default="irregular",
                    tooltip="painternet: for each picture one of box, irregular and as it is, at 25, 50 and 25 %, as that method "
                    "was trained. irregular: grown and painted over. scribble: one quick stroke to and fro.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Seed of the random numbers. Each picture of a batch has its own.",
                ),
                io.Float.Input(
                    "growth",
                    default=0.25,
                    min=0.0,
                    max=4.0,
                    step=0.05,
                    tooltip="For box: each side moves out by a random part of up to this much of the box's side.",
                ),
                io.Int.Input(
                    "strokes", default=4, min=0, max=64, tooltip="For irregular: how often it is painted over, at most."
                ),
            ],
            outputs=[io.Mask.Output(tooltip="The new mask.")],
        )

    @classmethod
    def execute(cls, mask: io.Mask.Type, shape: Shape, seed: int, growth: float, strokes: int) -> io.NodeOutput:
        log_noise("Mask Shape", mask=mask)
        return io.NodeOutput(mask_shape(mask, shape, seed, growth, strokes)[:, 0])


NODES = [TrueFillExamplePhoto, TrueFillGrowMask, TrueFillFeatherMask, TrueFillCleanMask, TrueFillMaskShape]
