"""What is said where a run cannot go on, or two nodes do not go together: the right cause, in the words of the menus."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from devtools.pack import load_pack, pack_module
from truefill_testing.pilot_scene import HOLE, PILOT, sampler
from truefill_testing.scene import Scene, forget_models, relative_error
from truefill_testing.small_models import small_model

import nodes as host_nodes  # isort: skip
from comfy_extras.nodes_nag import NAGuidance  # isort: skip

load_pack()
sampling_run = pack_module("model_patches.core.sampling_run")
PAIntA = pack_module("model_patches.hd_painter.painta").PAIntA
RASG = pack_module("model_patches.hd_painter.rasg").RASG
SemanticBoundary = pack_module("model_patches.pilot.semantic_boundary").SemanticBoundary

A_LATENT_WITH_NAN = r"^{who} was given a latent with NaN or infinite values: .*picture.*--fp32-vae\.$"
THE_COMPUTATION = {
    "RASG": (
        RuntimeError,
        r"^RASG's gradient is not finite in float32: the prompt, the checkpoint or a LoRA holds NaN",
    ),
    "PILOT": (
        FloatingPointError,
        r"^PILOT's loss is not finite at timestep 999, before anything was optimized: the prompt, the checkpoint or a LoRA",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _no_leftovers() -> Iterator[None]:
    yield
    forget_models()


def scene_for(who: str, masked: bool = True) -> Scene:
    return Scene("sd15", who == "RASG", masked, torch.float32, hole=HOLE)


def run(scene: Scene, who: str, model: Any = None) -> torch.Tensor:
    sigmas, model = scene.sigmas("simple", 2), scene.patcher if model is None else model
    if who == "PILOT":
        return scene.host(sigmas, model, sampler(interval=1, iterations=1))
    return scene.host(sigmas, sampling_run.with_method(model, RASG(eta=0.1)))


class TestNaN:
    """An input that was not finite, and a computation that became so, have different remedies."""

    def assert_the_latent_is_named(self, scene: Scene, who: str) -> None:
        with pytest.raises(ValueError, match=A_LATENT_WITH_NAN.format(who=who)) as refused:
            run(scene, who)
        said = str(refused.value)
        assert "\n" not in said
        for wrong in ("learning_rate", "first_rate", "gradient", "loss", "unet"):
            assert wrong not in said

    @pytest.mark.parametrize("who", ["RASG", "PILOT"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_one_cell_of_the_latent(self, who: str, value: float) -> None:
        scene = scene_for(who)
        scene.latent[1, 2, 5, 7] = value
        self.assert_the_latent_is_named(scene, who)

    @pytest.mark.parametrize("masked", [True, False])
    def test_the_picture_of_an_inpainting_model(self, masked: bool) -> None:
        scene = scene_for("RASG", masked)
        scene.masked_latent[0, 0, 0, 0] = float("nan")
        self.assert_the_latent_is_named(scene, "RASG")

    @pytest.mark.parametrize("who", ["RASG", "PILOT"])
    def test_the_picture_of_one_prompt_alone(self, who: str) -> None:
        """As Inpaint Model Conditioning gives it, whether the model reads it or not."""
        scene = scene_for(who)
        broken = torch.full_like(scene.latent, float("nan"))
        scene.negative[0][1].update(concat_latent_image=broken, concat_mask=HOLE)
        scene.inpainting = False  # the scene's own pictures stay away
        self.assert_the_latent_is_named(scene, who)

    def test_a_vae_that_makes_nan(self) -> None:
        """As SDXL's does in half precision."""
        scene, inpainting = scene_for("PILOT"), pack_module("model_patches.pilot.inpaint")
        diffusion = pack_module("model_patches.core.diffusion")
        vae = SimpleNamespace(
            latent_channels=4,
            spacial_compression_encode=lambda: 8,
            encode=lambda pixels: torch.full((1, 4, 16, 13), float("nan")),
        )
        parts = diffusion.Diffusion(model=scene.patcher, positive=scene.positive, negative=scene.negative, vae=vae)
        with pytest.raises(ValueError, match=A_LATENT_WITH_NAN.format(who="PILOT")):
            inpainting.inpaint(
                pictures=torch.zeros(1, 128, 104, 3),
                mask=torch.nn.functional.interpolate(HOLE[:1], scale_factor=8)[:, 0],
                diffusion=parts,
                sampling=diffusion.Sampling(steps=2),
                settings=PILOT(),
                feather=0.0,
            )

    @pytest.mark.parametrize("who", ["RASG", "PILOT"])
    @pytest.mark.parametrize("block", ["input_blocks.4.1", "middle_block.1"])
    def test_weights_with_nan(self, who: str, block: str) -> None:
        if who == "RASG" and block == "middle_block.1":
            block = "input_blocks.7.1"  # SD1.5's middle block lies behind some of RASG's, at 1/64
        scene, model = scene_for(who), small_model("sd15", who == "RASG")
        weight = model.model.diffusion_model.get_submodule(f"{block}.transformer_blocks.0.ff.net.2").weight
        weight.data[3, 5] = float("nan")
        error, sentence = THE_COMPUTATION[who]
        with pytest.raises(error, match=sentence) as failed:
            run(scene, who, model)
        assert "\n" not in str(failed.value) and "latent with NaN" not in str(failed.value)

    @pytest.mark.parametrize("who", ["RASG", "PILOT"])
    def test_a_prompt_with_nan(self, who: str) -> None:
        scene = scene_for(who)
        scene.positive[0][0][0, 2, 3] = float("nan")
        error, sentence = THE_COMPUTATION[who]
        with pytest.raises(error, match=sentence):
            run(scene, who)

    @pytest.mark.parametrize("who", ["RASG", "PILOT"])
    def test_a_mask_with_nan_is_no_latent_with_nan(self, who: str) -> None:
        """NaN in a mask counts as known, as in the whole pack."""
        scene = scene_for(who)
        pixels = torch.nn.functional.interpolate(HOLE, scale_factor=8)
        broken = pixels.clone()
        broken[..., 0, 0] = float("nan")
        assert not pixels[..., 0, 0].all()
        pixels[..., 0, 0] = 0.0
        results = []
        for mask in (pixels, broken):
            if who == "PILOT":
                chosen = sampler(interval=1, iterations=1, mask=mask)
                results.append(scene.host(scene.sigmas("simple", 2), sampler=chosen))
            else:
                model = sampling_run.with_method(scene.patcher, RASG(eta=0.1, mask=mask))
                results.append(scene.host(scene.sigmas("simple", 2), model))
        assert torch.equal(*results)


