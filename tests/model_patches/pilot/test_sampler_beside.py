"""PILOT's runs next to what else is on MODEL and CONDITIONING, with little memory, interrupted, and fed with mistakes."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from devtools.pack import pack_module
from truefill_testing import pilot_scene
from truefill_testing.pilot_scene import CALM, HOLE, PILOT, Spied, pilot, sampler
from truefill_testing.pilot_scene import one_thread_and_no_leftovers as one_thread_and_no_leftovers
from truefill_testing.pilot_scene import spied as spied
from truefill_testing.scene import Scene, relative_error

import comfy.model_management  # isort: skip

sampling_run = pack_module("model_patches.core.sampling_run")
PAIntA = pack_module("model_patches.hd_painter.painta").PAIntA
RASG = pack_module("model_patches.hd_painter.rasg").RASG
SemanticBoundary = pack_module("model_patches.pilot.semantic_boundary").SemanticBoundary


def scene_of(**options: Any) -> Scene:
    """In float32: runs are compared with each other here, which takes half the time."""
    return pilot_scene.scene_of(**{"dtype": torch.float32, **options})


TWO_AT_EVERY_SECOND = {"interval": 2, "iterations": 2}
TWO_AT_EACH = {"interval": 1, "iterations": 2}


class TestRuns:
    def test_every_pass_is_reported_and_forecast(self) -> None:
        scene, told, passes = scene_of(), [], []
        settings = PILOT(**{**CALM, "interval": 2, "iterations": 3, "gamma": 0.5})
        chosen = pilot.pilot_sampler(settings, told.append)
        sigmas = scene.sigmas("simple", 6)
        scene.host(sigmas, sampler=chosen, callback=lambda step, x0, x, total: passes.append((step, total)))
        # Steps 0 and 2 of the three before the middle.
        assert told == ["PILOT: 6 passes with a gradient (3 at 2 of 6 steps) and 6 guided steps."]
        assert passes == [(number, 12) for number in range(12)]

    def test_twice_is_the_same_and_another_seed_is_not(self) -> None:
        scene = scene_of()
        sigmas = scene.sigmas("simple", 3)
        first, again = (scene.host(sigmas, sampler=sampler(**TWO_AT_EVERY_SECOND, gamma=0.6)) for _ in range(2))
        assert torch.equal(first, again)
        scene.noise = scene.noise.flip(0)
        assert relative_error(scene.host(sigmas, sampler=sampler(**TWO_AT_EVERY_SECOND, gamma=0.6)), first) > 1e-3

    @pytest.mark.parametrize("stop_at", [1, 2, 3])
    def test_an_interrupt_leaves_nothing_behind(self, stop_at: int) -> None:
        scene = scene_of()
        sigmas = scene.sigmas("simple", 2)
        before, calls = scene.host(sigmas), itertools.count(1)
        expected = scene.host(sigmas, sampler=sampler(**TWO_AT_EVERY_SECOND))

        def interrupt(step, x0, x, total):
            if next(calls) == stop_at:
                comfy.model_management.interrupt_current_processing()

        with pytest.raises(comfy.model_management.InterruptProcessingException):
            scene.host(sigmas, sampler=sampler(**TWO_AT_EVERY_SECOND), callback=interrupt)
        assert next(calls) <= stop_at + 2, "it went on"
        assert torch.equal(scene.host(sigmas), before)
        assert torch.equal(scene.host(sigmas, sampler=sampler(**TWO_AT_EVERY_SECOND)), expected)

    def test_weights_that_the_host_may_evict_are_not_differentiated_through(self) -> None:
        """Dynamic patchers are for GPUs; what counts here is which copy of the model is sampled."""
        scene = scene_of()
        sigmas = scene.sigmas("simple", 2)
        expected = scene.host(sigmas, sampler=sampler(**TWO_AT_EVERY_SECOND))
        asked = []

        class Dynamic(type(scene.patcher)):
            def is_dynamic(self):
                return True

            def clone(self, disable_dynamic=False, **keywords):
                asked.append(disable_dynamic)
                return super().clone(**keywords) if not disable_dynamic else scene.patcher.clone()

        model = scene.patcher.clone()
        model.__class__, model.cached_patcher_init = Dynamic, (lambda: None, ())
        assert torch.equal(scene.host(sigmas, model, sampler=sampler(**TWO_AT_EVERY_SECOND)), expected)
        assert asked == [True]


class TestBesideOthers:
    def test_a_controlnet_is_differentiated(self, spied: Spied) -> None:
        scene, plain = scene_of(dtype=torch.float64), scene_of(dtype=torch.float64)
        scene.add_controlnet()
        sigmas = scene.sigmas("simple", 1)
        without, with_control = (of.host(sigmas, sampler=sampler(**TWO_AT_EACH)) for of in (plain, scene))
        assert relative_error(with_control, without) > 1e-4
        gradient, x = spied.gradients[2].double(), spied.x[2]
        weight = pilot.balance(999.0, 1.0 - HOLE, 150.0)

        def loss_at(where: torch.Tensor) -> float:
            """The loss of the first iteration, had it begun here."""
            spied.losses.clear()
            spied.centralisation.clear()
            scene.noise = (where / (1.0 + float(sigmas[0]) ** 2) ** 0.5).float()
            scene.host(sigmas, sampler=sampler(interval=1, iterations=1))
            return float((spied.losses[0] + weight * spied.centralisation[0]).double().sum())

        direction = torch.nn.functional.normalize(gradient.flatten(), dim=0).view_as(gradient)
        step = 0.02
        slope = (loss_at(x + step * direction) - loss_at(x - step * direction)) / (2 * step)
        assert abs(slope / float((gradient * direction).sum()) - 1) < 0.01

    def test_a_t2i_adapter_on_a_batch(self) -> None:
        """Its features are made for the rows of one call, and guided steps have twice those of the optimised passes."""
        import comfy.controlnet

        class Features(torch.nn.Module):
            unshuffle_amount = 8

            def __init__(self) -> None:
                super().__init__()
                self.conv = torch.nn.Conv2d(3, 32, 8, stride=8).requires_grad_(False)

            def forward(self, hint: torch.Tensor) -> dict[str, list[torch.Tensor | None]]:
                return {"input": [None, None, self.conv(hint)]}

        scene = scene_of()
        sigmas = scene.sigmas("simple", 2)
        plain = scene.host(sigmas, sampler=sampler(**TWO_AT_EACH))
        torch.manual_seed(0)
        with torch.inference_mode():
            adapter = comfy.controlnet.T2IAdapter(Features(), 3, 8, "nearest-exact", torch.device("cpu"))
        hints = torch.rand(2, 3, 8 * 16, 8 * 13, generator=torch.Generator().manual_seed(5))
        for side in (scene.positive, scene.negative):
            side[0][1]["control"] = adapter.copy().set_cond_hint(hints, 1.0)
            side[0][1]["control_apply_to_uncond"] = False
        together = scene.host(sigmas, sampler=sampler(**TWO_AT_EACH))
        assert relative_error(together, plain) > 1e-3
        for picture in range(2):
            alone = scene_of(hole=HOLE[picture : picture + 1])
            alone.noise, alone.latent = scene.noise[picture : picture + 1], scene.latent[picture : picture + 1]
            for side in (alone.positive, alone.negative):
                side[0][1]["control"] = adapter.copy().set_cond_hint(hints[picture : picture + 1], 1.0)
                side[0][1]["control_apply_to_uncond"] = False
            expected = alone.host(sigmas, sampler=sampler(**TWO_AT_EACH))
            assert relative_error(together[picture : picture + 1], expected) < 1e-4

    def test_an_image_prompt_of_another_pack(self, spied: Spied) -> None:
        """As IP-Adapter packs do it, with weights that they have loaded in inference mode."""
        from comfy.ldm.modules.attention import optimized_attention

        scene = scene_of(dtype=torch.float64)
        sigmas = scene.sigmas("simple", 1)
        place = ("output", 5, 0)
        cross = scene.model.diffusion_model.output_blocks[5][1].transformer_blocks[0].attn2
        with torch.inference_mode():
            generator = torch.Generator().manual_seed(3)
            tokens = torch.randn(1, 4, 24, generator=generator, dtype=torch.float64)
            to_k, to_v = (torch.nn.Linear(24, cross.to_k.out_features, bias=False).double() for _ in range(2))

        def with_image(q, k, v, extra_options):
            heads = extra_options["n_heads"]
            image = tokens.expand(len(q), -1, -1)
            return optimized_attention(q, k, v, heads) + optimized_attention(q, to_k(image), to_v(image), heads)

        scene.host(sigmas, sampler=sampler(**TWO_AT_EACH))
        model = scene.patcher.clone()
        model.set_model_attn2_replace(with_image, *place)
        scene.host(sigmas, model, sampler=sampler(**TWO_AT_EACH))
        assert relative_error(spied.gradients[2], spied.gradients[0]) > 1e-3

    @pytest.mark.parametrize("first", ["painta", "boundary"])
    def test_painta_takes_part_in_any_order(self, first: str) -> None:
        scene = scene_of()
        sigmas = scene.sigmas("simple", 2)
        model = sampling_run.with_method(scene.patcher, PAIntA(end_percent=1.0))
        ours = scene.host(sigmas, model, sampler=sampler(**TWO_AT_EACH))
        assert relative_error(ours, scene.host(sigmas, sampler=sampler(**TWO_AT_EACH))) > 1e-3
        if first == "painta":
            model = sampling_run.with_method(model, SemanticBoundary(mask=HOLE))
        else:
            model = sampling_run.with_method(scene.patcher, SemanticBoundary(mask=HOLE))
            model = sampling_run.with_method(model, PAIntA(end_percent=1.0))
        assert torch.equal(scene.host(sigmas, model, sampler=sampler(**TWO_AT_EACH)), ours)

    def test_the_nodes_boundary_counts_if_there_is_one(self) -> None:
        scene = scene_of()
        sigmas = scene.sigmas("simple", 2)
        model = sampling_run.with_method(scene.patcher, SemanticBoundary(strength=0.4, mask=HOLE))
        results = [
            scene.host(sigmas, model, sampler=sampler(**TWO_AT_EACH, boundary=strength)) for strength in (1.0, 0.0)
        ]
        assert torch.equal(*results)
        assert torch.equal(results[0], scene.host(sigmas, sampler=sampler(**TWO_AT_EACH, boundary=0.4)))

    def test_packs_that_write_into_tensors_and_replace_attention(self) -> None:
        from comfy.ldm.modules.attention import optimized_attention

        scene = scene_of()
        sigmas = scene.sigmas("simple", 2)

        def in_place(h, hsp, options):
            h *= 1.1
            return h, hsp

        def apart(h, hsp, options):
            return h * 1.1, hsp

        def replaced(q, k, v, extra_options):
            return 0.9 * optimized_attention(q, k, v, extra_options["n_heads"])

        results = []
        for patch in (in_place, apart):
            model = scene.patcher.clone()
            model.set_model_output_block_patch(patch)
            model.set_model_attn2_replace(replaced, "input", 1)
            results.append(scene.host(sigmas, model, sampler=sampler(**TWO_AT_EACH)))
        assert relative_error(*results) < 1e-4
        assert relative_error(results[0], scene.host(sigmas, sampler=sampler(**TWO_AT_EACH))) > 1e-3

    def test_kernels_without_a_backward_pass_are_not_used_for_the_gradient(self, spied: Spied) -> None:
        from comfy.ldm.modules.attention import attention_pytorch

        scene = scene_of()
        sigmas = scene.sigmas("simple", 1)
        scene.host(sigmas, sampler=sampler(**TWO_AT_EACH))
        model, calls = scene.patcher.clone(), []

        def fast(chosen, *args, **kwargs):
            calls.append(torch.is_grad_enabled())
            return attention_pytorch(*args, **kwargs).detach()

        model.model_options["transformer_options"]["optimized_attention_override"] = fast
        scene.host(sigmas, model, sampler=sampler(**TWO_AT_EACH))
        assert calls and not any(calls)
        assert relative_error(spied.gradients[2], spied.gradients[0]) < 1e-6

    def test_a_lora_takes_part(self) -> None:
        scene = scene_of()
        sigmas = scene.sigmas("simple", 2)
        model = scene.patcher.clone()
        name = "diffusion_model.output_blocks.5.1.transformer_blocks.0.attn2.to_q.weight"
        weight = scene.model.state_dict()[name]
        generator = torch.Generator().manual_seed(1)
        model.add_patches({name: ("diff", (0.5 * torch.randn(weight.shape, generator=generator),))})
        before = scene.host(sigmas, sampler=sampler(**TWO_AT_EACH))
        assert relative_error(scene.host(sigmas, model, sampler=sampler(**TWO_AT_EACH)), before) > 1e-4
        assert torch.equal(scene.host(sigmas, sampler=sampler(**TWO_AT_EACH)), before)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_other_precisions(self, dtype: torch.dtype) -> None:
        scene = scene_of(dtype=dtype)
        sigmas = scene.sigmas("simple", 2)
        exact = scene_of(dtype=torch.float64).host(sigmas, sampler=sampler(**TWO_AT_EACH))
        ours = scene.host(sigmas, sampler=sampler(**TWO_AT_EACH))
        assert float((ours - exact).std() / exact.std()) < {torch.bfloat16: 0.2, torch.float32: 1e-4}[dtype]

    def test_several_prompts_areas_and_masks(self) -> None:
        scene = scene_of()
        sigmas = scene.sigmas("simple", 2)
        ((context, options),) = scene.positive
        part = [context.flip(1), {**options, "mask": HOLE[:1, 0].roll(2, 1), "mask_strength": 1.0}]
        scene.positive = [[context, options], part, [context, {**options, "area": (10, 9, 2, 2), "strength": 0.5}]]
        assert scene.host(sigmas, sampler=sampler(**TWO_AT_EACH)).isfinite().all()


class TestMemory:
    """Less memory gives the same picture."""

    def run(self, scene: Scene, model: Any = None, **settings: Any) -> torch.Tensor:
        return scene.host(scene.sigmas("simple", 2), model, sampler=sampler(**TWO_AT_EACH, **settings))

    @pytest.mark.parametrize("beside", ["nothing", "painta", "controlnet", "a pack that writes"])
    def test_what_is_computed_again_is_the_same(self, beside: str) -> None:
        scene = scene_of(family="sdxl" if beside == "nothing" else "sd15", dtype=torch.float64)
        model = scene.patcher
        if beside == "painta":
            model = sampling_run.with_method(model, PAIntA(end_percent=1.0))
        elif beside == "controlnet":
            scene.add_controlnet()
        elif beside == "a pack that writes":

            def in_place(h, hsp, options):
                h *= 1.1
                hsp += 0.1
                return h, hsp

            model = model.clone()
            model.set_model_output_block_patch(in_place)
        assert relative_error(self.run(scene, model, memory="recompute"), self.run(scene, model)) < 1e-6

    def test_an_error_among_the_passes_leaves_the_blocks_as_they_were(self) -> None:
        scene = scene_of()
        before = self.run(scene)

        def fail(n, context, value, extra_options):
            if extra_options["block"] == ("output", 5) and torch.is_grad_enabled():
                assert any("forward" in module.__dict__ for module in scene.model.diffusion_model.modules())
                raise comfy.model_management.InterruptProcessingException
            return n, context, value

        model = scene.patcher.clone()
        model.set_model_attn2_patch(fail)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            self.run(scene, model, memory="recompute")
        assert not any("forward" in module.__dict__ for module in scene.model.diffusion_model.modules())
        assert torch.equal(self.run(scene), before)

    def test_less_is_kept(self) -> None:
        scene = scene_of()
        kept: dict[str, int] = {}
        for memory in ("record", "recompute"):
            largest = 0

            def count(tensor: torch.Tensor) -> torch.Tensor:
                nonlocal largest
                largest += tensor.numel()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                self.run(scene, memory=memory)
            kept[memory] = largest
        assert kept["recompute"] < 0.25 * kept["record"]

    def test_auto_goes_by_the_hosts_free_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        used = []
        recomputed = pilot.recomputed
        monkeypatch.setattr(pilot, "recomputed", lambda *arguments: used.append(1) or recomputed(*arguments))
        expected = self.run(scene_of())
        assert not used
        # Two pictures of 16x13 cells, two bytes short.
        needed = 2 * 16 * 13 * pilot.GRAPH_ELEMENTS["SD"] * 4
        monkeypatch.setattr(pilot, "get_free_memory", lambda device: needed - 2)
        assert relative_error(self.run(scene_of()), expected) < 1e-6 and len(used) == 4
        monkeypatch.setattr(pilot, "get_free_memory", lambda device: needed)
        self.run(scene_of())
        assert len(used) == 4

    def test_running_out_of_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = self.run(scene_of())
        gradient, recomputing = torch.autograd.grad, []

        def scarce(*arguments: Any, **keywords: Any) -> Any:
            if not recomputing:
                raise comfy.model_management.OOM_EXCEPTION
            return gradient(*arguments, **keywords)

        recomputed = pilot.recomputed
        monkeypatch.setattr(pilot, "recomputed", lambda *arguments: recomputing.append(1) or recomputed(*arguments))
        monkeypatch.setattr(torch.autograd, "grad", scarce)
        assert relative_error(self.run(scene_of()), expected) < 1e-6 and len(recomputing) == 4
        recomputing.clear()
        with pytest.raises(RuntimeError, match="or set memory to 'recompute'"):
            self.run(scene_of(), memory="record")
        monkeypatch.setattr(pilot, "recomputed", recomputed)
        with pytest.raises(RuntimeError, match=r"a smaller crop \(Crop Region\) or a smaller batch\.$"):
            self.run(scene_of(), memory="recompute")


class TestErrors:
    def run(self, scene: Scene, model: Any = None, **settings: Any) -> None:
        scene.host(scene.sigmas("simple", 2), model, sampler=sampler(**{"interval": 1, "iterations": 1, **settings}))

    def test_an_inpainting_model(self) -> None:
        with pytest.raises(ValueError, match="this model has 9 channels in, not 4: load the plain checkpoint"):
            self.run(Scene("sd15", True, True, torch.float32, hole=HOLE))

    @pytest.mark.parametrize(
        ("value", "sentence"), [(0.0, "The mask has no hole"), (1.0, "The mask covers the whole picture")]
    )
    def test_a_mask_of_one_kind(self, value: float, sentence: str) -> None:
        with pytest.raises(ValueError, match=sentence):
            self.run(scene_of(hole=torch.full_like(HOLE, value)))

    def test_no_mask(self) -> None:
        with pytest.raises(ValueError, match="PILOT needs to know where the hole is"):
            self.run(Scene("sd15", False, False, hole=HOLE))

    @pytest.mark.parametrize(
        ("dtype", "remedy"), [(torch.float32, "the prompt, the"), (torch.bfloat16, "start ComfyUI")]
    )
    def test_a_loss_that_is_not_finite_from_the_start(self, dtype: torch.dtype, remedy: str) -> None:
        scene = scene_of(dtype=dtype)
        scene.positive[0][0][0, 3] = float("nan")
        with pytest.raises(FloatingPointError, match=f"^PILOT's loss is not finite at .* was optimized: {remedy}"):
            self.run(scene)

    def test_rates_that_are_too_high(self) -> None:
        scene = scene_of()
        with pytest.raises(
            FloatingPointError, match=r"^PILOT's loss is not finite at timestep 999: lower learning_rate"
        ):
            scene.host(scene.sigmas("simple", 2), sampler=sampler(first_learning_rate=1e30, interval=1, iterations=2))

    def test_rasg_has_no_noise_to_replace(self) -> None:
        scene = scene_of()
        with pytest.raises(ValueError, match="RASG cannot change the noise of PILOTSampler"):
            self.run(scene, sampling_run.with_method(scene.patcher, RASG(eta=0.1)))

    def test_the_vae_of_another_model(self) -> None:
        scene, boxed = scene_of(), pack_module("model_patches.pilot.inpaint")
        parts = pack_module("model_patches.core.diffusion").Diffusion(
            model=scene.patcher,
            positive=scene.positive,
            negative=scene.negative,
            vae=SimpleNamespace(latent_channels=16),
        )
        with pytest.raises(
            ValueError, match=r"VAE makes latents of 16 channels, and the model takes 4: connect the VAE"
        ):
            boxed.inpaint(torch.zeros(1, 64, 64, 3), torch.ones(1, 64, 64), parts, boxed.Sampling(), PILOT(), 0.0)

    def test_a_flow_model(self) -> None:
        from comfy_extras.nodes_model_advanced import ModelSamplingSD3

        scene = scene_of()
        (model,) = ModelSamplingSD3().patch(scene.patcher, 3.0)
        with pytest.raises(ValueError, match="this one samples by ModelSamplingDiscreteFlow"):
            self.run(scene, model)
