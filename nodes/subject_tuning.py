"""DreamMix's subject tuning: a dictionary of a subject's attributes, and a LoRA that is trained on its pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import numpy as np
import safetensors.torch
import torch
from comfy_api.latest import io
from comfy_execution.graph import ExecutionBlocker
from PIL import Image

from ..imaging.attribute_dictionary import parse, regular_prompts, subject_prompts, to_json, words
from ..imaging.masks import log_noise
from ..imaging.pictures import check_pictures
from ..model_patches.core.prompt_tokens import encode_prompt
from ..training.curves import draw_curves
from ..training.subject_lora.examples import encode_example, training_size
from ..training.subject_lora.files import go_on, identity_of, keep_unfinished, lora_file, write_lora
from ..training.subject_lora.sampling import sample_picture
from ..training.subject_lora.tuning import Example, Tuner, Tuning
from .announce import announcer
from .schema import seed_input

_EXAMPLE = '{"class": "toy", "attributes": {"color": ["red"], "material": ["clay"]}}'
TOKEN = "sks"
_GIGABYTE = 1 << 30
_PREVIEW = 512
"""Longest side of a picture that is shown while the training goes on, in pixels."""
_MASKS = {"subject": 10, "regular": 3}
"""Training masks that are drawn for a picture, as in the release."""


class TrueFillAttributeDictionary(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillAttributeDictionary",
            display_name="Attribute Dictionary (TrueFill)",
            category="TrueFill/3 condition",
            description="What a subject is, and what it is like: typed by hand, or what any captioner says. Gives prompts for "
            "its own pictures and regular ones, and its attributes for Substitute Attribute (DreamMix's attribute decoupling).",
            search_aliases=[
                "dreammix",
                "ADM",
                "attribute decoupling",
                "subject",
                "dreambooth",
                "captions",
                "lora training",
            ],
            inputs=[
                io.String.Input(
                    "dictionary",
                    multiline=True,
                    default=_EXAMPLE,
                    tooltip="JSON with the class and the attributes, by kind; 'alternatives' may say what else each kind could "
                    "be. Text around it does not matter.",
                ),
                io.String.Input(
                    "token",
                    default=TOKEN,
                    tooltip="The subject's own word, which means nothing else. It is in its own prompts, never in regular ones.",
                ),
                io.Int.Input("regular", default=8, min=1, max=1000, tooltip="How many prompts for regular pictures."),
                seed_input("Which attributes the regular prompts have."),
            ],
            outputs=[
                io.String.Output(display_name="DICTIONARY", tooltip="The dictionary, tidied, for Train Subject."),
                io.String.Output(
                    display_name="SUBJECT_PROMPTS", is_output_list=True, tooltip="What Train Subject calls the subject."
                ),
                io.String.Output(
                    display_name="REGULAR_PROMPTS",
                    is_output_list=True,
                    tooltip="For regular pictures of the class, by your own model: a list, so that what follows runs for each.",
                ),
                io.String.Output(display_name="ATTRIBUTES", tooltip="All attributes, for Substitute Attribute."),
            ],
        )

    @classmethod
    def execute(cls, dictionary: str, token: str, regular: int, seed: int) -> io.NodeOutput:
        found = parse(dictionary)
        return io.NodeOutput(
            to_json(found),
            subject_prompts(found, token),
            regular_prompts(found, regular, seed % (1 << 32)),
            ", ".join(words(found)),
        )


class TrueFillTrainSubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TrueFillTrainSubject",
            display_name="Train Subject (TrueFill)",
            category="TrueFill/0 load",
            description="Trains a LoRA on a few pictures of a subject, on your own SD1.5, SD2 or SDXL model, inpainting or "
            "plain, as DreamMix does: its prompts name its attributes, so that they can be changed afterwards. Writes it into "
            "models/loras, for every LoRA loader. A run that was stopped goes on when it is queued again.",
            search_aliases=["dreammix", "dreambooth", "lora", "train lora", "fine-tune", "finetune", "personalization"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to tune. It stays as it is; its other LoRAs are seen."),
                io.Clip.Input("clip", tooltip="Its CLIP, which is not trained."),
                io.Vae.Input("vae", tooltip="Its VAE."),
                io.Image.Input(
                    "images", tooltip="Two or more pictures of the subject; a batch, or a list of any sizes."
                ),
                io.Mask.Input(
                    "masks", tooltip="Where the subject is: one mask for each picture, all that is not black."
                ),
                io.String.Input(
                    "dictionary",
                    multiline=True,
                    default=_EXAMPLE,
                    tooltip="What the subject is and what it is like, from Attribute Dictionary, or typed.",
                ),
                io.String.Input("token", default=TOKEN, tooltip="The subject's own word, which calls it afterwards."),
                io.String.Input("name", default="my_subject", tooltip="Of the LoRA's file. None is overwritten."),
                io.Int.Input(
                    "steps", default=1000, min=1, max=100000, tooltip="Steps of the optimizer; the paper takes 1000."
                ),
                io.Int.Input(
                    "native_size",
                    default=1024,
                    min=64,
                    max=4096,
                    step=64,
                    tooltip="What the model was trained on: 1024 for SDXL, 512 for SD1.5. Pictures get about this number squared "
                    "of pixels, in their own shape.",
                ),
                seed_input("Of the first weights, the masks, and what each step sees."),
                io.Float.Input(
                    "learning_rate",
                    default=1e-4,
                    min=0.0,
                    max=1.0,
                    step=1e-5,
                    round=1e-7,
                    advanced=True,
                    tooltip="Adam's.",
                ),
                io.Int.Input(
                    "rank", default=4, min=1, max=256, advanced=True, tooltip="Of the LoRA; its alpha is the same."
                ),
                io.Boolean.Input(
                    "outputs",
                    default=False,
                    advanced=True,
                    tooltip="Adapts the attentions' output projections as well as keys and values, as the authors' code does.",
                ),
                io.Int.Input(
                    "accumulate",
                    default=4,
                    min=1,
                    max=64,
                    advanced=True,
                    tooltip="Pictures to a step, one after another.",
                ),
                io.Float.Input(
                    "inside",
                    default=1.5,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    advanced=True,
                    tooltip="What an error in the training mask counts. The authors' code has 2.25.",
                ),
                io.Float.Input(
                    "outside",
                    default=0.7,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    advanced=True,
                    tooltip="What an error around it counts. The authors' code has 0.36.",
                ),
                io.Float.Input(
                    "regular_weight",
                    default=0.4,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    advanced=True,
                    tooltip="What a regular picture counts.",
                ),
                io.Int.Input(
                    "keep_every",
                    default=50,
                    min=1,
                    max=100000,
                    advanced=True,
                    tooltip="After so many steps what has been learned is kept, to go on from after a crash. An interrupt keeps "
                    "it as well.",
                ),
                io.Boolean.Input(
                    "save_memory",
                    default=True,
                    advanced=True,
                    tooltip="Keeps little of each block and computes it again, which is slower.",
                ),
                io.Image.Input(
                    "regular_images",
                    optional=True,
                    tooltip="Pictures of the class that are not the subject, by your own model: they keep the rest of it.",
                ),
                io.Mask.Input("regular_masks", optional=True, tooltip="Where the thing is in each of them."),
                io.String.Input(
                    "regular_prompts",
                    optional=True,
                    force_input=True,
                    tooltip="Their prompts, a list or one on each line.",
                ),
                io.Int.Input(
                    "sample_every",
                    optional=True,
                    default=100,
                    min=0,
                    max=100000,
                    advanced=True,
                    tooltip="After so many steps a picture is made with what has been learned so far, and shown; 0 makes none.",
                ),
                io.String.Input(
                    "sample_prompt",
                    optional=True,
                    default="",
                    advanced=True,
                    tooltip="Of these pictures. Empty: the first of the subject's own prompts.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the LoRA on it."),
                io.String.Output(display_name="LORA", tooltip="The name of its file."),
                io.Image.Output(display_name="LOSS", tooltip="How the loss went."),
                io.Image.Output(
                    display_name="SAMPLES",
                    tooltip="A batch: the pictures that were made on the way, from the same noise.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, **given: list[Any]) -> io.NodeOutput:
        lists = ("images", "masks", "regular_images", "regular_masks", "regular_prompts")
        one = {name: values[0] for name, values in given.items() if name not in lists}
        announce = announcer(cls.hidden.unique_id)
        folder = Path(folder_paths.get_folder_paths("loras")[0])
        file = lora_file(folder, one["name"])
        found = parse(one["dictionary"])
        called = subject_prompts(found, one["token"])
        tuning = Tuning(
            steps=one["steps"],
            accumulate=one["accumulate"],
            learning_rate=one["learning_rate"],
            rank=one["rank"],
            outputs=one["outputs"],
            inside=one["inside"],
            outside=one["outside"],
            regular_weight=one["regular_weight"],
            seed=one["seed"],
            recompute=one["save_memory"],
        )
        model = one["model"]
        tuner = Tuner(model, tuning)
        log_noise("Train Subject", masks=given["masks"][0])
        pictures, masks = _one_by_one(given["images"], "'images'"), _masks(given["masks"])
        _same_count("images", len(pictures), "masks", len(masks))
        prompts = [encode_prompt(one["clip"], text) for text in called]

        def encoded(kind: str, picture: torch.Tensor, mask: torch.Tensor, of: Sequence[Any], number: int) -> Example:
            seed = (one["seed"] + number) % (1 << 32)
            inpainting = bool(model.model.concat_keys)
            return encode_example(picture, mask, of, one["vae"], one["native_size"], _MASKS[kind], seed, inpainting)

        subject = [encoded("subject", *pair, prompts, k) for k, pair in enumerate(zip(pictures, masks, strict=True))]
        regular = _regular(given, one["clip"], encoded)
        if len(pictures) == 1:
            announce("Train Subject: there is one picture of the subject; DreamMix takes several.")
        size = training_size(pictures[0].shape[0], pictures[0].shape[1], one["native_size"])
        announce(
            f"Train Subject: {tuner.count} weights learn from {len(subject)} pictures and {len(regular)} regular ones of "
            f"{size[1]}x{size[0]}."
        )
        there: Any = comfy.model_management.get_total_memory(model.load_device)
        announce(memory_notice(model.model_size() + tuner.memory([*subject, *regular]), there, tuning.recompute))
        prompt = encode_prompt(one["clip"], one.get("sample_prompt", "").strip() or called[0])
        negative = encode_prompt(one["clip"], "")

        def sample() -> torch.Tensor:
            return sample_picture(model, tuner, one["vae"], prompt, negative, subject[0], one["seed"])

        losses, samples = _run(
            tuner, tuning, file, subject, regular, one["keep_every"], announce, one.get("sample_every", 100), sample
        )
        write_lora(file, tuner, f"{one['token']} {found.class_word}")
        lora = safetensors.torch.load_file(str(file.path))
        tuned, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
        curve = draw_curves(losses, file.path.stem)
        picture = torch.from_numpy(np.asarray(curve, dtype=np.float32) / 255.0)[None]
        return io.NodeOutput(tuned, file.path.name, picture, torch.cat(samples) if samples else ExecutionBlocker(None))


def memory_notice(needed: int, there: int, saves: bool) -> str:
    """What a training holds of a device's memory, in bytes, and what to do where that is more than there is."""
    text = (
        f"Train Subject: with the model this holds about {needed / _GIGABYTE:.1f} of {there / _GIGABYTE:.1f} GB, and the "
        "kernels' workspaces on top."
    )
    if needed <= there:
        return text
    cure = "take a smaller 'native_size'" if saves else "turn 'save_memory' on, or take a smaller 'native_size'"
    return f"{text} That is more than there is, and will be slow or fail: {cure}."


