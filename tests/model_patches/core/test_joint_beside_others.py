"""Semantic boundary control and PAIntA in diffusion transformers next to other packs, samplers and guiders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from devtools.pack import ensure_host, pack_module
from truefill_testing.joint_scene import TOLERANCE, JointScene, transformer_of, two_holes, with_boundary, with_painta
from truefill_testing.scene import relative_error
from truefill_testing.small_transformers import small_transformer

ensure_host()

import comfy.sampler_helpers  # noqa: E402
import comfy.samplers  # noqa: E402

joint = pack_module("model_patches.core.joint_attention")


@pytest.fixture(scope="module", autouse=True)
def _no_leftovers():
    yield
    transformer_of.cache_clear()


@pytest.mark.parametrize("family", ["flux", "qwen_image", "anima"])
def test_beside_differential_diffusion(family: str) -> None:
    from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion

    def differential(model: Any) -> Any:
        return DifferentialDiffusion.execute(model, strength=1.0).result[0]

    scene = JointScene(family, hole=two_holes()[:1])
    plain = scene.host(differential(scene.patcher))
    ours = with_boundary(scene, with_painta(scene))
    one, other = with_boundary(scene, with_painta(scene, differential(scene.patcher))), differential(ours)
    assert torch.equal(scene.host(one), scene.host(other))
    assert relative_error(scene.host(one), plain) > 1e-3


class Langevin:
    """Steps as LanPaint takes them, on a latent that moves several times at one noise level."""

    def __init__(self, guider: Any, noise: torch.Tensor, latent: torch.Tensor) -> None:
        self.inner_model, self._noise, self._latent = guider, noise, latent

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, denoise_mask: Any, **further: Any) -> torch.Tensor:
        hole = torch.ones_like(x) if denoise_mask is None else (denoise_mask > 0.5).float()
        level = sigma.reshape(-1, *[1] * (x.ndim - 1))
        known = level * self._noise + (1.0 - level) * self._latent
        guided = x
        for _ in range(2):
            guided, barely = self.inner_model(x, sigma, model_options=further["model_options"], seed=further["seed"])
            x = hole * (x + 0.1 * (guided - x)) + (1.0 - hole) * (known + 0.1 * (barely - x))
        return hole * guided + (1.0 - hole) * self._latent


@contextmanager
def lanpaint() -> Iterator[None]:
    """The host's guider and sampler while a node of LanPaint runs: other functions, and two pictures for one."""

    def outer_sample(
        self: Any,
        noise: torch.Tensor,
        latent: torch.Tensor,
        sampler: Any,
        sigmas: Any,
        mask: Any,
        *rest: Any,
        **more: Any,
    ) -> Any:
        options = self.model_options
        self.inner_model, self.conds, loaded = comfy.sampler_helpers.prepare_sampling(
            self.model_patcher, noise.shape, self.conds, options
        )
        mask = None if mask is None else comfy.sampler_helpers.prepare_mask(mask, noise.shape, noise.device)
        self.model_patcher.pre_run()
        try:
            return self.inner_sample(noise, latent, noise.device, sampler, sigmas, mask, *rest, **more)
        finally:
            self.model_patcher.cleanup()
            comfy.sampler_helpers.cleanup_models(self.conds, loaded)

    def predict_noise(
        self: Any, x: torch.Tensor, level: torch.Tensor, model_options: Any = None, seed: Any = None
    ) -> Any:
        conds = [self.conds["positive"], self.conds["negative"]]
        out = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, level, model_options)
        return tuple(
            comfy.samplers.cfg_function(self.inner_model, *out, cfg, x, level, model_options=model_options)
            for cfg in (self.cfg, 1.0)
        )

    def sample(
        self: Any,
        guider: Any,
        sigmas: Any,
        extra: Any,
        callback: Any,
        noise: Any,
        latent: Any = None,
        mask: Any = None,
        *_: Any,
    ) -> Any:
        model = Langevin(guider, noise, latent)
        begun = guider.inner_model.model_sampling.noise_scaling(
            sigmas[0], noise, latent, self.max_denoise(guider, sigmas)
        )
        return self.sampler_function(model, begun, sigmas, extra_args={**extra, "denoise_mask": mask}, disable=True)

    with (
        mock.patch.object(comfy.samplers.CFGGuider, "outer_sample", outer_sample),
        mock.patch.object(comfy.samplers.CFGGuider, "predict_noise", predict_noise),
        mock.patch.object(comfy.samplers.KSAMPLER, "sample", sample),
    ):
        yield


