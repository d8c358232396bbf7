"""The pack's nodes, one module per step of the job: 0 load, 1 mask ... 6 finish."""

from comfy_api.latest import ComfyExtension, io

from .compare import TrueFillCompare
from .condition import TrueFillEncodePrompt
from .detect import TrueFillDetect, TrueFillLoadDetector, TrueFillMaskFromText
from .finish import TrueFillHarmonize, TrueFillStitchRegion
from .hd_painter import TrueFillPAIntA, TrueFillRASG, TrueFillSemanticBoundary
from .load import TrueFillDemoModel
from .mask import (
    TrueFillCleanMask,
    TrueFillExamplePhoto,
    TrueFillFeatherMask,
    TrueFillGrowMask,
    TrueFillMaskShape,
)
from .pilot import TrueFillPILOT, TrueFillPILOTSampler
from .region import TrueFillCropRegion, TrueFillFillHole
from .selection import TrueFillLoadSegmenter, TrueFillPoints, TrueFillSegment
from .upscale import TrueFillBlendKnown, TrueFillUpscale


class TrueFillExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            TrueFillDemoModel,
            TrueFillLoadSegmenter,
            TrueFillLoadDetector,
            TrueFillExamplePhoto,
            TrueFillGrowMask,
            TrueFillFeatherMask,
            TrueFillCleanMask,
            TrueFillMaskShape,
            TrueFillPoints,
            TrueFillSegment,
            TrueFillDetect,
            TrueFillMaskFromText,
            TrueFillCropRegion,
            TrueFillFillHole,
            TrueFillEncodePrompt,
            TrueFillPAIntA,
            TrueFillRASG,
            TrueFillSemanticBoundary,
            TrueFillPILOTSampler,
            TrueFillPILOT,
            TrueFillStitchRegion,
            TrueFillHarmonize,
            TrueFillUpscale,
            TrueFillBlendKnown,
            TrueFillCompare,
        ]


async def comfy_entrypoint() -> TrueFillExtension:
    return TrueFillExtension()
