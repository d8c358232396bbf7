"""Upscale Inpainted on small models: against the host's plain sampling, and what must hold in tiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from devtools.pack import ensure_host, pack_module
from truefill_testing.area_vae import AreaVAE
from truefill_testing.regions import one_sentence
from truefill_testing.small_models import small_conditioning, small_model, small_upscaler, upscaler_conditioning

ensure_host()

import comfy.sample  # noqa: E402

upscaling = pack_module("model_patches.hd_painter.super_resolution")
tiles = pack_module("model_patches.hd_painter.tiled_sampling")
Box = pack_module("imaging.region_plan").Box
Harmony = pack_module("imaging.harmonize").Harmony
OFF = Harmony("off")


def x4(steps: int = 2) -> tuple[Any, Any]:
    image = torch.zeros(1, 8, 8, 3)
    positive, negative = upscaler_conditioning(image, 0, seed=1)
    return upscaling.Diffusion(
        model=small_upscaler(), positive=positive, negative=negative, vae=AreaVAE(4)
    ), upscaling.UpscaleSampling(steps=steps, seed=3)


def pictures(count: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    return torch.rand(count, height, width, channels, generator=torch.Generator().manual_seed(height + count))


def square(height: int, width: int, top: int, left: int, side: int) -> torch.Tensor:
    mask = torch.zeros(1, height, width)
    mask[:, top : top + side, left : left + side] = 1.0
    return mask


def pointwise(diffusion: Any, calls: list[dict[str, Any]]) -> Any:
    """The same with a model that sees each cell by itself, so that tiles can make no difference."""

    def predict(apply: Any, args: dict[str, Any]) -> torch.Tensor:
        c = args["c"]
        calls.append({"shape": tuple(args["input"].shape), **{k: c[k] for k in ("c_concat", "y") if k in c}})
        seen = c["c_concat"].mean(1, keepdim=True) if "c_concat" in c else 0.0
        return torch.tanh(0.4 * args["input"] + seen)

    model = diffusion.model.clone()
    model.set_model_unet_function_wrapper(predict)
    return replace(diffusion, model=model)


@pytest.mark.quick
def test_an_all_hole_picture_in_one_tile_is_the_hosts_plain_x4_sampling() -> None:
    low = pictures(1, 16, 24)
    diffusion, sampling = x4()
    result = upscaling.upscale_hole(
        pictures(1, 64, 96), low, torch.ones(1, 64, 96), diffusion, None, sampling, upscaling.Layout(tile=0), OFF
    )
    positive, negative = upscaler_conditioning(low.repeat_interleave(4, 1).repeat_interleave(4, 2), 20, seed=1)
    latent = torch.zeros(1, 4, 16, 24)
    plain = comfy.sample.sample(
        diffusion.model,
        comfy.sample.prepare_noise(latent, 3),
        2,
        7.5,
        "ddim",
        "normal",
        positive,
        negative,
        latent,
        seed=3,
    )
    assert torch.equal(result, diffusion.vae.decode(plain))


@pytest.mark.parametrize("harmonize", ["off", "poisson", "both"])
@pytest.mark.parametrize("tile", [0, 64])
def test_outside_of_the_widened_hole_the_picture_is_the_original_bit_for_bit(harmonize: str, tile: int) -> None:
    picture, mask = pictures(1, 97, 131, 4), square(97, 131, 30, 50, 20)
    diffusion, sampling = x4()
    before = picture.clone()
    layout = upscaling.Layout(tile=tile, overlap=16, expand=5)
    result = upscaling.upscale_hole(
        picture, pictures(1, 24, 33), mask, diffusion, None, sampling, layout, Harmony(harmonize)
    )
    distance = pack_module("imaging.morphology").distance_to_hole(mask)[0, 0]
    assert result.shape == picture.shape and torch.equal(picture, before)
    assert torch.equal(result[0][distance > 5], picture[0][distance > 5])
    assert (result[0, ..., :3][distance == 0] != picture[0, ..., :3][distance == 0]).float().mean() > 0.9
    assert torch.equal(result[..., 3], picture[..., 3])


@pytest.mark.quick
def test_without_a_hole_nothing_is_sampled() -> None:
    picture = pictures(2, 40, 40)
    diffusion, sampling = x4()
    calls: list[dict[str, Any]] = []
    result = upscaling.upscale_hole(
        picture, pictures(1, 10, 10), torch.zeros(1, 40, 40), pointwise(diffusion, calls), None, sampling
    )
    assert torch.equal(result, picture) and not calls and not diffusion.vae.seen


@pytest.mark.quick
def test_tiles_give_what_one_tile_gives_where_the_model_is_local() -> None:
    picture, low, mask = pictures(1, 200, 264), pictures(1, 50, 66), square(200, 264, 20, 30, 150)
    diffusion, sampling = x4(steps=4)
    results, shapes = [], []
    for tile in (0, 96):
        calls: list[dict[str, Any]] = []
        layout = upscaling.Layout(tile=tile, overlap=32, expand=0)
        results.append(
            upscaling.upscale_hole(picture, low, mask, pointwise(diffusion, calls), None, sampling, layout, OFF)
        )
        shapes.append({call["shape"][2:] for call in calls})
    assert shapes[1] == {(24, 24)} and len(shapes[0]) == 1 and shapes[0] != shapes[1]
    assert (results[0] - results[1])[mask > 0].abs().max() < 1e-4
    assert (results[0] - picture)[mask > 0].abs().max() > 0.1


def test_only_tiles_that_touch_the_hole_are_encoded_and_evaluated() -> None:
    picture, mask = pictures(1, 512, 512), square(512, 512, 40, 40, 30)
    mask[:, 460:470, 460:470] = 1.0
    diffusion, sampling = x4()
    calls: list[dict[str, Any]] = []
    layout = upscaling.Layout(tile=128, overlap=32, expand=0)
    upscaling.upscale_hole(picture, pictures(1, 128, 128), mask, pointwise(diffusion, calls), None, sampling, layout)
    assert 2 <= len(diffusion.vae.seen) <= 8 < 25  # 25 tiles would cover the picture
    assert set(diffusion.vae.seen) == {(1, 128, 128, 3)}
    rows = sum(call["shape"][0] for call in calls)
    assert rows == 2 * 2 * len(diffusion.vae.seen)  # both prompts, two steps


def test_the_host_makes_room_for_a_tile_and_the_forecast_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    diffusion, sampling = x4()
    inner, shapes, said = diffusion.model.model, [], []
    monkeypatch.setattr(inner, "memory_required", lambda shape, **_: shapes.append(list(shape)) or 3 << 30)
    upscaling.upscale_hole(
        pictures(1, 256, 256),
        pictures(1, 64, 64),
        square(256, 256, 10, 10, 230),
        pointwise(diffusion, []),
        None,
        sampling,
        upscaling.Layout(tile=128, overlap=32),
        OFF,
        said.append,
    )
    assert shapes and all(shape[-2:] == [32, 32] for shape in shapes)
    (line,) = said
    assert "256x256 pixels" in line and "9 tiles of 128x128" in line and "3.0 GB to sample" in line


def test_the_upscaler_is_shown_the_small_picture_itself_and_the_noise_level() -> None:
    diffusion, sampling = x4()
    low, calls = pictures(1, 32, 40), []
    upscaling.upscale_hole(
        pictures(1, 128, 160),
        low,
        torch.ones(1, 128, 160),
        pointwise(diffusion, calls),
        None,
        upscaling.UpscaleSampling(steps=1, noise_level=0),
        upscaling.Layout(tile=0),
    )
    assert torch.equal(calls[0]["c_concat"][:1], low.movedim(-1, 1) * 2 - 1) and set(calls[0]["y"].tolist()) == {0}
    calls.clear()
    upscaling.upscale_hole(
        pictures(1, 128, 160), low, torch.ones(1, 128, 160), pointwise(diffusion, calls), None, sampling
    )
    assert set(calls[0]["y"].tolist()) == {20}


def test_each_picture_of_a_batch_is_made_as_if_alone_with_the_next_seed() -> None:
    picture, low = pictures(2, 72, 88), pictures(2, 18, 22)
    mask = torch.cat((square(72, 88, 10, 10, 20), square(72, 88, 40, 50, 20)))
    diffusion, sampling = x4()
    together = upscaling.upscale_hole(picture, low, mask, diffusion, None, sampling)
    for index in range(2):
        alone = upscaling.upscale_hole(
            picture[index : index + 1],
            low[index : index + 1],
            mask[index : index + 1],
            diffusion,
            None,
            upscaling.UpscaleSampling(steps=2, seed=3 + index),
        )
        assert torch.equal(together[index : index + 1], alone)
    assert torch.equal(upscaling.upscale_hole(picture, low, mask, diffusion, None, sampling), together)


def img2img() -> Any:
    side = small_conditioning("sd15", 1), small_conditioning("sd15", 2)
    return upscaling.Diffusion(model=small_model("sd15", False), positive=side[0], negative=side[1], vae=AreaVAE(8))


def test_another_model_starts_from_the_enlarged_picture() -> None:
    # Cells of one colour: enlarged, encoded and decoded they come back.
    low = pictures(1, 12, 16)
    picture, mask = pictures(1, 96, 128), square(96, 128, 24, 32, 48)
    exact = upscaling.UpscaleSampling(steps=3, denoise=0.0)
    result = upscaling.upscale_hole(picture, low, mask, img2img(), None, exact, upscaling.Layout(expand=16), OFF)
    expected = F.interpolate(low.movedim(-1, 1), scale_factor=8, mode="bicubic", antialias=True)
    expected = F.avg_pool2d(expected.clamp(0, 1), 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    inside = square(96, 128, 40, 48, 16)[0] > 0
    assert (result[0][inside] - expected[0].movedim(0, -1)[inside]).abs().max() < 0.05
    changed = upscaling.upscale_hole(
        picture, low, mask, img2img(), None, upscaling.UpscaleSampling(steps=3, denoise=0.7), upscaling.Layout(), OFF
    )
    assert (changed[0][inside] - result[0][inside]).abs().mean() > 0.05


def test_an_inpainting_model_is_given_the_hole_and_its_surroundings() -> None:
    side = small_conditioning("sd15", 1), small_conditioning("sd15", 2)
    calls: list[dict[str, Any]] = []
    diffusion = pointwise(
        upscaling.Diffusion(model=small_model("sd15", True), positive=side[0], negative=side[1], vae=AreaVAE(8)), calls
    )
    picture, mask = pictures(1, 192, 256), square(192, 256, 64, 96, 64)
    upscaling.upscale_hole(
        picture, pictures(1, 48, 64), mask, diffusion, None, upscaling.UpscaleSampling(steps=2, denoise=0.6)
    )
    hole, around = calls[0]["c_concat"][:1, :1], calls[0]["c_concat"][:1, 1:]
    assert set(hole.unique().tolist()) == {0.0, 1.0} and (hole[..., 9:15, 13:19] == 1).all()
    process = diffusion.model.model.process_latent_in
    known, grey = process(diffusion.vae.encode(picture)), process(torch.full((1, 4, 1, 1), 0.5))
    assert torch.equal(around.where(hole == 0, 0), known.where(hole == 0, 0))
    assert torch.allclose(around.where(hole == 1, grey), grey.expand_as(around), atol=1e-6)


class Nearest:
    """The interface of a loaded upscale model."""

    def __init__(self, scale: int = 2) -> None:
        self.patcher = small_model("sd15", False)
        self.scale = scale
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, picture: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(picture.shape[2:]))
        return self.enlarged(picture)

    def enlarged(self, picture: torch.Tensor) -> torch.Tensor:
        return F.interpolate(picture, scale_factor=self.scale, mode="nearest")


class Bicubic(Nearest):
    """One that looks a few pixels around."""

    def enlarged(self, picture: torch.Tensor) -> torch.Tensor:
        return F.interpolate(picture, scale_factor=self.scale, mode="bicubic").clamp(0, 1)


@pytest.mark.quick
def test_an_upscale_model_alone_fills_the_hole_with_what_it_makes() -> None:
    picture, low, mask = pictures(1, 64, 96), pictures(1, 32, 48), square(64, 96, 20, 30, 24)
    result = upscaling.upscale_hole(
        picture, low, mask, None, Nearest(), upscaling.UpscaleSampling(), upscaling.Layout(expand=0), OFF
    )
    wanted = torch.where(mask[..., None] > 0, low.repeat_interleave(2, 1).repeat_interleave(2, 2), picture)
    assert (result - wanted).abs().max() < 1e-6


def corner(height: int, width: int, where: str) -> torch.Tensor:
    """A small hole at a corner of a picture, or in its middle."""
    top, left = {"first": (0, 0), "last": (height - 9, width - 9), "right": (4, width - 9)}.get(
        where, (height // 2, width // 2)
    )
    return square(height, width, top, left, 9)


@pytest.mark.parametrize(
    ("size", "small", "scale", "upscaler", "where"),
    [
        pytest.param((602, 560), (301, 280), 2, Bicubic, "first", marks=pytest.mark.quick),
        pytest.param((602, 560), (301, 280), 2, Bicubic, "last", marks=pytest.mark.quick),
        # Enlarged too much and too little, by ratios of their own for the sides, and to odd sizes.
        ((1023, 901), (257, 333), 4, Nearest, "first"),
        ((1023, 901), (257, 333), 4, Nearest, "last"),
        ((1023, 901), (257, 333), 4, Bicubic, "middle"),
        ((1537, 1111), (411, 509), 2, Bicubic, "right"),
        ((1537, 1111), (411, 509), 2, Nearest, "last"),
        # As large as the large picture, and larger.
        ((801, 903), (801, 903), 1, Nearest, "middle"),
        ((801, 903), (801, 903), 1, Nearest, "last"),
        ((701, 803), (633, 1201), 2, Bicubic, "first"),
        ((701, 803), (633, 1201), 2, Bicubic, "right"),
    ],
)
def test_an_upscale_model_is_shown_only_what_is_around_the_hole(
    size: tuple[int, int], small: tuple[int, int], scale: int, upscaler: Any, where: str
) -> None:
    picture, low, mask, model = pictures(1, *size), pictures(1, *small), corner(*size, where), upscaler(scale)
    layout = upscaling.Layout(tile=64, expand=0)
    result = upscaling.upscale_hole(picture, low, mask, None, model, layout=layout, harmony=OFF)

    # All of the small picture, and the box cut out of that.
    large = model.enlarged(low.movedim(-1, 1)).movedim(1, -1)
    place = upscaling.find_workplace(mask[0], 1, layout.tile, layout.overlap)
    made = upscaling._engine(None, model, upscaling.UpscaleSampling()).enlarged(low, place, size)
    assert made.shape == (1, *place.pixel_size, 3) and (made - place.pixels_of(large, size)).abs().max() < 2e-6
    resized = F.interpolate(large.double().movedim(-1, 1), size=size, mode="bicubic", antialias=True)
    assert (result - resized.clamp(0, 1).movedim(1, -1))[mask > 0].abs().max() < 2e-6
    assert torch.equal(result[mask == 0], picture[mask == 0])

    margin, ratio = upscaling._UPSCALE_MARGIN, (small[0] / size[0], small[1] / size[1])
    for height, width in model.seen:
        assert height <= place.pixel_size[0] * ratio[0] + 2 * (margin + 4) and height < small[0]
        assert width <= place.pixel_size[1] * ratio[1] + 2 * (margin + 4) and width < small[1]


@pytest.mark.quick
def test_a_hole_that_is_everywhere_is_enlarged_with_all_of_the_picture() -> None:
    model, low = Nearest(), pictures(1, 131, 97)
    upscaling.upscale_hole(pictures(1, 262, 195), low, torch.ones(1, 262, 195), None, model, harmony=OFF)
    assert model.seen == [(131, 97)]


def test_another_model_refines_what_the_upscale_model_was_shown_around_the_hole() -> None:
    picture, low, mask, model = pictures(1, 800, 960), pictures(1, 400, 480), square(800, 960, 80, 80, 128), Bicubic()
    exact, layout = upscaling.UpscaleSampling(steps=1, denoise=0.0), upscaling.Layout(tile=64, expand=0)
    result = upscaling.upscale_hole(picture, low, mask, img2img(), model, exact, layout, OFF)
    assert len(model.seen) == 1 and model.seen[0][0] < 250 and model.seen[0][1] < 250
    wanted = F.avg_pool2d(model.enlarged(low.movedim(-1, 1)), 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    inside = square(800, 960, 128, 128, 32)[0] > 0
    assert (result[0][inside] - wanted[0].movedim(0, -1)[inside]).abs().max() < 1e-4
    assert torch.equal(result[mask == 0], picture[mask == 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: {"diffusion": None}, "connect Stable Diffusion's x4 upscaler"),
        (lambda d: {"upscale_model": Nearest()}, "disconnect"),
        (lambda d: {"diffusion": replace(d, vae=AreaVAE(8))}, "VAE"),
        (lambda d: {"pictures": pictures(1, 64, 64) * torch.nan}, "NaN"),
        (lambda d: {"low": pictures(1, 16, 16)[..., :2]}, "'inpainted' has the shape"),
        (
            lambda d: {"pictures": pictures(3, 64, 64), "low": pictures(2, 16, 16)},
            "3 in 'image', 2 in 'inpainted', 1 in 'mask'",
        ),
    ],
    ids=["nothing", "both", "the wrong VAE", "NaN", "two channels", "counts"],
)
def test_what_does_not_go_together_is_refused_in_one_sentence(change: Any, message: str) -> None:
    diffusion, _ = x4()
    given = {
        "pictures": pictures(1, 64, 64),
        "low": pictures(1, 16, 16),
        "mask": square(64, 64, 8, 8, 20),
        "diffusion": diffusion,
    }
    with pytest.raises(ValueError, match=message) as refused:
        upscaling.upscale_hole(**{**given, **change(diffusion)})
    assert one_sentence(refused)


def test_a_controlnet_in_tiles_is_refused() -> None:
    with pytest.raises(ValueError, match="ControlNet") as refused:
        tiles._narrowed([{"control": object(), "model_conds": {}}], Box(0, 0, 8, 8))
    assert one_sentence(refused)


def test_nothing_is_left_on_the_model_after_a_run_or_an_error() -> None:
    diffusion, sampling = x4()
    model = diffusion.model

    def state() -> tuple[Any, ...]:
        return str(model.model_options), str(model.wrappers), str(model.callbacks), sorted(model.patches)

    before = state()
    picture, low, mask = pictures(1, 72, 72), pictures(1, 18, 18), square(72, 72, 10, 10, 40)
    upscaling.upscale_hole(picture, low, mask, diffusion, None, sampling, upscaling.Layout(tile=32, overlap=8))
    assert state() == before

    def fail(*_: Any) -> torch.Tensor:
        raise RuntimeError("out of luck")

    broken = model.clone()
    broken.set_model_unet_function_wrapper(fail)
    changed = replace(diffusion, model=broken)
    with pytest.raises(RuntimeError, match="out of luck"):
        upscaling.upscale_hole(picture, low, mask, changed, None, sampling)
    assert state() == before


def test_conditioning_for_a_part_of_the_picture_keeps_to_its_part_in_tiles() -> None:
    entry = {"area": (10, 20, 4, 6), "strength": 0.5}
    narrowed = tiles._narrowed([entry, {}], Box(16, 0, 32, 8))
    assert narrowed == [{"area": (4, 10, 4, 16), "strength": 0.5}, {"area": (8, 16, 0, 16)}]
    assert tiles._narrowed([entry], Box(0, 16, 16, 24)) == []
    assert tiles._narrowed(None, Box(0, 0, 8, 8)) is None
    assert entry == {"area": (10, 20, 4, 6), "strength": 0.5}