@pytest.mark.parametrize("family", ["flux", "qwen_image", "wan"])
def test_within_lanpaints_sampler(family: str) -> None:
    scene = JointScene(family, hole=two_holes()[:1])
    plain = scene.host()
    with lanpaint():
        assert relative_error(scene.host(), plain) > 1e-2
        assert scene.error(with_boundary(scene, with_painta(scene)), painta=1.0, boundary=1.0) < TOLERANCE
    assert torch.equal(scene.host(), plain)


def test_what_another_pack_appends_to_the_keys_is_seen_by_all() -> None:
    """In some blocks more than in others, and in some none."""
    layout = pack_module("model_patches.core.token_layout").TokenLayout(
        crosses=False,
        tokens=7,
        text=slice(0, 3),
        image=slice(3, 7),
        padding=slice(7, 7),
        grid=(2, 2),
        patch=2,
        blocks=(3,),
    )
    queries, left_out = torch.zeros(1, 7, dtype=torch.bool), torch.zeros(1, 7, dtype=torch.bool)
    queries[:, 3:5], left_out[:, :3] = True, True
    options: dict[str, Any] = {}
    joint.install(options, layout, [joint.JointEdit(queries=queries, left_out=left_out)], "SBC")

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, **_: Any) -> torch.Tensor:
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v

    generator = torch.Generator().manual_seed(4)
    for block, more in enumerate((2, 0, 3)):
        q, k, v = (torch.randn(1, 7 + of, 4, generator=generator).double() for of in (0, more, more))
        scores = q @ k.transpose(-1, -2)
        scores[:, 3:5, :3] = -torch.inf
        given = {"transformer_options": {"block_index": block, "block_type": "double"}}
        ours = options["optimized_attention_override"](attend, q, k, v, 1, **given)
        torch.testing.assert_close(ours, scores.softmax(-1) @ v)


