"""Step 2: how much of the picture the model sees, and with what in the hole."""

from typing import get_args

from comfy_api.latest import io

from ..imaging.fill import Fill, fill_pictures
from ..imaging.masks import log_noise
from ..imaging.region import crop
from ..imaging.region_plan import LOCAL_SHARE, RegionSettings

AS_SET, ZOOM_IN, LOCAL = "as set above", "LAR-Gen's zoom-in", "DreamMix's local region"

RegionType = io.Custom("REGION")
"""What Crop Region remembers for Stitch Region: an `imaging.region.Region`."""


class TrueFillCropRegion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillCropRegion",
            display_name="Crop Region (TrueFill)",
            category="TrueFill/2 region",
            description="Cuts out the hole with some context and brings it to the size that the model was trained on, so that a "
            "small hole gets all of the model's detail. Stitch Region puts the result back; everything outside of the hole stays "
            "as it was, bit for bit.",
            search_aliases=[
                "inpaint crop",
                "crop and stitch",
                "masked area only",
                "only masked",
                "crop by mask",
                "context",
            ],
            inputs=[
                io.Image.Input(
                    "image", tooltip="The whole picture, at its own size; a batch may have different holes."
                ),
                io.Mask.Input(
                    "mask",
                    tooltip="The hole: all that is not black shall change. Up to 2 of 255 levels are noise and stay.",
                ),
                io.Int.Input(
                    "native_size",
                    default=512,
                    min=64,
                    max=4096,
                    step=8,
                    tooltip="What the model was trained on: 512 for SD1.5, 768 for SD2 at 768, 1024 for SDXL. The crop has "
                    "about this number squared of pixels, in the region's own shape.",
                ),
                io.Float.Input(
                    "context_percent",
                    default=50.0,
                    min=0.0,
                    max=1000.0,
                    step=5.0,
                    tooltip="How much of the surroundings the model sees on each side, in percent of the hole's box.",
                ),
                io.Float.Input(
                    "feather",
                    default=16.0,
                    min=0.0,
                    max=1024.0,
                    step=1.0,
                    tooltip="Width in pixels of the soft edge with which the result is put back, outside of the hole. It is "
                    "inpainted too, and gray is hole like white. 0: the mask is used as it is, and gray is mixed.",
                ),
                io.Int.Input(
                    "context_pixels",
                    default=32,
                    min=0,
                    max=4096,
                    advanced=True,
                    tooltip="At least so many pixels of context on each side.",
                ),
                io.Int.Input(
                    "min_side",
                    default=128,
                    min=1,
                    max=4096,
                    advanced=True,
                    tooltip="The region is at least so many pixels wide and high, as far as the picture goes.",
                ),
                io.Float.Input(
                    "max_upscale",
                    default=4.0,
                    min=1.0,
                    max=16.0,
                    step=0.25,
                    advanced=True,
                    tooltip="The region is enlarged by this at most. 1: never.",
                ),
                io.Float.Input(
                    "max_aspect",
                    default=2.0,
                    min=1.0,
                    max=8.0,
                    step=0.1,
                    advanced=True,
                    tooltip="Long side to short side of the crop at most; a longer hole gets more context across.",
                ),
                io.Int.Input(
                    "multiple",
                    default=8,
                    min=8,
                    max=256,
                    step=8,
                    advanced=True,
                    tooltip="Both sides of the crop are a multiple of this: 8 will do, some models want 64.",
                ),
                io.Int.Input(
                    "width",
                    default=0,
                    min=0,
                    max=8192,
                    step=8,
                    advanced=True,
                    tooltip="Exactly this width, with a height. 0: as native_size says.",
                ),
                io.Int.Input(
                    "height",
                    default=0,
                    min=0,
                    max=8192,
                    step=8,
                    advanced=True,
                    tooltip="Exactly this height, with a width. 0: as native_size says.",
                ),
                io.Combo.Input(
                    "framing",
                    options=[AS_SET, ZOOM_IN, LOCAL],
                    default=AS_SET,
                    advanced=True,
                    tooltip="In the place of what the inputs from context_percent to height say, but for feather and multiple. "
                    "LAR-Gen's zoom-in: a square, 1.3 times the hole's box, at native_size. DreamMix's local region: as square "
                    f"as can be, at least {LOCAL_SHARE} of the picture in width and height.",
                ),
                io.Boolean.Input(
                    "fill_box",
                    default=False,
                    advanced=True,
                    tooltip="All of the hole's box is hole: room for a subject whose shape differs from the mask's.",
                ),
                io.Mask.Input(
                    "context_mask",
                    optional=True,
                    tooltip="What else the model shall see: its box is part of the region.",
                ),
            ],
            outputs=[
                io.Image.Output(tooltip="The crop, at the model's size."),
                io.Mask.Output(display_name="MASK", tooltip="What to inpaint in it: the hole and its soft edge."),
                RegionType.Output(display_name="REGION", tooltip="Where the crop belongs, for Stitch Region."),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: io.Image.Type,
        mask: io.Mask.Type,
        native_size: int,
        context_percent: float,
        feather: float,
        context_pixels: int,
        min_side: int,
        max_upscale: float,
        max_aspect: float,
        multiple: int,
        width: int,
        height: int,
        framing: str,
        fill_box: bool,
        context_mask: io.Mask.Type | None = None,
    ) -> io.NodeOutput:
        if bool(width) != bool(height):
            raise ValueError(f"The crop's size is {width} x {height}: give both width and height, or leave both at 0.")
        if width % multiple or height % multiple:
            raise ValueError(f"The crop's size is {width} x {height}, but both have to be a multiple of {multiple}.")
        as_set = RegionSettings(
            native_size=native_size,
            multiple=multiple,
            context_percent=context_percent,
            context_pixels=context_pixels,
            min_side=min_side,
            max_aspect=max_aspect,
            max_upscale=max_upscale,
            forced_size=(height, width) if width else None,
        )
        presets = {
            AS_SET: as_set,
            ZOOM_IN: RegionSettings.zoom_in(native_size, multiple),
            LOCAL: RegionSettings.local(native_size, LOCAL_SHARE, multiple),
        }
        log_noise("Crop Region", mask=mask, context_mask=context_mask)
        return io.NodeOutput(*crop(image, mask, presets[framing], context_mask, feather, fill_box))


