"""Semantic boundary control through the host's real sampling, against the literal form, and next to other patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from devtools.pack import pack_module
from truefill_testing.literal_boundary import known_pixels
from truefill_testing.literal_sampling import PaintaSettings
from truefill_testing.scene import Scene, boxes, forget_models, relative_error

boundary = pack_module("model_patches.pilot.semantic_boundary")
sampling_run = pack_module("model_patches.core.sampling_run")
PAIntA = pack_module("model_patches.hd_painter.painta").PAIntA
RASG = pack_module("model_patches.hd_painter.rasg").RASG
SemanticBoundary = boundary.SemanticBoundary

TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def _no_leftovers():
    yield
    forget_models()


def bounded(model: Any, **settings: Any) -> Any:
    return sampling_run.with_method(model, SemanticBoundary(**settings))


def error(scene: Scene, sigmas: torch.Tensor, model: Any, **literal: Any) -> float:
    ours = scene.host(sigmas, model)
    assert relative_error(ours, scene.literal_latent(sigmas)) > 1e-3, "nothing was changed, so nothing was tested"
    return relative_error(ours, scene.literal_latent(sigmas, **literal))


@pytest.mark.parametrize(
    ("family", "inpainting", "masked"),
    [("sd15", False, True), ("sd15", True, False), ("sd2", False, True), ("sdxl", False, True), ("sdxl", True, True)],
)
def test_every_family(family: str, inpainting: bool, masked: bool) -> None:
    scene = Scene(family, inpainting, masked)
    assert error(scene, scene.sigmas("simple", 4), bounded(scene.patcher), boundary=1.0) < TOLERANCE


@pytest.mark.quick
def test_float32_is_as_exact_as_the_host() -> None:
    """One step: the error is the host's own, within a factor."""
    scene = Scene("sd15", False, True, torch.float32)
    sigmas = scene.sigmas("simple", 4)[1:3]
    hosts_own = relative_error(scene.host(sigmas), scene.literal_latent(sigmas))
    assert error(scene, sigmas, bounded(scene.patcher), boundary=1.0) < max(4 * hosts_own, 1e-5)


def test_a_part_of_the_strength() -> None:
    scene = Scene("sd15", False, True)
    sigmas = scene.sigmas("simple", 3)
    assert error(scene, sigmas, bounded(scene.patcher, strength=0.4), boundary=0.4) < TOLERANCE


@pytest.mark.parametrize("rasg", [False, True])
def test_together_with_painta_and_rasg_in_any_order(rasg: bool) -> None:
    scene = Scene("sd15", False, True)
    sigmas = scene.sigmas("simple", 4)
    literal: dict[str, Any] = {"boundary": 1.0, "painta": PaintaSettings()}
    one = bounded(sampling_run.with_method(scene.patcher, PAIntA()))
    other = sampling_run.with_method(bounded(scene.patcher), PAIntA())
    if rasg:
        one, other = (sampling_run.with_method(model, RASG(eta=0.1)) for model in (one, other))
        literal |= {"guidance": "rasg", "eta": 0.1}
    assert error(scene, sigmas, one, **literal) < TOLERANCE
    assert torch.equal(scene.host(sigmas, one), scene.host(sigmas, other))


