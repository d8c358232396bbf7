"""The pack's nodes, one module per step of the job: 1 mask ... 6 finish."""

from comfy_api.latest import ComfyExtension, io

from .condition import TrueFillEncodePrompt
from .finish import TrueFillHarmonize, TrueFillStitchRegion
from .guide import TrueFillPAIntA, TrueFillRASG
from .mask import TrueFillCleanMask, TrueFillExamplePhoto, TrueFillFeatherMask, TrueFillGrowMask
from .region import TrueFillCropRegion, TrueFillFillHole


class TrueFillExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            TrueFillExamplePhoto,
            TrueFillGrowMask,
            TrueFillFeatherMask,
            TrueFillCleanMask,
            TrueFillCropRegion,
            TrueFillFillHole,
            TrueFillEncodePrompt,
            TrueFillPAIntA,
            TrueFillRASG,
            TrueFillStitchRegion,
            TrueFillHarmonize,
        ]


async def comfy_entrypoint() -> TrueFillExtension:
    return TrueFillExtension()
