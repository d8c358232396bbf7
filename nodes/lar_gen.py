"""LAR-Gen: a subject from a picture, into the hole."""

from typing import NamedTuple

import torch
from comfy_api.latest import io

from ..imaging.masks import log_noise
from ..imaging.subject import cut_out
from ..model_patches.core.sampling_run import with_method
from ..model_patches.core.unet_attention import require_unet, transformer_places
from ..model_patches.lar_gen.branch import Branch, branch_from_tensors
from ..model_patches.lar_gen.checkpoint import load_checkpoint
from ..model_patches.lar_gen.decoupled_attention import Assign
from ..model_patches.lar_gen.reference import Refine
from ..model_patches.lar_gen.resampler import Resampler
from ..model_patches.lar_gen.subject import Subject, clip_states, squares
from ..weights import lar_gen
from ..weights.demo_subject import load_demo_subject
from ..weights.files import SUFFIXES
from .model_files import ModelFiles
from .schema import check_window, end_percent_input, start_percent_input

ADAPTERS = ModelFiles(("ipadapter",), "IP-Adapter-Plus (ViT-H)", lar_gen.WHERE_TO_GET, suffixes=(*SUFFIXES, ".bin"))
EXAMPLE = "ip-adapter-plus_sd15.safetensors"
CHECKPOINTS = ModelFiles(("lar-gen",), "LAR-Gen", lar_gen.RELEASE)
CHECKPOINT = "largen_ckpt_s22k.pth"

ONE = "views of one subject"
EACH = "a subject for each picture"

SubjectType = io.Custom("SUBJECT")
AdapterType = io.Custom("SUBJECT_ADAPTER")


class Adapter(NamedTuple):
    """What a file teaches a UNet: tokens from CLIP's states, to read them, and maybe a reference network."""

    resampler: Resampler
    weights: lar_gen.SubjectWeights
    branch: Branch | None

    @staticmethod
    def of(weights: lar_gen.SubjectWeights, name: str, pooled: torch.Tensor | None = None) -> "Adapter":
        """Raises ValueError, in one sentence, where the file `name` is incomplete. `pooled` is as in `Branch`."""
        try:
            resampler = Resampler.from_tensors(weights.resampler)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{name} is an incomplete or changed file (its resampler: {error}): download it again, or take "
                f"{lar_gen.WHERE_TO_GET}."
            ) from error
        branch = branch_from_tensors(weights.branch, weights.detail, pooled, name) if weights.branch else None
        return Adapter(resampler, weights, branch)


class TrueFillLoadSubjectAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillLoadSubjectAdapter",
            display_name="Load Subject Adapter (TrueFill)",
            category="TrueFill/0 load",
            description="Loads weights by which a model reads a subject from a picture, for Assign: IP-Adapter-Plus for SD1.5 or "
            "SDXL (ViT-H), or LAR-Gen's checkpoint.",
            search_aliases=["ip adapter", "ipadapter", "load ipadapter", "reference image", "lar-gen", "image prompt"],
            inputs=[
                io.Combo.Input(
                    "adapter",
                    options=ADAPTERS.names(),
                    default=next(iter(ADAPTERS.names()), EXAMPLE),
                    tooltip="The file, in models/ipadapter: .safetensors, .bin or .pth. Its contents tell what it is.",
                )
            ],
            outputs=[AdapterType.Output(display_name="SUBJECT_ADAPTER", tooltip="The weights, for Assign.")],
        )

    @classmethod
    def validate_inputs(cls, adapter: str | None = None) -> bool | str:
        return ADAPTERS.check(adapter)

    @classmethod
    def execute(cls, adapter: str) -> io.NodeOutput:
        return io.NodeOutput(Adapter.of(lar_gen.read_subject_weights(ADAPTERS.path(adapter)), adapter))


