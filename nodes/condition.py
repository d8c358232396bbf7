"""Step 3: what shall appear in the hole."""

from comfy_api.latest import io

from ..model_patches.core.prompt_tokens import QUALITY_SUFFIX, encode_prompt


class TrueFillEncodePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillEncodePrompt",
            display_name="Encode Prompt (TrueFill)",
            category="TrueFill/3 condition",
            description="Encodes what shall appear in the hole, and remembers which tokens are the prompt's own words, so that "
            "PAIntA and RASG follow those and nothing else.",
            search_aliases=["clip text encode", "prompt", "local prompt", "hd-painter", "inpaint prompt"],
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="The text encoders of SD1.5, SD2, SDXL, SD3, Flux, Flux2, Chroma, Qwen-Image, Z-Image, Krea2, "
                    "HiDream, Anima, Cosmos or Wan.",
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What shall appear in the hole: the thing itself, in a few words. Weights (word:1.3) and "
                    "embedding:name work as everywhere in ComfyUI.",
                ),
                io.Boolean.Input(
                    "quality_suffix",
                    default=False,
                    tooltip="Adds the suffix below behind the prompt. Its words shape the picture but do not count as the "
                    "prompt's own.",
                ),
                io.String.Input(
                    "suffix",
                    default=QUALITY_SUFFIX,
                    advanced=True,
                    tooltip="The suffix; the default is the one HD-Painter's authors use.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="Goes wherever CONDITIONING goes.")],
        )

    @classmethod
    def execute(cls, clip: io.Clip.Type, prompt: str, quality_suffix: bool, suffix: str) -> io.NodeOutput:
        if clip is None:
            raise ValueError(
                "The clip input is empty: this checkpoint brings no text encoder; load one that does, or use a CLIP loader."
            )
        return io.NodeOutput(encode_prompt(clip, prompt, suffix.strip() if quality_suffix else ""))


NODES = [TrueFillEncodePrompt]
