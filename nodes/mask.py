"""Step 1: what shall change."""

from comfy_api.latest import io

from ..imaging.examples import EXAMPLES, load_example


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
                io.Mask.Output(tooltip="Its hole: 1 where the picture shall change."),
            ],
        )

    @classmethod
    def execute(cls, photo: str) -> io.NodeOutput:
        return io.NodeOutput(*load_example(photo))