class TrueFillLoadLARGen(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillLoadLARGen",
            display_name="Load LAR-Gen (TrueFill)",
            category="TrueFill/0 load",
            description="Loads LAR-Gen's checkpoint, an SDXL inpainting model that has learned to read a subject, with all that "
            "it brings: text encoders, VAE, CLIP ViT-H, and what Assign and Refine read.",
            search_aliases=["lar-gen", "largen", "scepter", "subject inpainting", "load checkpoint"],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=CHECKPOINTS.names(),
                    default=next(iter(CHECKPOINTS.names()), CHECKPOINT),
                    tooltip="The file, in models/lar-gen. Of one in three files any of them, with the others beside it.",
                )
            ],
            outputs=[
                io.Model.Output(tooltip="The model: SDXL, 9 input channels."),
                io.Clip.Output(tooltip="Its text encoders."),
                io.Vae.Output(tooltip="Its autoencoder."),
                io.ClipVision.Output(tooltip="CLIP ViT-H, for Encode Subject."),
                AdapterType.Output(display_name="SUBJECT_ADAPTER", tooltip="The weights, for Assign and Refine."),
            ],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str | None = None) -> bool | str:
        return CHECKPOINTS.check(checkpoint)

    @classmethod
    def execute(cls, checkpoint: str) -> io.NodeOutput:
        parts = lar_gen.read_checkpoint(CHECKPOINTS.path(checkpoint))
        *loaded, pooled = load_checkpoint(parts.base, parts.vision, checkpoint)
        return io.NodeOutput(*loaded, Adapter.of(parts.subject, checkpoint, pooled))


class TrueFillDemoSubjectModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillDemoSubjectModel",
            display_name="Demo Subject Model (TrueFill)",
            category="TrueFill/0 load",
            description="The demo model that has learned to read a subject: LAR-Gen in small, which ships with TrueFill, so that "
            "a graph with a subject runs without a download. It knows one toy world of 256x256 pictures, and subjects of its "
            "shapes with surfaces that no word names.",
            search_aliases=[
                "load checkpoint",
                "tiny model",
                "test model",
                "try without downloads",
                "lar-gen",
                "subject",
            ],
            inputs=[],
            outputs=[
                io.Model.Output(tooltip="The model: 9 input channels."),
                io.Clip.Output(tooltip="Its text encoder."),
                io.Vae.Output(tooltip="Its autoencoder."),
                io.ClipVision.Output(tooltip="Its CLIP Vision, for Encode Subject."),
                AdapterType.Output(display_name="SUBJECT_ADAPTER", tooltip="The weights, for Assign and Refine."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        demo = load_demo_subject()
        branch = None if demo.branch is None else Branch(model=demo.branch, **demo.weights.detail)
        adapter = Adapter(Resampler.from_tensors(demo.weights.resampler), demo.weights, branch)
        return io.NodeOutput(demo.model, demo.clip, demo.vae, demo.vision, adapter)


class TrueFillEncodeSubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillEncodeSubject",
            display_name="Encode Subject (TrueFill)",
            category="TrueFill/3 condition",
            description="Cuts a subject out of its picture, lays it on white, and encodes it: by CLIP Vision for Assign, and by "
            "the VAE for Refine.",
            search_aliases=[
                "reference image",
                "image prompt",
                "subject",
                "ip adapter",
                "identity",
                "lar-gen",
                "try-on",
            ],
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="The subject's picture, or a batch of them. With an alpha channel and no mask, alpha says what the "
                    "subject is.",
                ),
                io.Combo.Input(
                    "pictures",
                    options=[ONE, EACH],
                    default=ONE,
                    tooltip="What a batch is: views of one subject, which are read together, or a subject for each of the "
                    "pictures that are sampled.",
                ),
                io.Int.Input(
                    "size",
                    default=512,
                    min=64,
                    max=2048,
                    step=8,
                    tooltip="Longest side of the subject in pixels, for Refine. The model's own is best (512 for SD1.5, 1024 for "
                    "SDXL); half of it is faster.",
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="What the subject is (white). Without one, the whole picture."
                ),
                io.ClipVision.Input(
                    "clip_vision", optional=True, tooltip="CLIP ViT-H, from Load CLIP Vision; Assign needs it."
                ),
                io.Vae.Input("vae", optional=True, tooltip="The checkpoint's VAE; Refine needs it."),
            ],
            outputs=[
                SubjectType.Output(display_name="SUBJECT", tooltip="The subject, for Assign and Refine."),
                io.Image.Output(display_name="cut_out", tooltip="The subject on white, as it is encoded."),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: io.Image.Type,
        pictures: str,
        size: int,
        mask: io.Mask.Type | None = None,
        clip_vision: io.ClipVision.Type | None = None,
        vae: io.Vae.Type | None = None,
    ) -> io.NodeOutput:
        log_noise("Encode Subject", mask=mask)
        if clip_vision is None and vae is None:
            raise ValueError(
                "Encode Subject was given nothing to encode with: connect Load CLIP Vision for Assign, the checkpoint's VAE for "
                "Refine, or both."
            )
        subjects = cut_out(image, mask)
        cut = squares(subjects, size)
        subject = Subject(
            states=None if clip_vision is None else clip_states(clip_vision, subjects),
            latents=None if vae is None else vae.encode(cut),
            is_one=pictures == ONE,
        )
        return io.NodeOutput(subject, cut)


