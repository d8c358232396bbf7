"""Step 6: what has changed, and where."""

from comfy_api.latest import io, ui

from ..imaging.compare import Figures, compare
from ..imaging.masks import resize_mask


class TrueFillCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillCompare",
            display_name="Compare (TrueFill)",
            category="TrueFill/6 finish",
            description="Shows before, after and the mask in one view with a slider, and where they differ as a heat map; counts "
            "the pixels that changed outside of the mask.",
            search_aliases=[
                "image compare",
                "compare images",
                "before after",
                "slider",
                "diff",
                "image difference",
                "heat map",
                "heatmap",
            ],
            inputs=[
                io.Image.Input("before", tooltip="The picture as it was; on the left of the slider."),
                io.Image.Input(
                    "after",
                    tooltip="What was made of it, of the same size; on the right. Several pictures for one are compared "
                    "one by one.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="What may change: all that is not black. The figures tell inside from outside, and its outline can "
                    "be shown. After Stitch Region and Upscale connect their MASK, which has the soft edge in it. Without a mask "
                    "the figures are of the whole picture.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="DIFFERENCE",
                    tooltip="The heat map: black where nothing changed, violet for the smallest change, pale yellow for the "
                    "largest.",
                ),
                io.String.Output(
                    display_name="FIGURES",
                    tooltip="Pixels changed, and the largest and the mean difference, outside and inside the mask.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, before: io.Image.Type, after: io.Image.Type, mask: io.Mask.Type | None = None) -> io.NodeOutput:
        heat, figures = compare(before, after, mask)
        saved = {
            "before": ui.PreviewImage(before),
            "after": ui.PreviewImage(after),
            "heat": ui.PreviewImage(heat),
        }
        if mask is not None:
            saved["mask"] = ui.PreviewMask(resize_mask(mask, before.shape[1:3]))
        # Not under the key `images`, which the editor draws below the node.
        shown = {name: _for_each(preview.values, len(heat)) for name, preview in saved.items()}
        return io.NodeOutput(heat, _text(figures), ui=shown | {"text": [str(item) for item in figures]})


def _for_each(files: list[ui.SavedResult], count: int) -> list[ui.SavedResult]:
    """For each of `count` pictures its file; a single one serves them all."""
    return files if len(files) == count else files * count


def _text(figures: list[Figures]) -> str:
    if len(figures) == 1:
        return str(figures[0])
    return "\n".join(f"Picture {number}\n{item}" for number, item in enumerate(figures, 1))


NODES = [TrueFillCompare]