@pytest.mark.quick
@pytest.mark.parametrize("size", [(16, 13), (64, 64), (31, 17)], ids=str)
def test_cells_that_are_not_all_hole_are_known(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    hole = boxes(size, (slice(3, size[0] - 2), slice(2, size[1] - 3)), (slice(0, size[0]), slice(0, 5)))
    hole[:, :, 5] *= torch.rand(size[1], generator=generator)
    for factor in (1, 2, 4, 8):
        grid = (-(-size[0] // factor), -(-size[1] // factor))
        known = boundary.known_cells(hole, grid)
        assert known.shape == (2, *grid)
        for picture in range(2):
            assert torch.equal(known[picture].flatten(), known_pixels(hole[picture, 0], grid)), factor


def heard_in_the_first_block(scene: Scene, model: Any) -> torch.Tensor:
    """What the conditional rows get from the UNet's first cross-attention, [pixels, channels]."""
    heard: list[torch.Tensor] = []

    def note(n: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
        if extra_options["block"] == ("input", 1):
            heard.append(n[extra_options["cond_or_uncond"].index(0)].clone())
        return n

    model = model.clone()
    model.set_model_attn2_output_patch(note)
    scene.host(scene.sigmas("simple", 1), model)
    (found,) = heard
    return found


@pytest.mark.quick
def test_known_pixels_do_not_hear_the_prompt_and_the_hole_does() -> None:
    scene = Scene("sd15", False, True, hole=boxes((16, 16), (slice(4, 12), slice(4, 12))))
    results = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        context = scene.positive[0][0]
        context[:, 1:] = torch.randn(context[:, 1:].shape, generator=generator)
        # The start of the text is the most that known pixels may hear.
        context[:, 0] = 0.0
        results.append(heard_in_the_first_block(scene, bounded(scene.patcher)))
    known = boundary.known_cells(scene.hole, (16, 16)).flatten()
    assert (results[0][~known] - results[1][~known]).abs().mean() > 0.01
    plain = heard_in_the_first_block(scene, scene.patcher)
    assert torch.equal(results[1][~known], plain[~known])
    # With values of 0 at the start nothing is left but the projection's bias.
    assert torch.allclose(results[0][known], results[0][known][:1].expand_as(results[0][known]), atol=1e-9)
    assert torch.allclose(results[0][known], results[1][known], atol=1e-9)


def test_strength_0_and_no_hole_are_no_node() -> None:
    scene = Scene("sd15", False, True)
    sigmas = scene.sigmas("simple", 3)
    assert torch.equal(scene.host(sigmas, bounded(scene.patcher, strength=0.0)), scene.host(sigmas))
    empty = Scene("sd15", False, True, hole=torch.zeros(2, 1, 12, 16))
    assert torch.equal(empty.host(sigmas, bounded(empty.patcher)), empty.host(sigmas))
    full = Scene("sd15", False, True, hole=torch.ones(1, 1, 12, 16))
    assert torch.equal(full.host(sigmas, bounded(full.patcher)), full.host(sigmas))


def test_a_picture_without_a_hole_is_left_alone_in_a_batch() -> None:
    scene = Scene("sd15", True, masked=False)
    sigmas = scene.sigmas("simple", 3)
    mask = torch.cat([boxes((16, 13), (slice(3, 9), slice(4, 13))), torch.zeros(1, 1, 16, 13)])
    ours, plain = scene.host(sigmas, bounded(scene.patcher, mask=mask)), scene.host(sigmas)
    assert relative_error(ours[:1], plain[:1]) > 1e-3 and relative_error(ours[1:], plain[1:]) < 1e-6
    assert relative_error(ours, scene.literal_latent(sigmas, boundary=1.0, guided_hole=mask)) < TOLERANCE


def test_it_acts_between_start_and_end_only() -> None:
    scene = Scene("sd15", False, True)
    sigmas = scene.sigmas("simple", 4)
    last = bounded(scene.patcher, start_percent=0.99, end_percent=1.0)
    assert torch.equal(scene.host(sigmas[:3], last), scene.host(sigmas[:3]))
    assert relative_error(scene.host(sigmas, bounded(scene.patcher, end_percent=0.5)), scene.host(sigmas)) > 1e-3


def test_another_packs_attention_is_chained_and_its_own_tokens_are_heard_everywhere() -> None:
    """As packs with image prompts do: the text's attention, and one to tokens of their own."""
    from comfy.ldm.modules.attention import optimized_attention

    scene = Scene("sd15", False, True, torch.float32)
    sigmas = scene.sigmas("simple", 2)

    def with_image(q, k, v, extra_options):
        out = optimized_attention(q, k, v, extra_options["n_heads"])
        return out + 0.3 * optimized_attention(q, k[:, 5:9], torch.ones_like(v[:, 5:9]), extra_options["n_heads"])

    theirs = scene.patcher.clone()
    theirs.set_model_attn2_replace(with_image, "input", 1)
    before = scene.host(sigmas, bounded(theirs))
    after = bounded(scene.patcher)
    after.set_model_attn2_replace(with_image, "input", 1)
    assert torch.equal(scene.host(sigmas, after), before)
    assert relative_error(before, scene.host(sigmas, bounded(scene.patcher))) > 1e-3
    assert relative_error(before, scene.host(sigmas, theirs)) > 1e-3


def test_tokens_that_another_patch_appends_are_no_text() -> None:
    scene = Scene("sd15", False, True, hole=boxes((16, 16), (slice(4, 12), slice(4, 12))))

    def appending(value: float) -> Any:
        def patch(n, context, values, extra_options):
            extra = torch.full_like(context[:, :3], value)
            return n, torch.cat((context, context[:, :3]), dim=1), torch.cat((values, extra), dim=1)

        model = scene.patcher.clone()
        model.set_model_attn2_patch(patch)
        return model

    one, other = (heard_in_the_first_block(scene, bounded(appending(value))) for value in (0.5, -0.5))
    known = boundary.known_cells(scene.hole, (16, 16)).flatten()
    assert (one - other)[known].abs().mean() > 1e-3


def test_attention_in_another_order_is_refused_in_one_sentence() -> None:
    scene = Scene("sd15", False, True, torch.float32)

    def fewer(n, context, value, extra_options):
        return n[:, ::2], context, value

    model = bounded(scene.patcher)
    model.set_model_attn2_patch(fewer)
    with pytest.raises(ValueError, match="another node merges or cuts them"):
        scene.host(scene.sigmas("simple", 1), model)


def test_a_model_without_a_unet_is_refused() -> None:
    class Other:
        model = None

    with pytest.raises(ValueError, match=r"Semantic Boundary works on SD1\.5, SD2 and SDXL, and on Flux"):
        bounded(Other())
