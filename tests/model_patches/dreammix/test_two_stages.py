"""DreamMix's two stages through the host's sampling, against the literal loop, and what is nobody's to change."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from devtools.pack import load_pack, pack_module
from truefill_testing.literal_dreammix import Stage, pooled_mask, two_stages
from truefill_testing.literal_sampling import nearest_timestep
from truefill_testing.scene import Scene, exact_unet, forget_models, host_in_float64

import comfy.sample  # isort: skip
import comfy.model_management  # isort: skip
import comfy.samplers  # isort: skip

load_pack()
two_stage_sampler = pack_module("model_patches.dreammix.two_stage_sampler")
region_plan = pack_module("imaging.region_plan")
stage_conditioning = pack_module("model_patches.dreammix.stage_conditioning")
fill = pack_module("imaging.fill")
region = pack_module("imaging.region")
seam = pack_module("imaging.seam")
sampling_run = pack_module("model_patches.core.sampling_run")
PAIntA = pack_module("model_patches.hd_painter.painta").PAIntA
SemanticBoundary = pack_module("model_patches.pilot.semantic_boundary").SemanticBoundary
pictures = pack_module("imaging.pictures")

SIZE = (101, 124)
HOLE = (slice(30, 52), slice(41, 80))
FEATHER = 8
CFG = 3.0
SEED = 7


@pytest.fixture(scope="module", autouse=True)
def _no_leftovers():
    yield
    forget_models()


class ToyVAE:
    """Latents are means of cells of 8 pixels, of the three colors and their mean."""

    latent_channels = 4

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, picture: torch.Tensor) -> torch.Tensor:
        planes = picture[..., :3].movedim(-1, 1)
        mixed = torch.cat([planes, planes.mean(dim=1, keepdim=True)], dim=1)
        return 8.0 * torch.nn.functional.avg_pool2d(mixed, 8) - 4.0

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        planes = (latent[:, :3] + 0.1 * latent[:, 3:] + 4.4) / 8.8
        return planes.repeat_interleave(8, dim=-2).repeat_interleave(8, dim=-1).clamp(0.0, 1.0).movedim(1, -1)


VAE = ToyVAE()


def picture_of(count: int = 1, channels: int = 3) -> torch.Tensor:
    coarse = torch.rand(count, channels, 7, 8, generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.interpolate(coarse, SIZE, mode="bicubic").clamp(0.0, 1.0).movedim(1, -1).contiguous()


def hole_of(rows: slice = HOLE[0], columns: slice = HOLE[1]) -> torch.Tensor:
    hole = torch.zeros(1, *SIZE)
    hole[:, rows, columns] = 1.0
    return hole


def settings_of(share: float, **options: Any) -> Any:
    region = region_plan.RegionSettings.local(64, 0.5, 8)
    return two_stage_sampler.TwoStages(**{"local_share": share, "region": region, "feather": FEATHER, **options})


def guider_of(scene: Scene, model: Any = None) -> Any:
    guider = comfy.samplers.CFGGuider(scene.patcher if model is None else model)
    guider.set_conds(scene.positive, scene.negative)
    guider.set_cfg(CFG)
    return guider


def sampled(
    scene: Scene,
    share: float,
    steps: int = 4,
    sampler: str = "euler",
    guider: Any = None,
    picture: torch.Tensor | None = None,
    hole: torch.Tensor | None = None,
    said: list[str] | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    run = two_stage_sampler.Run(
        guider=guider_of(scene) if guider is None else guider,
        vae=VAE,
        sampler=comfy.samplers.sampler_object(sampler),
        sigmas=some_sigmas(scene, steps),
        seed=SEED,
    )
    with torch.inference_mode():
        return two_stage_sampler.sample_in_two_stages(
            picture_of() if picture is None else picture,
            hole_of() if hole is None else hole,
            run,
            settings_of(share, **options),
            (lambda text: None) if said is None else said.append,
        )


def some_sigmas(scene: Scene, steps: int) -> torch.Tensor:
    """Not from the very end, where the host scales the noise by a little more."""
    return scene.sigmas("karras", steps + 1)[1:]


def literally(
    scene: Scene, switch: int, steps: int, background: Literal["intermediate", "original"]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The literal loop, with the host's UNet in float64, its own guidance, and the crop found from the hole."""
    unet = exact_unet(scene.family, scene.inpainting)
    table, scale = scene.model.model_sampling.sigmas, scene.scale
    picture, hole = picture_of()[0].double(), hole_of()[0] > 0
    # By the rule: half 21 about (60, 40), so 43 x 43, grown by turns, the width first, until both are half of the picture's:
    # 63 x 61. Square, as the crop of 64 x 64 is whose shape is nearest.
    box = (29, 9, 92, 72)
    crop_size = (64, 64)

    def resize(planes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        if tuple(planes.shape[:2]) == tuple(size):
            return planes
        mode = "bilinear" if planes.shape[-1] == 1 else "bicubic"
        return pictures.resampled(planes.movedim(-1, 0)[None], size, mode)[0].movedim(0, -1).clamp(0.0, 1.0)

    def filled(part: torch.Tensor, unknown: torch.Tensor) -> torch.Tensor:
        return fill.fill_hole(part.float().movedim(-1, 0)[None], unknown.float()[None], "blurred")[0].movedim(0, -1)

    encoded: list[torch.Tensor] = []
    """What the VAE has seen: the filled crop, and the picture at the switch."""

    def encode(part: torch.Tensor) -> torch.Tensor:
        encoded.append(part)
        return scale * VAE.encode(part[None])[0]

    def decode(latent: torch.Tensor) -> torch.Tensor:
        return VAE.decode(latent[None] / scale)[0]

    left, top, right, bottom = box
    part_hole = resize(hole[top:bottom, left:right, None].double(), crop_size)[..., 0] > 0
    whole_hole = torch.nn.functional.pad(hole, (0, 4, 0, 3))
    holes: dict[Stage, torch.Tensor] = {"local": part_hole, "global": whole_hole}

    def masked(stage: Stage) -> torch.Tensor:
        """The hole and the masked picture, as an inpainting model gets them: [1, 5, h, w]."""
        unknown = holes[stage]
        part = resize(picture[top:bottom, left:right], crop_size) if stage == "local" else encoded[-1]
        latent = scale * VAE.encode(torch.where(unknown[..., None], 0.5, part)[None])
        coarse = torch.nn.functional.interpolate(unknown[None, None].double(), latent.shape[-2:], mode="bilinear")
        return torch.cat([coarse.round(), latent], dim=1)

    def denoise(x: torch.Tensor, sigma: float, stage: Stage) -> torch.Tensor:
        given = x[None] / (sigma**2 + 1.0) ** 0.5
        if scene.inpainting:
            given = torch.cat([given, masked(stage)], dim=1)
        time = torch.tensor([nearest_timestep(sigma, table)], dtype=torch.float64)
        height, width = holes[stage].shape
        noises = []
        for ((context, options),) in (scene.positive, scene.negative):
            y = scene.model.encode_adm(pooled_output=options["pooled_output"], width=width, height=height)
            with torch.no_grad():
                made = unet(given, time, context=context.double(), y=None if y is None else y.double())
            noises.append(made)
        return x - sigma * (noises[1] + CFG * (noises[0] - noises[1]))[0]

    shape = {"local": (4, 8, 8), "global": (4, 13, 16)}
    noises = tuple(
        comfy.sample.prepare_noise(torch.zeros(1, *shape[stage]), seed)[0].double()
        for stage, seed in (("local", SEED), ("global", SEED + (switch > 0)))
    )
    return two_stages(
        picture,
        hole,
        box,
        crop_size,
        encode,
        decode,
        resize,
        denoise,
        [float(sigma) for sigma in some_sigmas(scene, steps)],
        switch,
        (noises[0], noises[1]),
        lambda x, x0, sigma, after: x0 + (x - x0) * after / sigma,
        FEATHER,
        background,
        filled,
    )


@pytest.mark.parametrize(
    ("family", "inpainting", "share", "switch", "background"),
    [
        pytest.param("sd15", False, 0.5, 2, "intermediate", marks=pytest.mark.quick),
        ("sd15", False, 0.5, 2, "original"),
        ("sd15", False, 1.0, 4, "intermediate"),
        ("sd15", False, 0.0, 0, "intermediate"),
        ("sd15", True, 0.7, 3, "intermediate"),
        ("sdxl", False, 0.5, 2, "original"),
    ],
)
def test_it_is_the_literal_loop(
    family: str, inpainting: bool, share: float, switch: int, background: Literal["intermediate", "original"]
) -> None:
    scene = Scene(family, inpainting, True)
    with host_in_float64():
        ours, at_switch = sampled(scene, share, background=background)
    right, intermediate = literally(scene, switch, 4, background)
    assert float((ours[0].double() - right).abs().max()) < 1e-5
    if intermediate is not None:
        assert float((at_switch[0].double() - intermediate).abs().max()) < 1e-5
    assert float((ours - picture_of()).abs().max()) > 0.05


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "euler_ancestral", "dpmpp_2m_sde"])
def test_it_is_the_hosts_nodes_one_after_another(sampler: str) -> None:
    """A sampler that remembers its last steps begins anew at the switch, and one with noise of its own has the stage's."""
    scene = Scene("sd15", False, True)
    ours, at_switch = sampled(scene, 0.5, sampler=sampler, fill="mean")
    sigmas = some_sigmas(scene, 4)
    with torch.inference_mode():
        part, part_hole, place = region.crop(picture_of(), hole_of(), region_plan.RegionSettings.local(64, 0.5, 8))
        filled = fill.fill_pictures(part, (part_hole > 0).float(), "mean")
        predicted = by_hand(scene, sampler, filled, part_hole, sigmas[:3], SEED)[1]
        weight = seam.square_ramp(hole_of(), FEATHER)[:, 0]
        pasted = region.stitch(region.Region(picture_of(), weight, place.plan), VAE.decode(predicted))
        whole = torch.nn.functional.pad(pasted.movedim(-1, 1), (0, 4, 0, 3), mode="replicate").movedim(1, -1)
        whole_hole = torch.nn.functional.pad(hole_of(), (0, 4, 0, 3))
        last = by_hand(scene, sampler, whole, whole_hole, sigmas[2:], SEED + 1)[0]
        again, left = two_stage_sampler.restart(pasted, hole_of(), VAE, sigmas, 0.5)
        made = VAE.decode(last)[:, : SIZE[0], : SIZE[1]]
    assert torch.equal(at_switch, pasted)
    # The node that restarts from a picture gives the host the same.
    assert torch.equal(left, sigmas[2:]) and torch.equal(again["samples"], VAE.encode(whole))
    assert torch.equal(
        again["noise_mask"][:, 0], torch.from_numpy(pooled_mask(whole_hole[0].numpy() > 0)).float()[None]
    )
    right = torch.where(weight[..., None] == 0, picture_of(), torch.lerp(picture_of(), made, weight[..., None]))
    assert float((ours - right).abs().max()) < 1e-6


