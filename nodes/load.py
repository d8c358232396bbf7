"""Before step 1: a model to work with."""

from comfy_api.latest import io

from ..weights.demo_dit import KINDS, load_kind


class TrueFillDemoModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillDemoModel",
            display_name="Demo Model (TrueFill)",
            category="TrueFill/0 load",
            description="A very small model that ships with TrueFill, so that a graph runs without a download, in seconds on a "
            "CPU. It draws one toy world: 8 shapes in 8 colors and 4 patterns on 15 backgrounds, 256x256. For real "
            "pictures put Load Checkpoint in its place.",
            search_aliases=[
                "load checkpoint",
                "checkpoint loader",
                "tiny model",
                "test model",
                "try without downloads",
            ],
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=list(KINDS),
                    tooltip="inpainting: 9 input channels, as SD1.5-inpainting has. text-to-image: 4, as plain SD1.5 has. "
                    "transformer: no UNet, as Flux, of whose class it is.",
                )
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The model. It knows scenes such as: a red striped star and a blue circle on a wooden table."
                ),
                io.Clip.Output(tooltip="Its text encoder. Words that its world does not have mean nothing to it."),
                io.Vae.Output(tooltip="Its autoencoder, in the format of TAESD."),
            ],
        )

    @classmethod
    def execute(cls, kind: str) -> io.NodeOutput:
        return io.NodeOutput(*load_kind(kind))


NODES = [TrueFillDemoModel]
