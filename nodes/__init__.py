"""The pack's nodes: a module for each method, and one for each kind of work around them."""

from comfy_api.latest import ComfyExtension, io

from . import (
    compare,
    condition,
    dreammix,
    finish,
    hd_painter,
    lar_gen,
    load,
    mask,
    painternet,
    pilot,
    region,
    selection,
    starts,
    subject_tuning,
    training_data,
)

MODULES = (
    load,
    mask,
    selection,
    region,
    condition,
    hd_painter,
    lar_gen,
    pilot,
    dreammix,
    subject_tuning,
    painternet,
    starts,
    finish,
    compare,
    training_data,
)


class TrueFillExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for module in MODULES for node in module.NODES]


async def comfy_entrypoint() -> TrueFillExtension:
    return TrueFillExtension()
