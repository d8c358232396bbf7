"""A control branch in graphs that a running ComfyUI executes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from devtools.client import Client, GraphFailed
from devtools.server import Server
from truefill_testing import branch_files
from truefill_testing.graphs import SMALL_DREAMMIX, hole_in, node, picture, pictures, run_and_interrupt, scaled_photo
from truefill_testing.task_encoders import write_task_encoder

# Sizes that no VAE takes as they are.
WIDTH, HEIGHT = 181, 139
BRANCHES = {
    "brushnet.safetensors": (branch_files.BRUSHNET_SD15, 1),
    "brushnet_xl.safetensors": (branch_files.BRUSHNET_SDXL, 2),
    "powerpaint.safetensors": (branch_files.POWERPAINT, 1),
}


@pytest.fixture(scope="module", autouse=True)
def _files(comfyui: Server) -> None:
    folder = comfyui.base / "models" / "inpaint"
    folder.mkdir(parents=True, exist_ok=True)
    for name, (layout, resnets) in BRANCHES.items():
        state = branch_files.random_branch(branch_files.of_checkpoint(layout, resnets), 1)
        save_file(branch_files.in_half(state), folder / name)
    write_task_encoder(folder / "powerpaint_encoder.bin")
    save_file({"control_model.zero_convs.0.0.weight": torch.zeros(4, 4, 1, 1)}, folder / "control.safetensors")


def graph(
    checkpoint: str = "sd15", branch: str = "brushnet.safetensors", scale: float = 1.0, **changes: Any
) -> dict[str, Any]:
    inputs = {
        "model": ["checkpoint", 0],
        "branch": ["branch", 0],
        "image": ["picture", 0],
        "mask": ["photo", 1],
        "vae": ["checkpoint", 2],
        "preservation_scale": scale,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "layer_scale": 1.0,
        "attention_scale": 1.0,
    }
    return {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name=f"{checkpoint}.safetensors"),
        "branch": node("TrueFillLoadBranch", branch=branch),
        **scaled_photo(WIDTH, HEIGHT),
        "positive": node("CLIPTextEncode", clip=["checkpoint", 1], text="a cookie"),
        "negative": node("CLIPTextEncode", clip=["checkpoint", 1], text="blurry"),
        "conditions": node(
            "InpaintModelConditioning",
            positive=["positive", 0],
            negative=["negative", 0],
            vae=["checkpoint", 2],
            pixels=["picture", 0],
            mask=["photo", 1],
            noise_mask=True,
        ),
        "applied": node("TrueFillApplyBranch", **inputs | changes),
        "sampled": sampler(["applied", 0], ["conditions", 2]),
        "decoded": node("VAEDecode", samples=["sampled", 0], vae=["checkpoint", 2]),
        "save": node("PreviewImage", images=["decoded", 0]),
    }


def sampler(model: list[Any], latent: list[Any], seed: int = 1, steps: int = 2, denoise: float = 1.0) -> dict[str, Any]:
    return node(
        "KSampler",
        model=model,
        seed=seed,
        steps=steps,
        cfg=4.0,
        sampler_name="euler",
        scheduler="normal",
        positive=["conditions", 0],
        negative=["conditions", 1],
        latent_image=latent,
        denoise=denoise,
    )


def run(server: Client, of: dict[str, Any], output: str = "save") -> np.ndarray:
    return pictures(server.run(of).images[output])


@pytest.mark.parametrize(
    ("checkpoint", "branch"),
    [
        ("sd15", "brushnet.safetensors"),
        ("sd15-inpainting", "powerpaint.safetensors"),
        ("sdxl", "brushnet_xl.safetensors"),
    ],
)
def test_it_changes_the_hole_and_scale_0_nothing(server: Client, checkpoint: str, branch: str) -> None:
    plain = graph(checkpoint)
    plain["sampled"]["inputs"]["model"] = ["checkpoint", 0]
    del plain["applied"], plain["branch"]
    without = run(server, plain)
    made = run(server, graph(checkpoint, branch))
    assert made.shape == without.shape and (made != without).any()
    assert np.array_equal(run(server, graph(checkpoint, branch, 0.0)), without)
    assert np.array_equal(run(server, graph(checkpoint, branch)), made)


def test_outside_of_the_hole_nothing_is_touched(server: Client) -> None:
    of = graph()
    of["finished"] = node(
        "ImageCompositeMasked",
        destination=["picture", 0],
        source=["decoded", 0],
        mask=["photo", 1],
        x=0,
        y=0,
        resize_source=True,
    )
    of["save"] = node("PreviewImage", images=["finished", 0])
    images = server.run(of).images
    before, after = picture(images["save picture"][0]), picture(images["save"][0])
    hole = hole_in(images["save hole"][0], (HEIGHT, WIDTH))[0, 0].numpy()
    assert np.array_equal(after[hole == 0], before[hole == 0]) and (after[hole == 1] != before[hole == 1]).any()


def test_a_second_pass_at_a_higher_resolution_and_a_batch(server: Client) -> None:
    of = graph()
    of |= {
        "twice": node("RepeatLatentBatch", samples=["sampled", 0], amount=2),
        "larger": node("LatentUpscaleBy", samples=["twice", 0], upscale_method="bilinear", scale_by=1.5),
        "second": sampler(["applied", 0], ["larger", 0], denoise=0.6),
        "decoded second": node("VAEDecode", samples=["second", 0], vae=["checkpoint", 2]),
        "save second": node("PreviewImage", images=["decoded second", 0]),
    }
    made = run(server, of, "save second")
    # 22x17 cells, one and a half times.
    assert made.shape == (2, 208, 264, 3)
    other = graph(scale=0.0)
    other |= {name: of[name] for name in ("twice", "larger", "second", "decoded second", "save second")}
    assert not np.array_equal(run(server, other, "save second"), made)


def test_two_branches_a_lora_and_other_methods(server: Client) -> None:
    of = graph()
    of |= {
        "second branch": node("TrueFillLoadBranch", branch="powerpaint.safetensors"),
        "task": node("TrueFillPowerPaintPrompt", encoder="powerpaint_encoder.bin", task="removal", fitting=1.0),
        "both": node(
            "TrueFillApplyBranch",
            **{
                **of["applied"]["inputs"],
                "model": ["applied", 0],
                "branch": ["second branch", 0],
                "positive": ["task", 0],
                "negative": ["task", 1],
            },
        ),
        "painta": node(
            "TrueFillPAIntA", model=["both", 0], strength=1.0, start_percent=0.0, end_percent=1.0, smooth=True
        ),
        "boundary": node(
            "TrueFillSemanticBoundary", model=["painta", 0], strength=1.0, start_percent=0.0, end_percent=1.0
        ),
    }
    first = run(server, of)
    of["sampled"]["inputs"]["model"] = ["both", 0]
    both = run(server, of)
    of["sampled"]["inputs"]["model"] = ["boundary", 0]
    guided = run(server, of)
    assert (both != first).any() and (guided != both).any()


@pytest.mark.parametrize("first", [True, False], ids=["before it", "behind it"])
def test_beside_the_hosts_own_patches(server: Client, first: bool) -> None:
    """FreeU, Differential Diffusion, PAG and HyperTile, which BrushNet's pack for ComfyUI breaks or is broken by."""
    of = graph()
    names = {
        "freeu": node("FreeU_V2", model=["checkpoint", 0], b1=1.3, b2=1.4, s1=0.9, s2=0.2),
        "differential": node("DifferentialDiffusion", model=["freeu", 0]),
        "pag": node("PerturbedAttentionGuidance", model=["differential", 0], scale=3.0),
        "tiles": node("HyperTile", model=["pag", 0], tile_size=64, swap_size=2, max_depth=0, scale_depth=False),
    }
    of |= names
    if first:
        of["applied"]["inputs"]["model"] = ["tiles", 0]
    else:
        of["freeu"]["inputs"]["model"] = ["applied", 0]
        of["sampled"]["inputs"]["model"] = ["tiles", 0]
    both = run(server, of)
    assert (both != run(server, graph())).any()
    of["applied"]["inputs"]["preservation_scale"] = 0.0
    theirs = run(server, of)
    assert (both != theirs).any()
    of["sampled"]["inputs"]["model"] = ["tiles", 0]
    of["freeu"]["inputs"]["model"] = ["checkpoint", 0]
    assert np.array_equal(run(server, of), theirs)