def _region_input() -> io.Mask.Input:
    return io.Mask.Input(
        "mask", optional=True, tooltip="Where the subject is read (white). Without one everywhere, as in the paper."
    )


class TrueFillAssign(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillAssign",
            display_name="Assign (TrueFill)",
            category="TrueFill/4 guide",
            description="LAR-Gen's Assign: every cross-attention reads the subject besides the text (decoupled cross-attention, "
            "as in IP-Adapter). With a prompt the text stays in control; with an empty one the subject alone counts.",
            search_aliases=[
                "ip adapter",
                "apply ipadapter",
                "decoupled cross attention",
                "lar-gen",
                "subject",
                "identity",
            ],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5, SD2 or SDXL model of the adapter's family."),
                SubjectType.Input("subject", tooltip="The subject, from Encode Subject with CLIP Vision."),
                AdapterType.Input("adapter", tooltip="The weights, from Load Subject Adapter."),
                io.Float.Input(
                    "beta",
                    default=0.45,
                    min=0.0,
                    max=3.0,
                    step=0.01,
                    tooltip="How much the subject counts: 0.3 to 0.45 with a prompt, 1 with an empty one. 0 leaves the model as "
                    "it is.",
                ),
                start_percent_input(),
                end_percent_input(1.0, "1 is the last step."),
                _region_input(),
            ],
            outputs=[io.Model.Output(tooltip="The model, which reads the subject.")],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        subject: Subject,
        adapter: Adapter,
        beta: float,
        start_percent: float,
        end_percent: float,
        mask: io.Mask.Type | None = None,
    ) -> io.NodeOutput:
        check_window(start_percent, end_percent)
        log_noise("Assign", mask=mask)
        tokens, nothing = subject.tokens(adapter.resampler)
        places = [t.place for t in transformer_places(require_unet(model, Assign.name))]
        settings = Assign(
            strength=beta,
            start_percent=start_percent,
            end_percent=end_percent,
            mask=mask,
            subject=tokens,
            nothing=nothing,
            projections=adapter.weights.by_place(places),
        )
        return io.NodeOutput(with_method(model, settings))


class TrueFillRefine(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillRefine",
            display_name="Refine (TrueFill)",
            category="TrueFill/4 guide",
            description="LAR-Gen's Refine: the model looks at the subject's picture while it samples, and its self-attention "
            "reads details from there. Needs no extra weights; about doubles the time of a step.",
            search_aliases=[
                "reference only",
                "reference attention",
                "refinenet",
                "lar-gen",
                "subject",
                "identity",
                "details",
            ],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.5, SD2 or SDXL model, plain or inpainting."),
                SubjectType.Input("subject", tooltip="The subject, from Encode Subject with the model's VAE."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How much the details count: 1 is the paper's, 0 leaves the model as it is.",
                ),
                start_percent_input(),
                end_percent_input(1.0, "1 is the last step."),
                io.Int.Input(
                    "reuse",
                    default=1,
                    min=1,
                    max=20,
                    advanced=True,
                    tooltip="Looks at the subject once in so many steps, and uses that in the others. Faster, not exact.",
                ),
                _region_input(),
                AdapterType.Input(
                    "adapter",
                    optional=True,
                    tooltip="Weights that have a trained reference network, which then looks at the subject. Without one, or "
                    "with others, the model itself does.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, which looks at the subject.")],
        )

    @classmethod
    def execute(
        cls,
        model: io.Model.Type,
        subject: Subject,
        strength: float,
        start_percent: float,
        end_percent: float,
        reuse: int,
        mask: io.Mask.Type | None = None,
        adapter: Adapter | None = None,
    ) -> io.NodeOutput:
        check_window(start_percent, end_percent)
        log_noise("Refine", mask=mask)
        branch = None if adapter is None else adapter.branch
        settings = Refine(
            strength=strength,
            start_percent=start_percent,
            end_percent=end_percent,
            mask=mask,
            latents=subject.branch_latents(),
            is_one=subject.is_one,
            reuse=reuse,
            branch=branch,
            details=None if branch is None else subject.branch_details(branch.weight.shape[1]),
        )
        return io.NodeOutput(with_method(model, settings))


NODES = [
    TrueFillLoadSubjectAdapter,
    TrueFillLoadLARGen,
    TrueFillDemoSubjectModel,
    TrueFillEncodeSubject,
    TrueFillAssign,
    TrueFillRefine,
]
