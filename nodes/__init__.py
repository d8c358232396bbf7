"""The pack's nodes, one module per step of the job: 0 load, 1 mask ... 6 finish."""

from comfy_api.latest import ComfyExtension, io

from .condition import TrueFillEncodePrompt
from .guide import TrueFillPAIntA, TrueFillRASG
from .load import TrueFillDemoModel
from .mask import TrueFillExamplePhoto


class TrueFillExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [TrueFillDemoModel, TrueFillExamplePhoto, TrueFillEncodePrompt, TrueFillPAIntA, TrueFillRASG]


async def comfy_entrypoint() -> TrueFillExtension:
    return TrueFillExtension()
