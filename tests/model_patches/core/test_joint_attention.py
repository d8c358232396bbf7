"""Semantic boundary control and PAIntA in diffusion transformers, against attention written out in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from devtools.pack import ensure_host, pack_module
from truefill_testing.joint_scene import TOLERANCE, JointScene, transformer_of, two_holes, with_boundary, with_painta
from truefill_testing.scene import TOKENS_KEY, relative_error
from truefill_testing.small_transformers import (
    CROSS_FAMILIES,
    FAMILIES,
    small_transformer,
    transformer_conditioning,
)

ensure_host()

import comfy.model_management  # noqa: E402
import comfy.sampler_helpers  # noqa: E402
import comfy.samplers  # noqa: E402

joint = pack_module("model_patches.core.joint_attention")
sampling_run = pack_module("model_patches.core.sampling_run")
PAIntA = pack_module("model_patches.hd_painter.painta").PAIntA
RASG = pack_module("model_patches.hd_painter.rasg").RASG
SemanticBoundary = pack_module("model_patches.pilot.semantic_boundary").SemanticBoundary

families = pytest.mark.parametrize("family", [*FAMILIES, *CROSS_FAMILIES])


@pytest.fixture(scope="module", autouse=True)
def _no_leftovers():
    yield
    transformer_of.cache_clear()


@families
def test_the_boundary_is_the_literal_one(family: str) -> None:
    scene = JointScene(family)
    assert scene.error(with_boundary(scene), boundary=1.0) < TOLERANCE


@families
def test_painta_is_the_literal_one(family: str) -> None:
    scene = JointScene(family)
    assert scene.error(with_painta(scene), painta=1.0) < TOLERANCE


@families
def test_both_in_other_blocks_and_strengths(family: str) -> None:
    scene = JointScene(family)
    model = with_boundary(
        scene, with_painta(scene, strength=0.7, layers="first half"), strength=0.4, layers="alternate"
    )
    edits = {"painta": 0.7, "painta_layers": "first half", "boundary": 0.4, "boundary_layers": "alternate"}
    assert scene.error(model, **edits) < TOLERANCE


@pytest.mark.parametrize(
    "family", [pytest.param("flux", marks=[pytest.mark.quick]), "qwen_image", "z_image", "sd3", "anima"]
)
def test_both_in_all_blocks_in_any_order(family: str) -> None:
    scene = JointScene(family)
    one, other = with_boundary(scene, with_painta(scene)), with_painta(scene, with_boundary(scene))
    assert scene.error(one, painta=1.0, boundary=1.0) < TOLERANCE
    assert torch.equal(scene.host(one), scene.host(other))


@pytest.mark.parametrize("family", ["flux", "qwen_image", "z_image", "sd3", "hidream", "anima"])
def test_an_odd_height_and_an_odd_width(family: str) -> None:
    scene = JointScene(family, hole=two_holes()[..., :13])
    assert scene.error(with_boundary(scene, with_painta(scene)), painta=1.0, boundary=1.0) < TOLERANCE


@pytest.mark.parametrize("layers", ["first half", "second half", "alternate"])
@pytest.mark.parametrize("family", ["flux", "hidream", "wan"])
def test_layers(family: str, layers: str) -> None:
    scene = JointScene(family)
    assert scene.error(with_boundary(scene, layers=layers), boundary=1.0, boundary_layers=layers) < TOLERANCE


@pytest.mark.parametrize("family", ["flux", "qwen_image", "z_image", "hidream", "anima", "wan"])
def test_prompts_that_the_host_evaluates_apart(family: str) -> None:
    """Texts of another length make two calls; PAIntA's negative rows need what the positive ones found."""
    scene = JointScene(family, negative_tokens=13)
    assert scene.error(with_boundary(scene, with_painta(scene)), painta=1.0, boundary=1.0) < TOLERANCE


@pytest.mark.parametrize("family", ["flux", "hidream", "anima"])
def test_a_negative_prompt_that_comes_first_waits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = JointScene(family)
    model = with_boundary(scene, with_painta(scene))
    expected = scene.literal(painta=1.0, boundary=1.0)
    roles = []
    noted = scene.patcher.model.diffusion_model.register_forward_pre_hook(
        lambda _network, _args, options: roles.append(options["transformer_options"]["cond_or_uncond"]),
        with_kwargs=True,
    )
    # Short of memory it evaluates one prompt after the other.
    monkeypatch.setattr(type(scene.patcher), "get_free_memory", lambda self, device: 0)
    try:
        assert relative_error(scene.host(model), expected) < TOLERANCE
    finally:
        noted.remove()
    assert roles[:3] == [[1], [0], [1]] and all(len(of) == 1 for of in roles)


