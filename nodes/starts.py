"""What a run begins with: the best of several noises, and a noise that was made better."""

from comfy_api.latest import io

from ..imaging.masks import log_noise
from ..model_patches.core.sampling_run import with_method
from ..model_patches.starts.best_start import BestStart
from ..model_patches.starts.noise_search import NoiseSearch
from .announce import announcer
from .schema import grid_input, hole_input


class TrueFillBestStart(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillBestStart",
            display_name="Best Start (TrueFill)",
            category="TrueFill/4 guide",
            description="Begins with several noises, looks after a part of the steps in which of them the prompt's attention "
            "lies best in the hole, and samples that one to the end. Trying several seeds at less than the price of sampling "
            "them all; needs no gradient and works with the KSampler's samplers. For SD1.5, SD2 and SDXL, inpainting and plain.",
            search_aliases=["seed search", "best of n", "several seeds", "seed selection", "prompt neglect", "inpaint"],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5, SD2 or SDXL model."),
                io.Int.Input(
                    "candidates",
                    default=BestStart.candidates,
                    min=1,
                    max=64,
                    tooltip="How many noises begin: that of the sampler's seed and those of the seeds that follow. 1 leaves the "
                    "model as it is.",
                ),
                io.Float.Input(
                    "choose_at",
                    default=BestStart.choose_at,
                    min=0.05,
                    max=0.95,
                    step=0.05,
                    tooltip="After which share of the steps one is chosen. Earlier is cheaper and less sure: with 4 candidates "
                    "and 20 steps, 0.5 takes the time of 53 steps, and 0.25 that of 38.",
                ),
                grid_input(),
                hole_input(),
            ],
            outputs=[io.Model.Output(tooltip="The model, which begins each run of a sampler with several noises.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        candidates: int,
        choose_at: float,
        grid: str,
        mask: io.Mask.Type | None = None,
    ) -> io.NodeOutput:
        log_noise("Best Start", mask=mask)
        settings = BestStart(
            strength=float(candidates > 1),
            candidates=candidates,
            choose_at=choose_at,
            grid=grid,
            announce=announcer(cls.hidden.unique_id),
            mask=mask,
        )
        return io.NodeOutput(with_method(model, settings))


class TrueFillNoiseSearch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillNoiseSearch",
            display_name="Noise Search (TrueFill)",
            category="TrueFill/4 guide",
            description="Before sampling begins, changes the noise in the hole a little, so that the prompt's attention lies "
            "better in the hole. Costs about as much as one to three steps of the run, and works with every sampler. For SD1.5, "
            "SD2 and SDXL, inpainting and plain.",
            search_aliases=["noise optimization", "initial noise", "latent optimization", "prompt neglect", "inpaint"],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5, SD2 or SDXL model."),
                io.Int.Input(
                    "steps",
                    default=NoiseSearch.steps,
                    min=0,
                    max=100,
                    tooltip="How many times the noise is changed, each at the price of one evaluation with a gradient. 0 leaves "
                    "the model as it is. More is not better: the noise then stops being what the model knows.",
                ),
                io.Float.Input(
                    "rate",
                    default=NoiseSearch.rate,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="How far each step goes, as a part of the noise's own size in the hole.",
                ),
                grid_input(),
                hole_input(),
            ],
            outputs=[io.Model.Output(tooltip="The model, which begins each run of a sampler with a changed noise.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model: io.Model.Type, steps: int, rate: float, grid: str, mask: io.Mask.Type | None = None
    ) -> io.NodeOutput:
        log_noise("Noise Search", mask=mask)
        settings = NoiseSearch(
            strength=float(steps > 0 and rate > 0),
            steps=steps,
            rate=rate,
            grid=grid,
            announce=announcer(cls.hidden.unique_id),
            mask=mask,
        )
        return io.NodeOutput(with_method(model, settings))


NODES = [TrueFillBestStart, TrueFillNoiseSearch]