def test_every_task_is_another_prompt(server: Client) -> None:
    made = []
    for task, fitting in (("text", 1.0), ("shape", 1.0), ("shape", 0.5), ("removal", 1.0), ("context", 1.0)):
        of = graph(branch="powerpaint.safetensors", positive=["task", 0], negative=["task", 1])
        of["task"] = node("TrueFillPowerPaintPrompt", encoder="powerpaint_encoder.bin", task=task, fitting=fitting)
        made.append(run(server, of))
    assert all((one != other).any() for index, one in enumerate(made) for other in made[:index])


def test_dreammix_takes_it_along(server: Client) -> None:
    of = graph()
    mixed = {
        "model": ["applied", 0],
        "positive": ["positive", 0],
        "negative": ["negative", 0],
        "vae": ["checkpoint", 2],
        "image": ["picture", 0],
        "mask": ["photo", 1],
        "seed": 1,
        "steps": 4,
        "cfg": 4.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        **SMALL_DREAMMIX,
        "denoise": 1.0,
    }
    of["mix"] = node("TrueFillDreamMix", **mixed)
    of["save mix"] = node("PreviewImage", images=["mix", 0])
    ours = run(server, of, "save mix")
    of["mix"] = node("TrueFillDreamMix", **mixed | {"model": ["checkpoint", 0]})
    assert ours.shape == (1, HEIGHT, WIDTH, 3) and not np.array_equal(run(server, of, "save mix"), ours)


def test_interrupted_and_run_again(server: Client) -> None:
    expected = run(server, graph())
    long = graph(scale=0.9)
    long["sampled"]["inputs"]["steps"] = 1000
    run_and_interrupt(server, long, "KSampler")
    server.run(graph(scale=0.8))
    assert np.array_equal(run(server, graph()), expected)


@pytest.mark.parametrize(
    ("of", "sentence"),
    [
        (graph("sdxl"), "an SD1.5 branch .BrushNet, .* and an SDXL MODEL"),
        (graph(branch="control.safetensors"), "control.safetensors is a ControlNet, but"),
        (
            graph(positive=["task", 0])
            | {"task": node("TrueFillPowerPaintPrompt", encoder="brushnet.safetensors", task="text", fitting=1.0)},
            "brushnet.safetensors is a branch, but the text encoder of PowerPaint's branch is needed",
        ),
    ],
    ids=["another family", "a ControlNet", "no encoder"],
)
def test_a_mistake_is_answered_in_one_sentence(server: Client, of: dict[str, Any], sentence: str) -> None:
    with pytest.raises(GraphFailed, match=sentence) as failed:
        server.run(of)
    assert "\n" not in failed.value.message.strip()