def _run(
    tuner: Tuner,
    tuning: Tuning,
    file: Any,
    subject: Sequence[Example],
    regular: Sequence[Example],
    keep_every: int,
    announce: Any,
    sample_every: int,
    sample: Callable[[], torch.Tensor],
) -> tuple[list[dict[str, float]], list[torch.Tensor]]:
    """Trains to the end, from where an unfinished run was; what has been learned is kept now and then, and at an interrupt.

    Every `sample_every` steps, and at the end, a picture is made and shown; 0 makes none. Returns the losses and the pictures.
    """
    identity = identity_of(tuning, subject, regular)
    if go_on(file, tuner, identity):
        announce(f"Train Subject: goes on from step {tuner.step} of {tuning.steps}.")
    bar = comfy.utils.ProgressBar(tuning.steps)
    losses: list[dict[str, float]] = []
    samples: list[torch.Tensor] = []
    first, started, told = tuner.step, time.monotonic(), 0.0

    def report(step: int, loss: float) -> None:
        nonlocal told
        losses.append({"step": step, "loss": loss})
        bar.update_absolute(step, tuning.steps)
        if step % keep_every == 0 and step < tuning.steps:
            keep_unfinished(file, tuner, identity)
        now = time.monotonic()
        if now - told > 1.0 or step == tuning.steps:
            told = now
            left = (now - started) / (step - first) * (tuning.steps - step)
            recent = [of["loss"] for of in losses[-20:]]
            announce(
                f"Train Subject: step {step} of {tuning.steps}, loss {sum(recent) / len(recent):.4f}, {left / 60:.0f} min left."
            )

    try:
        while tuner.step < tuning.steps:
            until = (tuner.step // sample_every + 1) * sample_every if sample_every else tuning.steps
            tuner.run(subject, regular, report, min(until, tuning.steps))
            if sample_every:
                samples.append(sample())
                shown = Image.fromarray((samples[-1][0].clamp(0.0, 1.0) * 255.0).round().byte().cpu().numpy())
                bar.update_absolute(tuner.step, tuning.steps, ("JPEG", shown, _PREVIEW))
    except BaseException:
        if tuner.step > first:
            keep_unfinished(file, tuner, identity)
        raise
    # A run that had been finished, but for its file, has nothing to report.
    return losses or [{"step": tuner.step, "loss": float("nan")}], samples


def _regular(given: dict[str, list[Any]], clip: Any, encoded: Any) -> list[Example]:
    names = ("regular_images", "regular_masks", "regular_prompts")
    parts = {name: [of for of in given.get(name) or [] if of is not None] for name in names}
    missing = [name for name, values in parts.items() if not values]
    if len(missing) == len(names):
        return []
    if missing:
        raise ValueError(
            f"Train Subject has no {' and no '.join(missing)}: regular pictures need all three of {', '.join(names)}, or none."
        )
    pictures, masks = _one_by_one(parts["regular_images"], "'regular_images'"), _masks(parts["regular_masks"])
    prompts = [line.strip() for text in parts["regular_prompts"] for line in text.splitlines() if line.strip()]
    _same_count("regular_images", len(pictures), "regular_masks", len(masks))
    _same_count("regular_images", len(pictures), "regular_prompts", len(prompts))
    return [
        encoded("regular", picture, mask, [encode_prompt(clip, prompt)], 1000 + number)
        for number, (picture, mask, prompt) in enumerate(zip(pictures, masks, prompts, strict=True))
    ]


def _one_by_one(batches: Sequence[torch.Tensor], name: str) -> list[torch.Tensor]:
    for batch in batches:
        check_pictures(batch, name)
    return [picture for batch in batches for picture in batch]


def _masks(batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [mask for batch in batches for mask in batch.reshape(-1, *batch.shape[-2:])]


def _same_count(first: str, count: int, second: str, other: int) -> None:
    if count != other:
        raise ValueError(f"There are {count} {first} and {other} {second}: each picture needs one.")


NODES = [TrueFillAttributeDictionary, TrueFillTrainSubject]