def by_hand(
    scene: Scene, sampler: str, picture: torch.Tensor, hole: torch.Tensor, sigmas: torch.Tensor, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """VAE Encode, Set Latent Noise Mask and SamplerCustomAdvanced: its latent and its denoised latent."""
    latent = VAE.encode(picture)
    found: list[torch.Tensor] = []
    made = guider_of(scene).sample(
        comfy.sample.prepare_noise(latent, seed),
        latent,
        comfy.samplers.sampler_object(sampler),
        sigmas,
        denoise_mask=torch.nn.functional.max_pool2d((hole > 0).float()[:, None], 8),
        callback=lambda step, x0, x, total: found.append(x0),
        disable_pbar=True,
        seed=seed,
    )
    return made, scene.model.process_latent_out(found[-1])


def test_a_batch_with_other_holes_other_sizes_and_alpha() -> None:
    """Each picture is what it is alone, but for its noise; the one without a hole stays as it is."""
    scene = Scene("sd15", True, True, torch.float32)
    holes = torch.cat([hole_of(), torch.zeros(1, *SIZE), hole_of(slice(0, 20), slice(100, 124))])
    for share in (0.0, 0.5, 1.0):
        made, at_switch = sampled(scene, share, picture=picture_of(3, channels=4), hole=holes)
        original = picture_of(3, channels=4)
        assert made.shape == at_switch.shape == original.shape
        weight = seam.square_ramp(holes, FEATHER)[:, 0, :, :, None].expand(-1, -1, -1, 4)
        assert torch.equal(made[weight == 0], original[weight == 0])
        assert torch.equal(made[1], original[1]) and torch.equal(made[..., 3], original[..., 3])
        for index in (0, 2):
            inside = weight[index, ..., 0] == 1
            assert float((made[index][inside][:, :3] - original[index][inside][:, :3]).abs().mean()) > 0.01


@pytest.mark.quick
def test_without_a_hole_nothing_is_sampled() -> None:
    scene = Scene("sd15", False, True, torch.float32)
    said: list[str] = []
    picture = picture_of()
    guider = guider_of(scene)

    def none(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is to be sampled")

    guider.sample = none
    # Gray noise of a mask is no hole.
    empty = torch.full((1, *SIZE), 1 / 255)
    made, at_switch = sampled(scene, 0.5, guider=guider, picture=picture, hole=empty, said=said)
    assert torch.equal(made, picture) and torch.equal(at_switch, picture)
    assert said == ["DreamMix: the mask has no hole, so the picture stays as it is."]


@pytest.mark.quick
def test_the_same_twice_and_the_guider_as_it_was() -> None:
    scene = Scene("sd15", False, True, torch.float32)
    guider = guider_of(scene)
    before = {role: [dict(entry) for entry in entries] for role, entries in guider.original_conds.items()}
    first, second = (sampled(scene, 0.5, guider=guider)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert guider.model_patcher is scene.patcher
    for role, entries in guider.original_conds.items():
        assert [entry.keys() for entry in entries] == [entry.keys() for entry in before[role]]
        assert all(entry[key] is old[key] for entry, old in zip(entries, before[role], strict=True) for key in old)


def test_nothing_stays_after_an_interrupt() -> None:
    scene = Scene("sd15", False, True, torch.float32)
    whole = sampled(scene, 0.5)[0]

    class Interrupting(ToyVAE):
        def decode(self, latent: torch.Tensor) -> torch.Tensor:
            raise comfy.model_management.InterruptProcessingException

    run = two_stage_sampler.Run(
        guider=guider_of(scene),
        vae=Interrupting(),
        sampler=comfy.samplers.sampler_object("euler"),
        sigmas=some_sigmas(scene, 4),
        seed=SEED,
    )
    with pytest.raises(comfy.model_management.InterruptProcessingException), torch.inference_mode():
        two_stage_sampler.sample_in_two_stages(picture_of(), hole_of(), run, settings_of(0.5))
    assert torch.equal(sampled(scene, 0.5)[0], whole)


@pytest.mark.parametrize("method", ["boundary", "painta"])
def test_methods_act_in_both_stages_where_their_mask_is(method: str) -> None:
    """Without a mask of their own they take the stage's hole; where cells lie on cells, the whole picture's mask is the same."""
    scene = Scene("sd15", True, True, torch.float32)
    settings = {"boundary": SemanticBoundary, "painta": PAIntA}[method]
    picture = torch.nn.functional.interpolate(picture_of().movedim(-1, 1), (128, 128)).movedim(1, -1)
    corner, elsewhere = torch.zeros(2, 1, 128, 128)
    corner[:, :24, :24] = 1.0
    elsewhere[:, 70:90, 90:120] = 1.0

    def made(share: float, mask: torch.Tensor | None = None, strength: float = 1.0) -> torch.Tensor:
        model = sampling_run.with_method(
            scene.patcher, settings(mask=mask, strength=strength, start_percent=0.0, end_percent=1.0)
        )
        return sampled(scene, share, guider=guider_of(scene, model), picture=picture, hole=corner)[0]

    for share in (0.0, 0.5, 1.0):
        found = made(share)
        assert torch.equal(made(share, corner), found)
        assert not torch.equal(made(share, elsewhere), found)
        assert not torch.equal(made(share, strength=0.0), found)
    # The crop is the upper left quarter: there, nothing of that mask is left.
    assert torch.equal(made(1.0, elsewhere), made(1.0, strength=0.0))


def test_progress_runs_once_over_both_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    class Bar:
        def __init__(self, total: int) -> None:
            self.total = total

        def update_absolute(self, value: int, total: int, preview: Any = None) -> None:
            seen.append((value, total))

    monkeypatch.setattr(two_stage_sampler.comfy.utils, "ProgressBar", Bar)
    sampled(Scene("sd15", False, True, torch.float32), 0.5)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.quick
def test_bad_input_gets_one_sentence() -> None:
    scene = Scene("sd15", False, True, torch.float32)
    with pytest.raises(ValueError, match="have no step"):
        two_stage_sampler.sample_in_two_stages(
            picture_of(),
            hole_of(),
            two_stage_sampler.Run(guider=guider_of(scene), vae=VAE, sampler=None, sigmas=torch.zeros(0), seed=0),
            settings_of(0.5),
        )
    other = ToyVAE()
    other.latent_channels = 16
    with pytest.raises(ValueError, match="16 channels of cells of 8 pixels, and the model takes 4 of 8"):
        two_stage_sampler.sample_in_two_stages(
            picture_of(),
            hole_of(),
            two_stage_sampler.Run(
                guider=guider_of(scene), vae=other, sampler=None, sigmas=some_sigmas(scene, 2), seed=0
            ),
            settings_of(0.5),
        )
    with pytest.raises(ValueError, match="mask"):
        sampled(scene, 0.5, picture=picture_of(2), hole=hole_of().repeat(3, 1, 1))


def test_the_raw_pooled_output_is_for_the_second_stage() -> None:
    scene = Scene("sdxl", False, True, torch.float32)
    guider = guider_of(scene)
    (entry,) = guider.original_conds["positive"]
    entry[stage_conditioning.RAW_POOLED_KEY] = entry["pooled_output"] + 1.0
    for share, counts in ((0.0, False), (0.5, True), (1.0, False)):
        raw, own = (sampled(scene, share, guider=guider, raw_pooled=wanted)[0] for wanted in (True, False))
        assert torch.equal(raw, own) != counts


@pytest.mark.quick
def test_a_restart_without_a_step_or_a_mask() -> None:
    sigmas = torch.linspace(1.0, 0.0, 5)
    latent, left = two_stage_sampler.restart(picture_of(), None, VAE, sigmas, 0.0)
    assert "noise_mask" not in latent and torch.equal(left, sigmas)
    with pytest.raises(ValueError, match="No step is left of 4 when a share of 1 is done"):
        two_stage_sampler.restart(picture_of(), None, VAE, sigmas, 1.0)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("framing", "settings"),
    [
        ("DreamMix's local region", region_plan.RegionSettings.local(64, 0.618, 8)),
        ("LAR-Gen's zoom-in", region_plan.RegionSettings.zoom_in(64, 8)),
        ("as set above", region_plan.RegionSettings(native_size=64, context_percent=10.0, max_upscale=1.0, min_side=1)),
    ],
)
def test_crop_region_has_the_crops_of_the_methods(framing: str, settings: Any) -> None:
    nodes = pack_module("nodes.region")
    given = {"context_percent": 10.0, "context_pixels": 32, "min_side": 1, "max_upscale": 1.0, "max_aspect": 2.0}
    made = nodes.TrueFillCropRegion.execute(
        picture_of(),
        hole_of(),
        64,
        feather=0.0,
        multiple=8,
        width=0,
        height=0,
        framing=framing,
        fill_box=False,
        **given,
    )
    expected = region.crop(picture_of(), hole_of(), settings)
    assert torch.equal(made.args[0], expected[0]) and made.args[2].plan == expected[2].plan