@pytest.mark.parametrize("family", ["flux", "flux2", "qwen_image", "krea2"])
def test_reference_pictures_stay_free(family: str) -> None:
    scene = JointScene(family, references=((6, 9), (4, 4)))
    if family == "krea2":
        # It reads them where it is told how.
        for side in (scene.positive, scene.negative):
            side[0][1]["reference_latents_method"] = "index"
    assert relative_error(scene.host(), JointScene(family).host()) > 1e-3
    assert scene.error(with_boundary(scene, with_painta(scene)), painta=1.0, boundary=1.0) < TOLERANCE


def test_reference_pictures_that_krea2_does_not_read() -> None:
    scene, without = JointScene("krea2", references=((6, 9),)), JointScene("krea2")
    model = with_boundary(scene, with_painta(scene))
    assert torch.equal(scene.host(), without.host()) and torch.equal(scene.host(model), without.host(model))


@pytest.mark.parametrize(
    ("family", "given"),
    [("hidream", "concat_latent_image"), ("wan", "context_latents"), ("wan", "time_dim_concat")],
)
def test_inputs_that_add_tokens_somewhere_get_a_sentence(family: str, given: str) -> None:
    scene = JointScene(family)
    latent = scene.latent[:1]
    scene.positive[0][1][given] = [latent] if given == "context_latents" else latent
    with pytest.raises(ValueError, match=r"does not know where (HiDream|Wan) puts the tokens of reference pictures"):
        scene.host(with_boundary(scene), cfg=1.0)


@pytest.mark.parametrize("family", ["flux", "z_image", "anima"])
def test_a_picture_without_a_hole_stays_as_it_is(family: str) -> None:
    hole = two_holes()
    hole[1] = 0.0
    scene = JointScene(family, hole=hole)
    model = with_boundary(scene, with_painta(scene, mask=hole), mask=hole)
    # With a noise mask it would be all known, and come back whatever the model says.
    ours, plain = scene.host(model, noise_mask=None), scene.host(noise_mask=None)
    assert relative_error(ours[0], plain[0]) > 1e-2
    assert relative_error(ours[1], plain[1]) < TOLERANCE


@pytest.mark.parametrize("family", ["flux", "z_image", "wan"])
def test_pictures_with_a_prompt_each(family: str) -> None:
    """In one batch each comes out as by itself."""
    together = JointScene(family)
    ((text, options),) = transformer_conditioning(family, 1, 9, batch=2)
    kinds = torch.zeros(2, 9, dtype=torch.long)
    kinds[0, [2, 3, 5]] = kinds[1, [1, 6]] = 1
    of_each = {name: value for name, value in options.items() if isinstance(value, torch.Tensor)} | {TOKENS_KEY: kinds}
    together.positive = [[text, options | of_each]]
    ours = together.host(with_boundary(together, with_painta(together)))
    for one in (slice(0, 1), slice(1, 2)):
        alone = JointScene(family, hole=together.hole[one])
        alone.noise, alone.latent = together.noise[one], together.latent[one]
        alone.mask = None if together.mask is None else together.mask[one]
        alone.positive = [[text[one], options | {name: value[one] for name, value in of_each.items()}]]
        assert relative_error(alone.host(), alone.host(with_painta(alone))) > 1e-3
        assert relative_error(ours[one], alone.host(with_boundary(alone, with_painta(alone)))) < TOLERANCE


def test_a_mask_of_the_text_is_heard() -> None:
    scene = JointScene("qwen_image", masked=3)
    assert scene.error(with_boundary(scene, with_painta(scene)), painta=1.0, boundary=1.0) < TOLERANCE


def test_a_mask_of_queries_and_keys_is_heard() -> None:
    """As Flux's style models give one, for a picture of 3 x 4 tokens."""
    scene = JointScene("flux")
    weights = torch.randn(1, 9 + 12, 9 + 12, generator=torch.Generator().manual_seed(8))
    for side in (scene.positive, scene.negative):
        side[0][1] |= {"attention_mask": weights, "attention_mask_img_shape": (3, 4)}
    unmasked = JointScene("flux").host()
    assert relative_error(scene.host(), unmasked) > 1e-2
    assert scene.error(with_boundary(scene), boundary=1.0) < TOLERANCE