class TestSamplersNames:
    @pytest.mark.parametrize("name", ["dpm_fast", "dpm_adaptive", "uni_pc", "uni_pc_bh2", "heun", "heunpp2", "lms"])
    def test_a_sampler_without_noise_is_named_as_in_the_menu(self, name: str) -> None:
        scene = scene_for("RASG")
        model = sampling_run.with_method(scene.patcher, RASG())
        sentence = rf"^RASG replaces the noise that a sampler adds, and '{name}' adds none: choose euler, ddim"
        with pytest.raises(ValueError, match=sentence) as refused:
            scene.host(scene.sigmas("simple", 2), model, name)
        assert "\n" not in str(refused.value)
        with pytest.raises(ValueError, match=sentence), torch.inference_mode():
            arguments = scene.host_arguments()
            latent = {"samples": scene.latent, "noise_mask": HOLE}
            host_nodes.KSampler().sample(
                model, 3, 2, 7.5, name, "simple", arguments["positive"], arguments["negative"], latent, denoise=1.0
            )

    @pytest.mark.parametrize("name", ["dpmpp_2m_sde_gpu", "uni_pc", "dpm_fast"])
    def test_so_it_is_where_the_released_sigma_is_asked_for(self, name: str) -> None:
        scene = scene_for("RASG")
        model = sampling_run.with_method(scene.patcher, RASG(sigma="released"))
        with pytest.raises(ValueError, match=rf"'{name}'") as refused:
            scene.host(scene.sigmas("simple", 2), model, name)
        assert "\n" not in str(refused.value)