class TrueFillFillHole(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillFillHole",
            display_name="Fill Hole (TrueFill)",
            category="TrueFill/2 region",
            description="Puts something neutral into the hole before sampling, for a denoise below 1 and for models that see "
            "what lies under the mask. The rest of the picture stays as it is, bit for bit.",
            search_aliases=[
                "fill masked area",
                "prefill",
                "outpaint fill",
                "telea",
                "blur masked area",
                "neutral fill",
            ],
            inputs=[
                io.Image.Input("image", tooltip="The picture."),
                io.Mask.Input("mask", tooltip="The hole: white is filled, gray is mixed."),
                io.Combo.Input(
                    "method",
                    options=list(get_args(Fill)),
                    default="blurred",
                    tooltip="blurred: smoothly from all around. edge: the nearest known pixel. mean: the known pixels' mean. "
                    "noise: noise of their mean and contrast. gray: what inpainting models see as their hole. box blurs: as "
                    "Fooocus and DreamMix do it, slower and much the same as blurred.",
                ),
                io.Int.Input("seed", default=0, min=0, max=2**32 - 1, advanced=True, tooltip="For noise: which one."),
            ],
            outputs=[io.Image.Output(tooltip="The picture with a filled hole.")],
        )

    @classmethod
    def execute(cls, image: io.Image.Type, mask: io.Mask.Type, method: Fill, seed: int) -> io.NodeOutput:
        log_noise("Fill Hole", mask=mask)
        return io.NodeOutput(fill_pictures(image, mask, method, seed))


NODES = [TrueFillCropRegion, TrueFillFillHole]