def test_wan_without_clip_vision_reads_the_text_twice() -> None:
    scene = JointScene("wan_i2v")
    for side in (scene.positive, scene.negative):
        del side[0][1]["clip_vision_output"]
    model = with_boundary(scene, mask=barely_a_hole(scene))
    other = [[transformer_conditioning("wan_i2v", 7, 9)[0][0], scene.positive[0][1]]]
    assert not torch.equal(scene.host(positive=other), scene.host())
    assert torch.equal(scene.host(model, positive=other), scene.host(model))


def test_a_text_of_as_many_tokens_as_the_picture() -> None:
    scene = JointScene("wan_i2v", tokens=42)
    assert scene.error(with_boundary(scene, with_painta(scene)), painta=1.0, boundary=1.0) < TOLERANCE


def test_a_noise_mask_with_a_frame() -> None:
    scene = JointScene("qwen_image", hole=two_holes()[:1])
    assert scene.mask is None
    assert scene.error(with_boundary(scene, with_painta(scene)), painta=1.0, boundary=1.0) < TOLERANCE


@pytest.mark.parametrize("family", ["flux", "qwen_image", "wan"])
def test_a_prompt_for_a_part_of_the_picture(family: str) -> None:
    """What the rest of the picture's hole is like doesn't matter to a prompt of a part."""
    scene = JointScene(family)
    scene.positive[0][1]["area"] = (8, 8, 2, 4)
    other = scene.hole.clone()
    other[..., 12:] = 1.0 - other[..., 12:]
    found = []
    for hole in (scene.hole, other):
        for method in (with_boundary, with_painta):
            picture = scene.host(method(scene, mask=hole), cfg=1.0, steps=1, noise_mask=None, negative=scene.positive)
            found.append(picture[..., 2:10, 4:12])
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("family", ["flux", "qwen_image", "z_image", "hidream", "wan"])
def test_prompts_for_parts_of_the_picture_beside_one_for_all_of_it(family: str) -> None:
    """The host calls the network with each part by itself; one of them has a hole whose edge it cuts, one an odd size."""
    scene = JointScene(family)
    # As a noise mask the hole would make what is known the same, whatever the model says.
    scene.mask = scene.hole
    areas = ((8, 10, 2, 4), (7, 9, 4, 1))
    (text, options), *_ = scene.positive
    scene.positive = [*scene.positive, *([text.flip(1), {**options, "area": area}] for area in areas)]
    parts = {
        (height, width): scene.hole[..., top : top + height, left : left + width] for height, width, top, left in areas
    }
    assert scene.error(with_boundary(scene, with_painta(scene)), painta=1.0, boundary=1.0, parts=parts) < TOLERANCE


def barely_a_hole(scene: JointScene) -> torch.Tensor:
    """A hole of one pixel, by which no token is all hole: everything is known."""
    mask = torch.zeros(1, 1, *(8 * side for side in scene.hole.shape[-2:]))
    mask[..., 41, 41] = 1.0
    return mask


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[pytest.mark.quick] if name in ("flux", "anima") else [])
        for name in (*FAMILIES, *CROSS_FAMILIES)
    ],
)
def test_where_all_is_known_another_prompt_changes_nothing(family: str) -> None:
    scene = JointScene(family)
    model = with_boundary(scene, mask=barely_a_hole(scene))
    (text, options), (_, own) = transformer_conditioning(family, 7, 9)[0], scene.positive[0]
    other = [[text, {**options, "pooled_output": own["pooled_output"]}]]
    assert not torch.equal(scene.host(positive=other), scene.host())
    assert torch.equal(scene.host(model, positive=other), scene.host(model))


@pytest.mark.parametrize("family", ["flux", "qwen_image", "z_image", "sd3", "hidream", "anima", "wan"])
@pytest.mark.parametrize("method", [with_boundary, with_painta])
def test_strength_0_and_an_empty_mask_are_no_node(family: str, method: Callable[..., Any]) -> None:
    scene = JointScene(family)
    plain = scene.host()
    assert torch.equal(scene.host(method(scene, strength=0.0)), plain)
    assert torch.equal(scene.host(method(scene, mask=torch.zeros(8, 8))), plain)
    assert torch.equal(scene.host(method(scene, method(scene), strength=0.0)), plain)


