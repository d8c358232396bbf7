"""PainterNet: a control branch beside a MODEL, PainterNet's own, PowerPaint's or BrushNet's."""

from typing import NamedTuple

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..imaging.masks import log_noise
from ..model_patches.painternet.branch import Branch, Text, with_branch
from ..model_patches.painternet.network import branch_model
from ..model_patches.painternet.task_prompts import TASKS, TaskClip
from ..weights import painternet
from ..weights.demo_model import FOLDER
from ..weights.files import SUFFIXES
from ..weights.powerpaint import read_task_encoder
from .model_files import ModelFiles
from .schema import check_window, end_percent_input, start_percent_input

DEMO = "demo"
"""The demo model's, which ships."""
BRANCHES = ModelFiles(
    ("inpaint",),
    "BrushNet, PowerPaint 2.1 or PainterNet",
    f"{painternet.BRUSHNET} or {painternet.POWERPAINT}",
    {DEMO: FOLDER / painternet.DEMO_FILE},
    (*SUFFIXES, ".bin"),
)

ENCODERS = ModelFiles(("inpaint",), "PowerPaint text encoder", painternet.POWERPAINT, suffixes=(*SUFFIXES, ".bin"))
ENCODER = "pytorch_model.bin"

BranchType = io.Custom("BRANCH")


class LoadedBranch(NamedTuple):
    """A branch's network, and whose it is."""

    network: ModelPatcher
    kind: str


class TrueFillLoadBranch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillLoadBranch",
            display_name="Load Branch (TrueFill)",
            category="TrueFill/0 load",
            description="Loads a control branch, by which any SD1.5 or SDXL model fills holes: BrushNet (SD1.5, SDXL), "
            "PowerPaint 2.1, or PainterNet. The file says which.",
            search_aliases=[
                "brushnet",
                "powerpaint",
                "painternet",
                "brushnet loader",
                "inpaint model",
                "control branch",
            ],
            inputs=[
                io.Combo.Input(
                    "branch",
                    options=BRANCHES.names(),
                    default=DEMO,
                    tooltip="The file, in models/inpaint: .safetensors, .bin or .pth. demo is the demo model's, which ships.",
                )
            ],
            outputs=[BranchType.Output(display_name="BRANCH", tooltip="The branch, for Apply Branch.")],
        )

    @classmethod
    def validate_inputs(cls, branch: str | None = None) -> bool | str:
        return BRANCHES.check(branch)

    @classmethod
    def execute(cls, branch: str) -> io.NodeOutput:
        weights = painternet.read_branch(BRANCHES.path(branch))
        return io.NodeOutput(LoadedBranch(branch_model(weights), weights.kind))


class TrueFillApplyBranch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillApplyBranch",
            display_name="Apply Branch (TrueFill)",
            category="TrueFill/4 guide",
            description="Lets a branch look at the picture without its hole, and tell the model at every layer what belongs "
            "there. So any model fills holes, plain ones too. Several branches may follow each other.",
            search_aliases=[
                "brushnet",
                "powerpaint",
                "painternet",
                "inpaint",
                "attention control points",
                "apply brushnet",
            ],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5 or SDXL model of the branch's family, plain or with LoRAs."),
                BranchType.Input("branch", tooltip="The branch, from Load Branch."),
                io.Image.Input("image", tooltip="The picture with the hole, as it is sampled."),
                io.Mask.Input("mask", tooltip="The hole (white)."),
                io.Vae.Input("vae", tooltip="The checkpoint's VAE."),
                io.Float.Input(
                    "preservation_scale",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How much the branch counts. 1 is as trained; 0 leaves the model as it is.",
                ),
                start_percent_input(),
                end_percent_input(1.0, "1 is the last step."),
                io.Float.Input(
                    "layer_scale",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    advanced=True,
                    tooltip="A factor for its layer points alone.",
                ),
                io.Float.Input(
                    "attention_scale",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    advanced=True,
                    tooltip="A factor for its attention control points alone, which PainterNet's have.",
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="What the branch reads: PowerPaint Prompt's, or the prompt of what is in the hole. Without one it "
                    "reads the sampler's. BrushNet reads none.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True, tooltip="The same for the negative prompt; without one, the sampler's."
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, which listens to the branch.")],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        branch: LoadedBranch,
        image: io.Image.Type,
        mask: io.Mask.Type,
        vae: io.Vae.Type,
        preservation_scale: float,
        start_percent: float,
        end_percent: float,
        layer_scale: float,
        attention_scale: float,
        positive: io.Conditioning.Type | None = None,
        negative: io.Conditioning.Type | None = None,
    ) -> io.NodeOutput:
        check_window(start_percent, end_percent)
        log_noise("Apply Branch", mask=mask)
        settings = Branch(
            strength=preservation_scale,
            start_percent=start_percent,
            end_percent=end_percent,
            mask=mask,
            network=branch.network,
            kind=branch.kind,
            vae=vae,
            picture=image,
            positive=Text.of(positive, "positive"),
            negative=Text.of(negative, "negative"),
            layer_scale=layer_scale,
            attention_scale=attention_scale,
        )
        return io.NodeOutput(with_branch(model, settings))


class TrueFillPowerPaintPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillPowerPaintPrompt",
            display_name="PowerPaint Prompt (TrueFill)",
            category="TrueFill/3 condition",
            description="Tells PowerPaint's branch what to do: fill the hole by words, fit its shape, remove what is there, or "
            "go on with the picture. The words themselves go to the sampler, as always.",
            search_aliases=[
                "powerpaint",
                "object removal",
                "remove object",
                "outpaint",
                "shape guided",
                "P_ctxt",
                "P_obj",
            ],
            inputs=[
                io.Combo.Input(
                    "encoder",
                    options=ENCODERS.names(),
                    default=ENCODER,
                    tooltip="The branch's text encoder, in models/inpaint: PowerPaint_Brushnet/pytorch_model.bin, under any "
                    "name.",
                ),
                io.Combo.Input(
                    "task",
                    options=list(TASKS),
                    default="text",
                    tooltip="text: what the prompt says. shape: the same, in the mask's shape. removal and outpainting: what "
                    "lies around. context: what lies around, without pushing things away.",
                ),
                io.Float.Input(
                    "fitting",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="For the task shape: how closely the mask is filled. 0.8 to 0.95 for a mask along the thing, 0.5 to "
                    "0.6 for a rough one.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="For Apply Branch's positive."),
                io.Conditioning.Output(display_name="negative", tooltip="For Apply Branch's negative."),
            ],
        )

    @classmethod
    def validate_inputs(cls, encoder: str | None = None) -> bool | str:
        return ENCODERS.check(encoder)

    @classmethod
    def execute(cls, encoder: str, task: str, fitting: float) -> io.NodeOutput:
        clip = TaskClip(read_task_encoder(ENCODERS.path(encoder)))
        return io.NodeOutput(*clip.prompts(task, fitting))


NODES = [TrueFillLoadBranch, TrueFillApplyBranch, TrueFillPowerPaintPrompt]