class Recorded:
    """An attention override of another pack, which ignores masks as fast kernels do."""

    def __init__(self) -> None:
        self.queries: list[int] = []

    def __call__(self, chosen: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.queries.append(args[0].shape[-2])
        kwargs.pop("mask", None)
        return chosen(*args[:4], **kwargs)


@pytest.mark.parametrize("family", ["flux", "sd3", "anima"])
def test_another_packs_attention_does_the_work(family: str) -> None:
    scene = JointScene(family)
    fast = scene.patcher.clone()
    recorded = Recorded()
    fast.model_options["transformer_options"]["optimized_attention_override"] = recorded
    assert torch.equal(scene.host(fast), scene.host())
    recorded.queries.clear()
    ours = scene.host(with_boundary(scene, with_painta(scene, fast)))
    assert relative_error(ours, scene.literal(painta=1.0, boundary=1.0)) < TOLERANCE
    # All queries at once, as ever, and those that see something else.
    assert max(recorded.queries) == (42 if family == "anima" else 9 + 42) and min(recorded.queries) < 42


def test_a_pack_that_changes_the_number_of_tokens_gets_a_sentence() -> None:
    scene = JointScene("flux")

    def merged(given: dict[str, Any]) -> dict[str, Any]:
        return {**given, "img": given["img"][:, ::2], "img_ids": given["img_ids"][:, ::2]}

    model = with_boundary(scene)
    model.set_model_post_input_patch(merged)
    with pytest.raises(ValueError, match=r"Semantic Boundary expected 51 tokens .* found 30: another node merges"):
        scene.host(model)


@pytest.mark.parametrize("family", ["flux", "qwen_image", "anima"])
def test_a_latent_cut_into_tiles_and_a_compiled_model_get_a_sentence(family: str) -> None:
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    scene = JointScene(family, hole=two_holes()[:1])
    compiled = TorchCompileModel.execute(with_boundary(scene), "inductor").result[0]
    with pytest.raises(ValueError, match=r"Semantic Boundary reads or edits attention .* TorchCompileModel"):
        scene.host(compiled)

    def in_halves(apply: Callable[..., torch.Tensor], given: dict[str, Any]) -> torch.Tensor:
        halves = given["input"].split(7, dim=-1)
        return torch.cat([apply(half, given["timestep"], **given["c"]) for half in halves], dim=-1)

    tiled = scene.patcher.clone()
    tiled.set_model_unet_function_wrapper(in_halves)
    assert relative_error(scene.host(tiled), scene.host()) > 1e-3
    with pytest.raises(ValueError, match=r"expected latents of 14x11 cells .* with 7x11: .* tiles"):
        scene.host(with_painta(scene, with_boundary(scene, tiled)))


def by_guider(scene: JointScene, guider: Any) -> torch.Tensor:
    sigmas = comfy.samplers.calculate_sigmas(guider.model_patcher.model.model_sampling, "simple", 2)
    noise_mask = scene.hole if scene.mask is None else None
    with torch.inference_mode():
        return guider.sample(
            scene.noise.clone(),
            scene.latent,
            comfy.samplers.sampler_object("euler"),
            sigmas,
            denoise_mask=noise_mask,
            disable_pbar=True,
            seed=0,
        ).clone()


@pytest.mark.parametrize("family", ["flux", "qwen_image", "anima"])
def test_the_negative_prompt_of_a_second_model(family: str) -> None:
    """The same one here: the picture is that of ordinary guidance."""
    from comfy_extras.nodes_custom_sampler import Guider_DualModel

    scene = JointScene(family)
    model = with_boundary(scene, with_painta(scene))
    guider = Guider_DualModel(model, small_transformer(family))
    guider.set_conds(scene.positive, scene.negative)
    guider.set_cfg(4.0)
    assert relative_error(by_guider(scene, guider), scene.literal(painta=1.0, boundary=1.0)) < TOLERANCE


@pytest.mark.parametrize("family", ["flux", "qwen_image", "anima"])
def test_perp_negs_empty_prompt_is_a_negative_one(family: str) -> None:
    """Where it weighs the negative prompt by 0 the empty one is the negative prompt, of which no words need be known."""
    from comfy_extras.nodes_perpneg import Guider_PerpNeg, PerpNeg

    scene = JointScene(family)
    model = with_boundary(scene, with_painta(scene))
    guider = Guider_PerpNeg(model)
    guider.set_conds(scene.positive, scene.positive, scene.negative)
    guider.set_cfg(4.0, 0.0)
    expected = scene.literal(painta=1.0, boundary=1.0)
    assert relative_error(by_guider(scene, guider), expected) < TOLERANCE
    # The node that came before evaluates it by itself.
    former = PerpNeg.execute(model, scene.negative, 0.0).result[0]
    assert relative_error(scene.host(former, negative=scene.positive), expected) < TOLERANCE


def test_frames_and_merged_tokens_get_a_sentence() -> None:
    scene = JointScene("wan", hole=two_holes()[:1])
    model = with_boundary(scene)

    def merged(given: dict[str, Any], further: dict[str, Any]) -> dict[str, Any]:
        return further["original_block"]({**given, "img": given["img"][:, ::2], "pe": given["pe"][:, ::2]})

    halved = model.clone()
    halved.set_model_patch_replace(merged, "dit", "double_block", 1)
    with pytest.raises(ValueError, match=r"Semantic Boundary expected 42 tokens .* found 21: another node merges"):
        scene.host(halved)
    scene.noise, scene.latent = (of.repeat(1, 1, 3, 1, 1) for of in (scene.noise, scene.latent))
    with pytest.raises(ValueError, match=r"single pictures, and these latents have 3 frames"):
        scene.host(model)
