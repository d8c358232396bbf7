"""The nodes for masks, regions and finishing in graphs that a running ComfyUI executes."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from devtools.client import Client, GraphFailed
from devtools.pack import pack_module
from devtools.server import Server
from truefill_testing.graphs import node, picture

morphology = pack_module("imaging.morphology")
WIDTH, HEIGHT = 200, 152


def crop(**inputs: Any) -> dict[str, Any]:
    return node(
        "TrueFillCropRegion",
        **{
            "image": ["picture", 0],
            "mask": ["mask", 0],
            "native_size": 128,
            "context_percent": 50.0,
            "feather": 6.0,
            "context_pixels": 16,
            "min_side": 32,
            "max_upscale": 4.0,
            "max_aspect": 2.0,
            "multiple": 8,
            "width": 0,
            "height": 0,
            "framing": "as set above",
            "fill_box": False,
            **inputs,
        },
    )


def stitch(**inputs: Any) -> dict[str, Any]:
    defaults = {"harmonize": "off", "color": "mean", "band": 16, "mixed_gradients": False}
    return node("TrueFillStitchRegion", **{"image": ["crop", 0], "region": ["crop", 2], **defaults, **inputs})


def harmonized(**inputs: Any) -> dict[str, Any]:
    pictures = {"image": ["picture", 0], "original": ["picture", 0], "mask": ["mask", 0]}
    defaults = {"harmonize": "both", "color": "mean", "band": 16, "mixed_gradients": False}
    return node("TrueFillHarmonize", **pictures | defaults | inputs)


def aligned(**inputs: Any) -> dict[str, Any]:
    defaults = {"match_tone": True, "sensitivity": 1.0, "grow": 4, "feather": 8}
    harmony = {"harmonize": "color", "color": "mean", "band": 16, "mixed_gradients": False}
    return node("TrueFillAlignEdit", original=["picture", 0], edited=["moved", 0], **defaults | harmony | inputs)


def test_an_edit_is_laid_over_its_original(server: Client) -> None:
    """Scaled by a node of the host, with another tone and a white square in it."""
    graph = {
        **base(),
        "square": node("EmptyImage", width=24, height=20, batch_size=1, color=0xFFFFFF),
        "edit": node(
            "ImageCompositeMasked", destination=["picture", 0], source=["square", 0], x=60, y=70, resize_source=False
        ),
        "toned": node("ImageBlend", image1=["edit", 0], image2=["edit", 0], blend_factor=0.1, blend_mode="multiply"),
        "moved": node(
            "ImageScale", image=["toned", 0], width=208, height=160, upscale_method="lanczos", crop="disabled"
        ),
        "align": aligned(),
        "said": node("PreviewAny", source=["align", 3]),
        "save": node("PreviewImage", images=["align", 0]),
        "save picture": node("PreviewImage", images=["picture", 0]),
        "as picture": node("MaskToImage", mask=["align", 2]),
        "save mask": node("PreviewImage", images=["as picture", 0]),
    }
    made = server.run(graph)
    result, original, mask = (picture(made.images[name][0]) for name in ("save", "save picture", "save mask"))
    taken = mask[..., 0] > 0
    assert taken[70:90, 60:84].all() and taken.mean() < 0.15
    assert np.array_equal(result[~taken], original[~taken]) and result[75:85, 65:79].min() > 0.9 * result.max()


def test_two_pictures_that_have_nothing_in_common(server: Client, comfyui: Server) -> None:
    graph = {
        **base(),
        "moved": node("TrueFillExamplePhoto", photo="toy scene"),
        "align": aligned(),
        "save": node("PreviewImage", images=["align", 1]),
        "save edit": node("PreviewImage", images=["moved", 0]),
    }
    made = server.run(graph)
    assert np.array_equal(picture(made.images["save"][0]), picture(made.images["save edit"][0]))
    assert "Align Edit: the two pictures have nothing in common" in comfyui.log.read_text(encoding="utf-8")


def base() -> dict[str, Any]:
    """A picture of odd size and a small mask."""
    return {
        "photo": node("TrueFillExamplePhoto", photo="coffee"),
        "picture": node(
            "ImageScale", image=["photo", 0], upscale_method="area", width=WIDTH, height=HEIGHT, crop="disabled"
        ),
        "hole": node("MaskToImage", mask=["photo", 1]),
        "mask scaled": node(
            "ImageScale",
            image=["hole", 0],
            upscale_method="nearest-exact",
            width=WIDTH,
            height=HEIGHT,
            crop="disabled",
        ),
        "mask": node("ImageToMask", image=["mask scaled", 0], channel="red"),
        "save picture": node("PreviewImage", images=["picture", 0]),
    }


def shown(graph: dict[str, Any], **masks: list[Any]) -> dict[str, Any]:
    """The graph with a picture of each of these masks."""
    for name, source in masks.items():
        graph[f"{name} image"] = node("MaskToImage", mask=source)
        graph[f"save {name}"] = node("PreviewImage", images=[f"{name} image", 0])
    return graph


def test_masks_are_grown_and_feathered(server: Client) -> None:
    graph = base()
    graph["grown"] = node("TrueFillGrowMask", mask=["mask", 0], pixels=7.0)
    graph["soft"] = node("TrueFillFeatherMask", mask=["mask", 0], pixels=8.0, where="outside", curve="linear")
    names = {"mask": ["mask", 0], "grown": ["grown", 0], "soft": ["soft", 0]}
    images = server.run(shown(graph, **names)).images
    seen = {name: picture(images[f"save {name}"][0])[..., 0] for name in names}
    mask = torch.from_numpy(seen["mask"].copy()).float()[None] / 255
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    expected = {
        "grown": morphology.grow(mask, 7.0),
        "soft": morphology.feather(mask, 8.0, "outside", "linear"),
    }
    for name, value in expected.items():
        assert np.abs(seen[name] - 255 * value[0, 0].numpy()).max() <= 1.0, name


BODY, WHISKER = np.s_[8:48, 8:48], np.s_[20:21, 48:60]
SMALL_ISLAND, LARGE_ISLAND = np.s_[14:17, 14:17], np.s_[26:34, 26:34]
SPECK, SPOT = np.s_[56:58, 80:82], np.s_[4:9, 70:75]


def drawn(*hole: tuple[slice, slice], known: tuple[tuple[slice, slice], ...] = ()) -> np.ndarray:
    mask = np.zeros((64, 96), dtype=np.uint8)
    for value, parts in ((255, hole), (0, known)):
        for part in parts:
            mask[part] = value
    return mask


def test_masks_are_cleaned_as_each_input_says(server: Client) -> None:
    islands = (SMALL_ISLAND, LARGE_ISLAND)
    mask = drawn(BODY, WHISKER, SPECK, SPOT, known=islands)
    as_tensor = torch.from_numpy(mask)[None] / 255
    smoothed, hull = morphology.stabilise(as_tensor, 2.0), morphology.convex_hull(as_tensor)
    cases: dict[str, tuple[dict[str, Any], np.ndarray]] = {
        "as it is": ({}, mask),
        "specks": ({"remove_specks": 25}, drawn(BODY, WHISKER, SPOT, known=islands)),
        "islands": ({"fill_islands": 9}, drawn(BODY, WHISKER, SPECK, SPOT, known=(LARGE_ISLAND,))),
        "smooth": ({"smooth": 2.0}, 255 * smoothed[0, 0].numpy()),
        "box": ({"shape": "box"}, drawn(np.s_[4:58, 8:82])),
        "hull": ({"shape": "convex hull"}, 255 * hull[0, 0].numpy()),
        # The disc that smooths reaches one pixel into the whisker.
        "box at the end": ({"remove_specks": 26, "smooth": 1.0, "shape": "box"}, drawn(np.s_[8:48, 8:49])),
    }
    file = io.BytesIO()
    # In colors: the host reads the white of a grey PNG as 254.
    Image.fromarray(mask).convert("RGB").save(file, "PNG")
    graph = {
        "picture": node("LoadImage", image=server.upload_image(file.getvalue(), "drawn.png")),
        "mask": node("ImageToMask", image=["picture", 0], channel="red"),
    }
    off = {"mask": ["mask", 0], "remove_specks": 0, "fill_islands": 0, "smooth": 0.0, "shape": "as it is"}
    for name, (inputs, _) in cases.items():
        graph[name] = node("TrueFillCleanMask", **{**off, **inputs})
    images = server.run(shown(graph, **{name: [name, 0] for name in cases})).images
    for name, (_, expected) in cases.items():
        assert np.array_equal(picture(images[f"save {name}"][0])[..., 0], expected), name


@pytest.mark.parametrize("native", [64, 128, 256], ids=["smaller", "about the same", "larger"])
@pytest.mark.parametrize("harmonize", ["off", "both"])
def test_what_is_stitched_back_changes_the_hole_alone(server: Client, native: int, harmonize: str) -> None:
    graph = base() | {"crop": crop(native_size=native)}
    graph["other"] = node("ImageInvert", image=["crop", 0])
    graph["stitch"] = stitch(image=["other", 0], harmonize=harmonize)
    graph["save crop"] = node("PreviewImage", images=["crop", 0])
    graph["save"] = node("PreviewImage", images=["stitch", 0])
    images = server.run(shown(graph, mask=["mask", 0], changed=["stitch", 1])).images
    before, after, hole, changed = (
        picture(images[name][0]) for name in ("save picture", "save", "save mask", "save changed")
    )
    small = picture(images["save crop"][0])
    assert small.shape[0] % 8 == small.shape[1] % 8 == 0
    assert 0.6 * native**2 < small.shape[0] * small.shape[1] < 1.5 * native**2
    # The hole and its soft edge.
    touched = morphology.grow(torch.from_numpy(hole[..., 0].copy()).float()[None] / 255, 7.0)[0, 0].numpy() > 0
    assert np.array_equal(after[~touched], before[~touched])
    assert (after[hole[..., 0] > 0] != before[hole[..., 0] > 0]).any(axis=1).mean() > 0.9
    # What the node says may have changed is all that has, and no more than the hole and its edge.
    assert set(np.unique(changed)) == {0, 255}
    assert np.array_equal(after[changed[..., 0] == 0], before[changed[..., 0] == 0])
    assert touched[changed[..., 0] > 0].all() and (changed[..., 0][hole[..., 0] > 0] == 255).all()


def test_an_unchanged_crop_goes_back_bit_for_bit(server: Client) -> None:
    # The whole picture is the region, and its size is what the model wants.
    graph = base() | {"crop": crop(context_percent=1000.0, width=WIDTH, height=HEIGHT), "stitch": stitch()}
    graph["save"] = node("PreviewImage", images=["stitch", 0])
    images = server.run(graph).images
    assert np.array_equal(picture(images["save"][0]), picture(images["save picture"][0]))


def test_several_results_of_one_crop_and_a_batch_of_pictures(server: Client) -> None:
    graph = base() | {"crop": crop()}
    graph["seeds"] = node("RepeatImageBatch", image=["crop", 0], amount=3)
    graph["stitch"] = stitch(image=["seeds", 0], harmonize="color")
    graph["save"] = node("PreviewImage", images=["stitch", 0])
    assert len(server.run(graph).images["save"]) == 3
    graph = base()
    graph["pictures"] = node("RepeatImageBatch", image=["picture", 0], amount=2)
    graph |= {"crop": crop(image=["pictures", 0]), "stitch": stitch()}
    graph["save"] = node("PreviewImage", images=["stitch", 0])
    assert len(server.run(graph).images["save"]) == 2


@pytest.mark.parametrize("method", ["blurred", "edge", "mean", "noise", "gray"])
def test_the_hole_is_filled_and_nothing_else(server: Client, method: str) -> None:
    graph = base()
    graph["filled"] = node("TrueFillFillHole", image=["picture", 0], mask=["mask", 0], method=method, seed=0)
    graph["save"] = node("PreviewImage", images=["filled", 0])
    images = server.run(shown(graph, mask=["mask", 0])).images
    before, after, hole = (picture(images[name][0]) for name in ("save picture", "save", "save mask"))
    inside = hole[..., 0] == 255
    assert np.array_equal(after[~inside], before[~inside])
    assert (after[inside] != before[inside]).any(axis=1).mean() > 0.9


@pytest.mark.parametrize("mode", ["off", "color", "poisson", "both"])
def test_harmonize_takes_the_tone_shift_out(server: Client, mode: str) -> None:
    graph = base()
    graph["grey"] = node("EmptyImage", width=WIDTH, height=HEIGHT, batch_size=1, color=0x808080)
    graph["shifted"] = node(
        "ImageBlend", image1=["picture", 0], image2=["grey", 0], blend_factor=0.1, blend_mode="normal"
    )
    graph["harmonized"] = harmonized(image=["shifted", 0], harmonize=mode, color="covariance", band=24)
    graph["save"] = node("PreviewImage", images=["harmonized", 0])
    graph["save shifted"] = node("PreviewImage", images=["shifted", 0])
    images = server.run(shown(graph, mask=["mask", 0])).images
    before, after, shifted, hole = (
        picture(images[name][0]).astype(float) for name in ("save picture", "save", "save shifted", "save mask")
    )
    inside = hole[..., 0] == 255
    assert np.array_equal(after[~inside], before[~inside])
    error, start = np.abs(after - before)[inside].mean(), np.abs(shifted - before)[inside].mean()
    assert start > 2
    assert error < 0.5 * start if mode != "off" else error == pytest.approx(start, abs=0.6)


MISTAKES = {
    "half a size": ({"crop": crop(width=128)}, r"The crop's size is 128 x 0: give both"),
    "a size that is no multiple": (
        {"crop": crop(width=128, height=72, multiple=64)},
        r"The crop's size is 128 x 72, but both have to be a multiple of 64\.",
    ),
    "a model smaller than a step": (
        {"crop": crop(native_size=64, multiple=128)},
        r"native_size is 64, but must be at least the multiple, 128",
    ),
    "pictures of two sizes": (
        {
            "small": node("EmptyImage", width=64, height=64, batch_size=1, color=0),
            "stitch": harmonized(image=["small", 0]),
        },
        r"'image' is 64x64 pixels and 'original' 200x152: they have to be of one size",
    ),
    "two results for three crops": (
        {
            "pictures": node("RepeatImageBatch", image=["picture", 0], amount=3),
            "crop": crop(image=["pictures", 0]),
            "two": node("RepeatImageBatch", image=["picture", 0], amount=2),
            "stitch": stitch(image=["two", 0]),
        },
        r"'image' is a batch of 2, but the region has 3 crops: a batch of 3 is needed",
    ),
    "three pictures and two masks": (
        {
            "pictures": node("RepeatImageBatch", image=["picture", 0], amount=3),
            "two": node("RepeatImageBatch", image=["mask scaled", 0], amount=2),
            "masks": node("ImageToMask", image=["two", 0], channel="red"),
            "crop": crop(image=["pictures", 0], mask=["masks", 0]),
        },
        r"These batches don't go together: 3 in 'image', 2 in 'mask'; each has to have 1 or 3\.",
    ),
    "as many to harmonize": (
        {
            "three": node("RepeatImageBatch", image=["picture", 0], amount=3),
            "two": node("RepeatImageBatch", image=["picture", 0], amount=2),
            "stitch": harmonized(image=["three", 0], original=["two", 0]),
        },
        r"These batches don't go together: 3 in 'image', 2 in 'original', 1 in 'mask'; each has to have 1 or 3\.",
    ),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_a_mistake_is_answered_in_one_sentence(server: Client, mistake: str) -> None:
    nodes, message = MISTAKES[mistake]
    graph = base() | {"crop": crop(), "stitch": stitch()} | copy.deepcopy(nodes)
    graph["save"] = node("PreviewImage", images=["stitch", 0])
    with pytest.raises(GraphFailed, match=message) as failed:
        server.run(graph)
    assert "\n" not in failed.value.message.strip()


SIDE, BOX = 256, {"x": 80, "y": 80}
BOX_SIDE = 64


def toy(background: float, box: float) -> dict[str, Any]:
    """The toy scene and a mask of one box on a background."""
    return {
        "photo": node("TrueFillExamplePhoto", photo="toy scene"),
        "background": node("SolidMask", value=background, width=SIDE, height=SIDE),
        "box": node("SolidMask", value=box, width=BOX_SIDE, height=BOX_SIDE),
        "mask": node("MaskComposite", destination=["background", 0], source=["box", 0], operation="add", **BOX),
    }


@pytest.mark.parametrize("feather", [0.0, 16.0])
@pytest.mark.parametrize("background", [0.0, 0.004])
@pytest.mark.parametrize("grey", [0.498, 1.0])
def test_a_grey_hole_is_a_hole_with_and_without_a_feather(
    server: Client, grey: float, background: float, feather: float
) -> None:
    graph = toy(background, grey - background) | {
        "crop": crop(image=["photo", 0], native_size=256, feather=feather, context_pixels=32, min_side=128),
        "other": node("ImageInvert", image=["crop", 0]),
        "stitch": stitch(image=["other", 0]),
        "compare": node("TrueFillCompare", before=["photo", 0], after=["stitch", 0], mask=["stitch", 1]),
    }
    (figures,) = server.run(graph).outputs["compare"]["text"]
    outside, inside = figures.split("\n")
    mask = torch.zeros(SIDE, SIDE)
    mask[BOX["y"] : BOX["y"] + BOX_SIDE, BOX["x"] : BOX["x"] + BOX_SIDE] = 1.0
    # The faint end of the soft edge is noise like any other.
    assert pixels_of(inside) == int((morphology.feather(mask, feather, "outside", "smooth") > 2.5 / 255).sum())
    assert outside == f"Outside the mask: none of {SIDE**2 - pixels_of(inside):,} pixels changed."
    # Of a pixel's channels one differs from its inverse by more than a third.
    assert float(re.findall(r"max ([\d.]+)", inside)[0]) > 85 * (1.0 if feather else grey)


def pixels_of(figures: str) -> int:
    return int(re.findall(r"of ([\d,]+) pixels", figures)[0].replace(",", ""))


def test_pilot_fills_a_box_on_a_background_that_is_nearly_black(server: Client) -> None:
    graph = toy(0.004, 1.0) | {
        "demo": node("TrueFillDemoModel", kind="text-to-image"),
        "positive": node(
            "TrueFillEncodePrompt", clip=["demo", 1], prompt="a pink ring", quality_suffix=False, suffix=""
        ),
        "negative": node("CLIPTextEncode", clip=["demo", 1], text=""),
        "pilot": node(
            "TrueFillPILOT",
            model=["demo", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            vae=["demo", 2],
            image=["photo", 0],
            mask=["mask", 0],
            seed=1,
            steps=2,
            cfg=7.5,
            scheduler="ddim_uniform",
            preset="text",
            coherence=1,
            interval=2,
            iterations=1,
            learning_rate=0.025,
            first_rate=0.007,
            momentum=0.7,
            coefficient=150,
            boundary=1,
            memory="auto",
            feather=0,
        ),
        "compare": node("TrueFillCompare", before=["photo", 0], after=["pilot", 1], mask=["mask", 0]),
    }
    (figures,) = server.run(graph).outputs["compare"]["text"]
    outside, inside, note = figures.split("\n")
    assert outside == f"Outside the mask: none of {SIDE**2 - BOX_SIDE**2:,} pixels changed."
    assert pixels_of(inside) == BOX_SIDE**2 and "changed (" in inside
    assert note == "The mask has a background that is mostly not black, but at most 2/255, which counts as known."


THIN = {"1 x N": (1, 300), "N x 1": (300, 1), "8 x 4096": (8, 4096)}


@pytest.mark.parametrize("size", list(THIN))
def test_very_thin_pictures_go_through_every_node(server: Client, size: str) -> None:
    height, width = THIN[size]
    graph = {
        "picture": node("EmptyImage", width=width, height=height, batch_size=1, color=0x406080),
        "known": node("SolidMask", value=0.0, width=width, height=height),
        "hole": node("SolidMask", value=1.0, width=max(1, width // 8), height=max(1, height // 8)),
        "drawn": node(
            "MaskComposite",
            destination=["known", 0],
            source=["hole", 0],
            x=width // 2,
            y=height // 2,
            operation="add",
        ),
        "grown": node("TrueFillGrowMask", mask=["drawn", 0], pixels=3.0),
        "soft": node("TrueFillFeatherMask", mask=["grown", 0], pixels=4.0, where="outside", curve="smooth"),
        "shaped": node("TrueFillMaskShape", mask=["soft", 0], shape="irregular", seed=0, growth=0.25, strokes=4),
        "mask": node(
            "TrueFillCleanMask", mask=["shaped", 0], remove_specks=2, fill_islands=9, smooth=0.0, shape="convex hull"
        ),
        "filled": node("TrueFillFillHole", image=["picture", 0], mask=["mask", 0], method="blurred", seed=0),
        "crop": crop(image=["filled", 0], native_size=512, feather=16.0),
        "other": node("ImageInvert", image=["crop", 0]),
        "stitch": stitch(image=["other", 0], harmonize="both"),
        "harmonized": harmonized(image=["stitch", 0], original=["picture", 0], mask=["soft", 0]),
        "compare": node("TrueFillCompare", before=["picture", 0], after=["harmonized", 0], mask=["stitch", 1]),
        "save": node("PreviewImage", images=["harmonized", 0]),
    }
    result = server.run(graph)
    assert picture(result.images["save"][0]).shape == (height, width, 3)
    assert result.outputs["compare"]["text"][0].startswith("Outside the mask: no")