class TestNAG:
    """NAGuidance needs both prompts in one call, and RASG takes them one after the other."""

    @staticmethod
    def nag(model: Any) -> Any:
        return NAGuidance.execute(model, 5.0, 0.5, 1.5).result[0]

    @staticmethod
    def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
        return [record.getMessage() for record in caplog.records if "NAG" in record.getMessage()]

    @pytest.mark.parametrize("first", ["RASG", "NAGuidance"])
    def test_one_line_says_so(self, first: str, caplog: pytest.LogCaptureFixture) -> None:
        scene = scene_for("RASG")
        with_rasg = sampling_run.with_method(scene.patcher, RASG(eta=0.1))
        if first == "RASG":
            model = self.nag(with_rasg)
        else:
            model = sampling_run.with_method(self.nag(scene.patcher), RASG(eta=0.1))
        sigmas = scene.sigmas("simple", 3)
        with caplog.at_level(logging.INFO):
            ours = scene.host(sigmas, model)
        (line,) = self.lines(caplog)
        assert "RASG" in line and "NAGuidance" in line and "no effect" in line and "\n" not in line
        # What the line says is so.
        assert relative_error(ours, scene.host(sigmas, with_rasg)) < 1e-4
        assert relative_error(scene.host(sigmas, self.nag(scene.patcher)), scene.host(sigmas)) > 1e-3
        # And again in the next run.
        scene.host(sigmas, model)
        assert len(self.lines(caplog)) == 2

    @pytest.mark.parametrize(
        "beside",
        [(), (PAIntA(),), (SemanticBoundary(),), (RASG(strength=0.0),), (RASG(mask=torch.zeros(8, 8)),)],
        ids=["nothing", "PAIntA", "SBC", "strength 0", "no hole"],
    )
    def test_no_line_where_rasg_does_not_act(self, beside: tuple[Any, ...], caplog: pytest.LogCaptureFixture) -> None:
        scene = scene_for("RASG")
        model = self.nag(scene.patcher)
        for settings in beside:
            model = sampling_run.with_method(model, settings)
        with caplog.at_level(logging.INFO):
            scene.host(scene.sigmas("simple", 2), model)
        assert not self.lines(caplog)

    def test_no_line_where_rasg_takes_no_gradient(self, caplog: pytest.LogCaptureFixture) -> None:
        """At eta 0 both prompts stay in one call, and NAGuidance works."""
        scene = scene_for("RASG")
        model = sampling_run.with_method(scene.patcher, RASG(eta=0.0))
        sigmas = scene.sigmas("simple", 2)
        with caplog.at_level(logging.INFO):
            assert relative_error(scene.host(sigmas, self.nag(model)), scene.host(sigmas, model)) > 1e-3
        assert not self.lines(caplog)

    def test_no_line_without_it(self, caplog: pytest.LogCaptureFixture) -> None:
        """Another pack's patch in the same place is not taken for it."""
        scene = scene_for("RASG")
        theirs = scene.patcher.clone()
        theirs.set_model_attn1_output_patch(lambda out, extra_options: out)
        with caplog.at_level(logging.INFO):
            for model in (scene.patcher, theirs):
                run(scene, "RASG", model)
        assert not self.lines(caplog)


