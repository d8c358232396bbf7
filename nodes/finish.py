"""Step 6: put the result into the picture, without a seam."""

import torch
from comfy_api.latest import io

from ..imaging.edits import EditSettings, align_edits
from ..imaging.harmonize import ColorMode, Harmony, Mode, harmonize_pictures
from ..imaging.masks import log_noise
from ..imaging.pictures import check_pictures
from ..imaging.region import Region, may_change, stitch
from .announce import announcer
from .region import RegionType
from .schema import harmonize_inputs


class TrueFillStitchRegion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillStitchRegion",
            display_name="Stitch Region (TrueFill)",
            category="TrueFill/6 finish",
            description="Puts an inpainted crop back where Crop Region took it from. Outside of the hole and its soft edge the "
            "picture is the original, bit for bit.",
            search_aliases=["inpaint stitch", "crop and stitch", "paste back", "uncrop"],
            inputs=[
                io.Image.Input(
                    "image", tooltip="What was made of the crop. Several pictures for one crop give several results."
                ),
                RegionType.Input("region", tooltip="Where the crop belongs, from Crop Region."),
                *harmonize_inputs("off"),
            ],
            outputs=[
                io.Image.Output(tooltip="The whole picture."),
                io.Mask.Output(
                    tooltip="Where the picture may have changed, for Compare: the hole and its soft edge, all white."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, image: io.Image.Type, region: Region, harmonize: Mode, color: ColorMode, band: int, mixed_gradients: bool
    ) -> io.NodeOutput:
        harmony = Harmony(mode=harmonize, color=color, band=band, mixed=mixed_gradients)
        stitched = stitch(region, image, harmony, name="'image'")
        return io.NodeOutput(stitched, may_change(region, len(stitched)))


class TrueFillHarmonize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillHarmonize",
            display_name="Harmonize (TrueFill)",
            category="TrueFill/6 finish",
            description="Puts an inpainted picture into the original without a change of tone at the edge of the hole. "
            "Outside of the mask the result is the original, bit for bit.",
            search_aliases=[
                "color match",
                "colour match",
                "poisson blending",
                "seamless clone",
                "seamless paste",
                "composite",
            ],
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="The whole generated picture, as it comes from VAE Decode, not composited yet: what it shows around "
                    "the hole is compared with the original.",
                ),
                io.Image.Input("original", tooltip="The picture that was inpainted, of the same size."),
                io.Mask.Input("mask", tooltip="The hole: white is taken from the image, gray is mixed."),
                *harmonize_inputs("both"),
            ],
            outputs=[io.Image.Output(tooltip="The finished picture.")],
        )

    @classmethod
    def execute(
        cls,
        image: io.Image.Type,
        original: io.Image.Type,
        mask: io.Mask.Type,
        harmonize: Mode,
        color: ColorMode,
        band: int,
        mixed_gradients: bool,
    ) -> io.NodeOutput:
        check_pictures(image, "'image'")
        check_pictures(original, "'original'")
        log_noise("Harmonize", mask=mask)
        harmony = Harmony(mode=harmonize, color=color, band=band, mixed=mixed_gradients)
        return io.NodeOutput(harmonize_pictures(image, original, mask, harmony))


class TrueFillAlignEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillAlignEdit",
            display_name="Align Edit (TrueFill)",
            category="TrueFill/6 finish",
            description="What an edit model (Kontext, Qwen-Image-Edit, Klein ...) was asked to change, and nothing else: lays "
            "its picture over the original, to a tenth of a pixel, takes its tone back, finds what really changed, and keeps "
            "the original everywhere else, bit for bit.",
            search_aliases=[
                "edit drift",
                "pixel shift",
                "zoom",
                "color shift",
                "color match",
                "register images",
                "difference mask",
                "change mask",
                "kontext",
                "qwen edit",
            ],
            inputs=[
                io.Image.Input("original", tooltip="The picture that was edited, of any size."),
                io.Image.Input(
                    "edited", tooltip="What the edit model made of it, of any size, as it comes from VAE Decode."
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="What may change: all of it is taken from the edit. Without it the change is found by comparing.",
                ),
                io.Boolean.Input(
                    "match_tone",
                    default=True,
                    tooltip="Gives the edit the original's tone, by what did not change. Off where the tone was to be edited.",
                ),
                io.Float.Input(
                    "sensitivity",
                    default=1.0,
                    min=0.1,
                    max=10.0,
                    step=0.1,
                    tooltip="Higher finds fainter changes, lower only clear ones. Not used with a mask.",
                ),
                io.Int.Input(
                    "grow",
                    default=4,
                    min=0,
                    max=256,
                    advanced=True,
                    tooltip="Pixels by which what was found is widened. Not used with a mask.",
                ),
                io.Int.Input(
                    "feather",
                    default=8,
                    min=0,
                    max=256,
                    advanced=True,
                    tooltip="Pixels of soft edge outside of it. Not used with a mask, whose gray is its soft edge.",
                ),
                *harmonize_inputs("color"),
            ],
            outputs=[
                io.Image.Output(tooltip="The original with what changed."),
                io.Image.Output(display_name="ALIGNED", tooltip="The whole edit, over the original, in its tone."),
                io.Mask.Output(tooltip="How much of the edit was taken, for Compare and for other nodes."),
                io.String.Output(
                    display_name="REPORT",
                    tooltip="By how much the edit was shifted and scaled, its tone, and the change.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        original: io.Image.Type,
        edited: io.Image.Type,
        match_tone: bool,
        sensitivity: float,
        grow: int,
        feather: int,
        harmonize: Mode,
        color: ColorMode,
        band: int,
        mixed_gradients: bool,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        check_pictures(original, "'original'")
        check_pictures(edited, "'edited'")
        log_noise("Align Edit", mask=mask)
        harmony = Harmony(mode=harmonize, color=color, band=band, mixed=mixed_gradients)
        settings = EditSettings(
            match_tone=match_tone, sensitivity=sensitivity, grow=grow, feather=feather, harmony=harmony
        )
        made = align_edits(original, edited, mask, settings)
        announcer(cls.hidden.unique_id)(f"Align Edit: {made.report}")
        return io.NodeOutput(made.pictures, made.aligned, made.masks, made.report)


NODES = [TrueFillStitchRegion, TrueFillHarmonize, TrueFillAlignEdit]
