"""Step 6: put the result into the picture, without a seam."""

from comfy_api.latest import io

from ..imaging.harmonize import ColorMode, Harmony, Mode, harmonize_pictures
from ..imaging.masks import log_noise
from ..imaging.pictures import check_pictures
from ..imaging.region import Region, may_change, stitch
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


NODES = [TrueFillStitchRegion, TrueFillHarmonize]