class TestAnotherSize:
    def tiled(self, model: Any) -> Any:
        """Another pack that calls the model with one half of the latent after the other."""
        model = model.clone()

        def in_halves(apply: Any, args: dict[str, Any]) -> torch.Tensor:
            middle = args["input"].shape[2] // 2
            conditions = {name: value for name, value in args["c"].items() if name != "c_concat"}
            concat = args["c"].get("c_concat")

            def half(rows: slice) -> torch.Tensor:
                own = {} if concat is None else {"c_concat": concat[:, :, rows]}
                return apply(args["input"][:, :, rows], args["timestep"], **conditions, **own)

            return torch.cat((half(slice(None, middle)), half(slice(middle, None))), dim=2)

        model.set_model_unet_function_wrapper(in_halves)
        return model

    @pytest.mark.parametrize(
        ("methods", "named"),
        [
            ((PAIntA(),), "PAIntA"),
            ((RASG(eta=0.1),), "RASG"),
            ((SemanticBoundary(),), "Semantic Boundary"),
            ((PAIntA(), RASG(eta=0.1)), "PAIntA, RASG"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_a_latent_cut_into_tiles(self, methods: tuple[Any, ...], named: str) -> None:
        scene = scene_for("RASG")
        sigmas, model = scene.sigmas("simple", 2), self.tiled(scene.patcher)
        assert scene.host(sigmas, model).isfinite().all()
        for settings in methods:
            model = sampling_run.with_method(model, settings)
        with pytest.raises(ValueError, match=rf"^{named} expected latents of 13x16 cells .* with 13x8: ") as refused:
            scene.host(sigmas, model)
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize("boundary", [1.0, 0.0])
    def test_under_pilot(self, boundary: float) -> None:
        scene = scene_for("PILOT")
        model, sigmas = self.tiled(scene.patcher), scene.sigmas("simple", 2)
        with pytest.raises(ValueError, match=r"^(Semantic Boundary, )?PILOT expected latents of 13x16 cells"):
            scene.host(sigmas, model, sampler(interval=1, iterations=1, boundary=boundary))

    def test_steps_in_which_nobody_reads_the_model_may_be_tiled(self) -> None:
        scene = scene_for("PILOT")
        sigmas, off = scene.sigmas("simple", 2), sampler(interval=3, boundary=0.0)
        assert scene.host(sigmas, self.tiled(scene.patcher), off).isfinite().all()
        early = sampling_run.with_method(self.tiled(scene.patcher), PAIntA(start_percent=0.0, end_percent=0.1))
        assert scene.host(sigmas[1:], early).isfinite().all()

    @pytest.mark.parametrize("who", ["RASG", "PILOT"])
    def test_pictures_and_masks_of_another_size_are_resized(self, who: str) -> None:
        """As the host does with them: no message at all."""
        scene = scene_for(who)
        large = torch.nn.functional.interpolate(HOLE, scale_factor=8)
        for _, options in (*scene.positive, *scene.negative):
            options.update(concat_latent_image=torch.randn(2, 4, 24, 24), concat_mask=large)
        scene.inpainting = False
        assert run(scene, who).isfinite().all()


@pytest.mark.parametrize(
    ("module", "node", "options"),
    [
        ("hd_painter", "TrueFillPAIntA", {"strength": 1.0, "start_percent": 0.0, "end_percent": 0.5, "smooth": True}),
        (
            "hd_painter",
            "TrueFillRASG",
            {"eta": 0.01, "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "sigma": "ddim", "grid": "auto"},
        ),
        ("hd_painter", "TrueFillBlendKnown", {"known": {"samples": torch.zeros(1, 4, 8, 8)}, "strength": 1.0}),
        ("pilot", "TrueFillSemanticBoundary", {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}),
        ("starts", "TrueFillBestStart", {"candidates": 4, "choose_at": 0.5, "grid": "auto"}),
        ("starts", "TrueFillNoiseSearch", {"steps": 1, "rate": 0.1, "grid": "auto"}),
    ],
)
def test_a_mask_that_is_taken_for_noise_is_logged(
    module: str, node: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (found,) = (one for one in pack_module(f"nodes.{module}").NODES if one.__name__ == node)
    monkeypatch.setattr(found, "hidden", SimpleNamespace(unique_id=None), raising=False)
    faint = torch.full((1, 64, 64), 1 / 255)
    found.execute(scene_for("RASG").patcher, mask=faint, **options)
    assert "'mask' is not black, but nothing in it is above 2/255" in caplog.text
