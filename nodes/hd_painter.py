"""Step 4: make the model obey the prompt inside the hole."""

from comfy_api.latest import io

from ..model_patches.core.guidance import with_boundary, with_painta, with_rasg
from ..model_patches.hd_painter.painta import PAIntA
from ..model_patches.hd_painter.rasg import RASG
from ..model_patches.pilot.semantic_boundary import SemanticBoundary
from .schema import hole_input


def _start_percent() -> io.Float.Input:
    return io.Float.Input(
        "start_percent",
        default=0.0,
        min=0.0,
        max=1.0,
        step=0.01,
        advanced=True,
        tooltip="Where in sampling it begins: 0 is the first step, 1 the last.",
    )


def _end_percent(default: float, why: str) -> io.Float.Input:
    return io.Float.Input(
        "end_percent",
        default=default,
        min=0.0,
        max=1.0,
        step=0.01,
        advanced=True,
        tooltip=f"Where in sampling it ends. {why}",
    )


def _check_window(start_percent: float, end_percent: float) -> None:
    if start_percent > end_percent:
        raise ValueError(
            f"start_percent ({start_percent:g}) lies behind end_percent ({end_percent:g}): set start_percent to "
            f"{end_percent:g} or less."
        )


class TrueFillPAIntA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillPAIntA",
            display_name="PAIntA: Prompt-Aware Attention (TrueFill)",
            category="TrueFill/4 guide",
            description="Lets the hole look less at known pixels that have nothing to do with the prompt, so that the "
            "background and nearby objects do not take the hole over. HD-Painter's Prompt-Aware Introverted Attention, for "
            "SD1.5, SD2 and SDXL, inpainting and plain; training-free.",
            search_aliases=[
                "hd-painter",
                "hdpainter",
                "prompt-aware introverted attention",
                "prompt neglect",
                "inpaint",
            ],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5, SD2 or SDXL model."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="1 is the paper; 0 leaves the model as it is.",
                ),
                _start_percent(),
                _end_percent(0.5, "The paper's default is the first half of sampling."),
                io.Boolean.Input(
                    "smooth",
                    default=True,
                    advanced=True,
                    tooltip="Smooths the relevance map with a 3x3 kernel, as the authors' code does (the paper does not "
                    "mention it).",
                ),
                hole_input(),
            ],
            outputs=[io.Model.Output(tooltip="The model with PAIntA. Works with every sampler and with RASG.")],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        strength: float,
        start_percent: float,
        end_percent: float,
        smooth: bool,
        mask: io.Mask.Type | None = None,
    ) -> io.NodeOutput:
        _check_window(start_percent, end_percent)
        return io.NodeOutput(with_painta(model, PAIntA(strength, start_percent, end_percent, smooth, mask)))


class TrueFillRASG(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillRASG",
            display_name="RASG: Attention Score Guidance (TrueFill)",
            category="TrueFill/4 guide",
            description="Replaces the noise that a stochastic sampler adds by a gradient that pulls the prompt into the hole. "
            "HD-Painter's Reweighting Attention Score Guidance. euler, ddim and dpmpp_2m run in their stochastic form; a "
            "sampler that has no such form gives a message that names those which work.",
            search_aliases=[
                "hd-painter",
                "hdpainter",
                "reweighting attention score guidance",
                "prompt neglect",
                "inpaint",
            ],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5, SD2 or SDXL model."),
                io.Float.Input(
                    "eta",
                    default=0.01,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    round=0.001,
                    tooltip="How much of each step's noise level comes from the gradient, as DDIM's eta; it takes the place of "
                    "the sampler's own eta. 0.01 is what the authors' results correspond to: the 0.25 in their paper belongs "
                    "to a sigma some 25 times smaller. Try 0.01 to 0.1.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Share of the noise that the gradient replaces; the rest stays random. 0 leaves the model as it "
                    "is.",
                ),
                _start_percent(),
                _end_percent(1.0, "The paper's default is all of sampling."),
                io.Combo.Input(
                    "sigma",
                    options=["ddim", "released"],
                    default="ddim",
                    advanced=True,
                    tooltip="ddim: the paper's formula. released: the smaller sigma of the authors' code, to be used with eta "
                    "0.1 to 0.25 and with euler, ddim or euler_ancestral.",
                ),
                hole_input(),
            ],
            outputs=[io.Model.Output(tooltip="The model with RASG. About 1.3 to 1.6 times the time of a plain step.")],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        eta: float,
        strength: float,
        start_percent: float,
        end_percent: float,
        sigma: str,
        mask: io.Mask.Type | None = None,
    ) -> io.NodeOutput:
        _check_window(start_percent, end_percent)
        return io.NodeOutput(with_rasg(model, RASG(eta, strength, start_percent, end_percent, sigma, mask)))


class TrueFillSemanticBoundary(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillSemanticBoundary",
            display_name="SBC: Semantic Boundary (TrueFill)",
            category="TrueFill/4 guide",
            description="Keeps the prompt inside the hole: known pixels do not read its words. PILOT's semantic boundary "
            "control, for SD1.5, SD2 and SDXL, plain and inpainting; training-free.",
            search_aliases=[
                "pilot",
                "sbc",
                "semantic boundary control",
                "attention mask",
                "regional prompt",
                "inpaint",
            ],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5, SD2 or SDXL model."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="1 is the paper: the words are silent at known pixels. 0 leaves the model as it is.",
                ),
                _start_percent(),
                _end_percent(1.0, "The paper's default is all of sampling."),
                hole_input(),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the boundary. Works with every sampler, PAIntA and RASG.")
            ],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        strength: float,
        start_percent: float,
        end_percent: float,
        mask: io.Mask.Type | None = None,
    ) -> io.NodeOutput:
        _check_window(start_percent, end_percent)
        return io.NodeOutput(with_boundary(model, SemanticBoundary(strength, start_percent, end_percent, mask)))