def test_nothing_stays_behind_and_a_run_repeats() -> None:
    scene = JointScene("flux")
    plain, model = scene.host(), with_boundary(scene, with_painta(scene))
    first = scene.host(model)
    assert torch.equal(scene.host(model), first)
    assert torch.equal(scene.host(), plain)


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_nothing_stays_behind_after_an_error(family: str) -> None:
    scene = JointScene(family)
    plain, expected = scene.host(), scene.host(with_boundary(scene, with_painta(scene)))
    assert relative_error(plain, expected) > 1e-3
    failing = scene.patcher.clone()
    calls = iter(range(12))

    def attend(chosen: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        if next(calls, None) is None:
            raise comfy.model_management.InterruptProcessingException
        return chosen(*args, **kwargs)

    failing.model_options["transformer_options"]["optimized_attention_override"] = attend
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        scene.host(with_boundary(scene, with_painta(scene, failing)))
    assert torch.equal(scene.host(), plain)
    assert torch.equal(scene.host(with_boundary(scene, with_painta(scene))), expected)


@pytest.mark.parametrize("family", ["flux", "qwen_image", "anima"])
def test_a_hole_as_large_as_the_picture_is_no_node(family: str) -> None:
    scene = JointScene(family, hole=torch.ones(1, 1, 11, 14))
    plain = scene.host()
    assert torch.equal(scene.host(with_boundary(scene)), plain)
    assert torch.equal(scene.host(with_painta(scene)), plain)


def test_painta_needs_to_know_the_words() -> None:
    scene = JointScene("z_image")
    del scene.positive[0][1][TOKENS_KEY]
    assert relative_error(scene.host(with_boundary(scene)), scene.literal(boundary=1.0)) < TOLERANCE
    with pytest.raises(ValueError, match=r"Encode Prompt.*in the place of CLIP Text Encode"):
        scene.host(with_painta(scene))


def test_a_prompt_that_says_nothing_weakens_nothing() -> None:
    scene = JointScene("flux")
    scene.positive[0][1][TOKENS_KEY] = torch.zeros(1, 9, dtype=torch.long)
    assert relative_error(scene.host(with_painta(scene)), scene.host()) < TOLERANCE


def test_models_and_inputs_that_are_not_known_get_a_sentence() -> None:
    scene = JointScene("z_image")
    scene.positive[0][1]["reference_latents"] = [scene.latent[:1]]
    with pytest.raises(ValueError, match=r"where Z-Image puts the tokens of reference pictures: take Reference Latent"):
        scene.host(with_boundary(scene))
    other = scene.patcher.clone()
    other.model = torch.nn.Module()
    other.model.diffusion_model = torch.nn.Linear(1, 1)
    for method in (with_boundary, with_painta):
        with pytest.raises(ValueError, match=r"SD1\.5, SD2 and SDXL, and on Flux, .* class Linear\. Load one of those"):
            method(scene, other)
    with pytest.raises(ValueError, match=r"RASG works on SD1\.5, SD2 and SDXL"):
        sampling_run.with_method(scene.patcher, RASG())


@pytest.mark.parametrize("family", ["flux", "qwen_image", "z_image", "anima"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    exact, scene = JointScene(family), JointScene(family)
    scene.patcher = small_transformer(family, dtype=dtype)
    expected, rounded = (of.host(with_boundary(of, with_painta(of)), steps=1) for of in (exact, scene))
    hosts_own = relative_error(scene.host(steps=1), exact.host(steps=1))
    assert relative_error(rounded, expected) < 5 * hosts_own


@pytest.mark.parametrize("at_once", [1, 2 * 3 * 9 * 5, 2**22])
@pytest.mark.parametrize("mask", [None, "bool", "added"])
def test_how_the_text_is_read_does_not_depend_on_how_many_heads_fit(
    monkeypatch: pytest.MonkeyPatch, at_once: int, mask: str | None
) -> None:
    monkeypatch.setattr(joint, "_SCORES_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(2, heads, n, 4, generator=generator).double() for heads, n in ((6, 9), (3, 5)))
    seen = torch.tensor([True, True, False, True, True]).view(1, 1, 1, 5)
    added = torch.where(seen, 0.0, -torch.inf).double()
    words = torch.tensor([[False, True, True], [True, False, False]])
    masks = {None: None, "bool": seen, "added": added}
    reading = joint.TextAttention(q=q, k=k, number=0, scale=0.5, mask=masks[mask])
    expected = torch.zeros(2, 9, dtype=torch.float64)
    for row, head in itertools.product(range(2), range(6)):
        scores = 0.5 * q[row, head] @ k[row, head // 2].T + (added.view(1, 5) if mask else 0.0)
        expected[row] += scores.softmax(-1)[:, :3][:, words[row]].sum(-1) / 6
    torch.testing.assert_close(reading.paid_to(slice(None), words), expected)
