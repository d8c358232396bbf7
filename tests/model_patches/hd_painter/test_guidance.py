"""PAIntA and RASG among the host's samplers, conditioning nodes and other patches, after errors, and in half precision."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from devtools.pack import load_pack, pack_module
from truefill_testing.scene import TOKENS_KEY, Scene, boxes, forget_models, relative_error, token_set
from truefill_testing.small_models import small_conditioning, small_model

import comfy.model_management  # isort: skip
import comfy.samplers  # isort: skip
import nodes as host_nodes  # isort: skip

load_pack()
sampling_run = pack_module("model_patches.core.sampling_run")
PAIntA = pack_module("model_patches.hd_painter.painta").PAIntA
RASG = pack_module("model_patches.hd_painter.rasg").RASG


@pytest.fixture(scope="module", autouse=True)
def _no_leftovers():
    yield
    forget_models()


@pytest.fixture
def scene() -> Scene:
    return Scene("sd15", True, True, torch.float32)


def both(model: Any, eta: float = 0.1) -> Any:
    return sampling_run.with_method(sampling_run.with_method(model, PAIntA()), RASG(eta=eta))


def assert_close(value: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert relative_error(value, expected) < tolerance


def hooks_on(unet: torch.nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in unet.modules())


class TestOrderAndRepetition:
    @pytest.mark.quick
    def test_the_order_of_the_nodes_does_not_matter(self, scene: Scene) -> None:
        sigmas = scene.sigmas("simple", 3)
        one = sampling_run.with_method(sampling_run.with_method(scene.patcher, PAIntA()), RASG(eta=0.1))
        other = sampling_run.with_method(sampling_run.with_method(scene.patcher, RASG(eta=0.1)), PAIntA())
        assert torch.equal(scene.host(sigmas, one), scene.host(sigmas, other))

    def test_twice_is_the_same(self, scene: Scene) -> None:
        sigmas = scene.sigmas("simple", 3)
        model = both(scene.patcher)
        assert torch.equal(scene.host(sigmas, model), scene.host(sigmas, model))

    def test_the_given_model_is_not_changed(self, scene: Scene) -> None:
        sigmas = scene.sigmas("simple", 2)
        before = scene.host(sigmas)
        scene.host(sigmas, both(scene.patcher))
        assert torch.equal(scene.host(sigmas), before)
        assert sampling_run.KEY not in scene.patcher.model_options
        assert hooks_on(scene.model.diffusion_model) == 0

    @pytest.mark.quick
    def test_the_last_of_two_equal_nodes_counts(self, scene: Scene) -> None:
        sigmas = scene.sigmas("simple", 2)
        twice = sampling_run.with_method(sampling_run.with_method(scene.patcher, PAIntA()), PAIntA(strength=0.3))
        once = sampling_run.with_method(scene.patcher, PAIntA(strength=0.3))
        assert torch.equal(scene.host(sigmas, twice), scene.host(sigmas, once))

    @pytest.mark.quick
    def test_strength_0_takes_an_earlier_node_back(self, scene: Scene) -> None:
        sigmas = scene.sigmas("simple", 2)
        model = sampling_run.with_method(
            sampling_run.with_method(both(scene.patcher), PAIntA(strength=0)), RASG(strength=0)
        )
        assert torch.equal(scene.host(sigmas, model), scene.host(sigmas))


class TestSchedule:
    def test_an_empty_window_of_painta_is_no_node(self, scene: Scene) -> None:
        sigmas = scene.sigmas("simple", 3)
        model = sampling_run.with_method(scene.patcher, PAIntA(start_percent=0.5, end_percent=0.5))
        assert torch.equal(scene.host(sigmas, model), scene.host(sigmas))

    def test_the_window_is_in_percent_of_sampling(self, scene: Scene) -> None:
        sigmas = scene.sigmas("simple", 4)
        first, second = sigmas[:3], sigmas[2:]
        model = sampling_run.with_method(scene.patcher, PAIntA())
        assert not torch.equal(scene.host(first, model), scene.host(first))
        assert torch.equal(scene.host(second, model), scene.host(second))
        late = sampling_run.with_method(scene.patcher, PAIntA(start_percent=0.5, end_percent=1.0))
        assert torch.equal(scene.host(first, late), scene.host(first))
        assert not torch.equal(scene.host(second, late), scene.host(second))

    def test_outside_its_window_rasg_leaves_the_noise_random(self, scene: Scene) -> None:
        sigmas = scene.sigmas("simple", 3)
        off = sampling_run.with_method(scene.patcher, RASG(eta=0.3, start_percent=1.0))
        expected = scene.host(sigmas, sampler="euler_ancestral", sampler_options={"eta": 0.3})
        assert torch.equal(scene.host(sigmas, off, "euler_ancestral"), expected)


class TestSamplers:
    # One of each kind: with an eta, with one in an exponent, without, of several stages, and in another's place.
    @pytest.mark.parametrize(
        "sampler", ["euler", "dpmpp_2m", "dpmpp_sde", "dpmpp_3m_sde", "lcm", "sa_solver", "euler_ancestral_cfg_pp"]
    )
    def test_rasg_pulls_with_every_kind_of_sampler(
        self, scene: Scene, sampler: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The same amount of noise, once all random and once all gradient: the gradient raises the score S."""
        rasg = pack_module("model_patches.hd_painter.rasg")
        scored, seen = rasg.attention_score, []

        def note(scores: torch.Tensor, hole: torch.Tensor) -> torch.Tensor:
            # Written out again, so that a wrong sign in the original does not agree with itself.
            probability = torch.sigmoid(scores - 1.0)
            right = torch.where(hole[..., None], probability, 1.0 - probability)
            seen.append(right.log().mean(dim=1).sum().detach())
            return scored(scores, hole)

        monkeypatch.setattr(rasg, "attention_score", note)
        sigmas = scene.sigmas("karras", 6)
        means = []
        for strength in (1e-9, 1.0):
            seen.clear()
            model = sampling_run.with_method(scene.patcher, RASG(eta=0.8, strength=strength))
            assert scene.host(sigmas, model, sampler).isfinite().all()
            means.append(float(torch.stack(seen[1:]).mean()))
        random, pulled = means
        assert pulled > random

    def test_a_picture_without_a_hole_keeps_random_noise(self) -> None:
        hole = boxes((16, 13), (slice(3, 9), slice(4, 13)), (slice(0, 0), slice(0, 0)))
        scene = Scene("sd15", True, False, torch.float32, hole=hole)
        sigmas = scene.sigmas("simple", 3)
        random = scene.host(sigmas, sampler="euler_ancestral", sampler_options={"eta": 0.3})
        guided = scene.host(sigmas, sampling_run.with_method(scene.patcher, RASG(eta=0.3)), "euler_ancestral")
        assert relative_error(guided[1:], random[1:]) < 1e-4
        assert relative_error(guided[:1], random[:1]) > 1e-2

    @pytest.mark.quick
    def test_a_deterministic_sampler_is_refused_in_one_sentence(self, scene: Scene) -> None:
        model = sampling_run.with_method(scene.patcher, RASG())
        with pytest.raises(ValueError, match=r"'heun' adds none: choose euler, ddim") as refused:
            scene.host(scene.sigmas("simple", 2), model, "heun")
        assert "\n" not in str(refused.value)

    def test_painta_works_with_a_deterministic_sampler(self, scene: Scene) -> None:
        sigmas = scene.sigmas("simple", 3)
        model = sampling_run.with_method(scene.patcher, PAIntA())
        assert not torch.equal(scene.host(sigmas, model, "heun"), scene.host(sigmas, sampler="heun"))

    def test_the_hosts_sampler_nodes_agree(self, scene: Scene) -> None:
        import comfy_extras.nodes_custom_sampler as custom

        model = both(scene.patcher)
        arguments = scene.host_arguments()
        latent = {"samples": scene.latent, "noise_mask": scene.hole}
        positive, negative = arguments["positive"], arguments["negative"]
        with torch.inference_mode():
            (simple,) = host_nodes.KSampler().sample(
                model, 3, 4, 7.5, "euler", "simple", positive, negative, latent, denoise=1.0
            )
            (advanced,) = host_nodes.KSamplerAdvanced().sample(
                model, "enable", 3, 4, 7.5, "euler", "simple", positive, negative, latent, 0, 10000, "disable"
            )
            sigmas = custom.BasicScheduler.execute(model, "simple", 4, 1.0).result[0]
            sampler = comfy.samplers.sampler_object("euler")
            by_sampler = custom.SamplerCustom.execute(
                model, True, 3, 7.5, positive, negative, sampler, sigmas, latent
            ).result[0]
            guider = custom.CFGGuider.execute(model, positive, negative, 7.5).result[0]
            noise = custom.RandomNoise.execute(3).result[0]
            by_guider = custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).result[0]
        for other in (advanced, by_sampler, by_guider):
            assert torch.equal(simple["samples"], other["samples"])

    def test_two_guidance_scales(self, scene: Scene) -> None:
        """The host's DualCFGGuider lists the negative prompt first: rows are known by their role, not their number."""
        import comfy_extras.nodes_custom_sampler as custom

        arguments = scene.host_arguments()
        model = both(scene.patcher)
        sigmas = scene.sigmas("simple", 3)
        guider = custom.Guider_DualCFG(model)
        guider.set_conds(arguments["positive"], arguments["positive"], arguments["negative"])
        guider.set_cfg(scene.CFG, scene.CFG)
        assert_close(scene.host_by_guider(guider, sigmas), scene.host(sigmas, model))

    def test_the_negative_prompt_of_a_second_model(self, scene: Scene) -> None:
        """The same one here: the picture is that of ordinary guidance."""
        import comfy_extras.nodes_custom_sampler as custom

        arguments = scene.host_arguments()
        model = both(scene.patcher)
        sigmas = scene.sigmas("simple", 3)
        guider = custom.Guider_DualModel(model, small_model(scene.family, scene.inpainting))
        guider.set_conds(arguments["positive"], arguments["negative"])
        guider.set_cfg(scene.CFG)
        assert_close(scene.host_by_guider(guider, sigmas), scene.host(sigmas, model))

    def test_perp_negs_empty_prompt_is_a_negative_one(self, scene: Scene) -> None:
        """Where it weighs the negative prompt by 0 the empty one is the negative prompt."""
        from comfy_extras.nodes_perpneg import Guider_PerpNeg

        arguments = scene.host_arguments()
        model = both(scene.patcher)
        sigmas = scene.sigmas("simple", 3)
        guider = Guider_PerpNeg(model)
        guider.set_conds(arguments["positive"], arguments["positive"], arguments["negative"])
        guider.set_cfg(scene.CFG, 0.0)
        assert_close(scene.host_by_guider(guider, sigmas), scene.host(sigmas, model))


class TestConditioning:
    def run(self, scene: Scene, positive: list | None = None, negative: list | None = None) -> torch.Tensor:
        scene.positive = scene.positive if positive is None else positive
        scene.negative = scene.negative if negative is None else negative
        return scene.host(scene.sigmas("simple", 3), both(scene.patcher))

    def test_an_area_of_the_whole_picture_is_no_area(self, scene: Scene) -> None:
        expected = self.run(scene)
        height, width = (8 * side for side in scene.size)
        (positive,) = host_nodes.ConditioningSetArea().append(scene.positive, width, height, 0, 0, 1.0)
        assert_close(self.run(scene, positive), expected)

    def test_areas_that_cut_the_hole(self, scene: Scene) -> None:
        (left,) = host_nodes.ConditioningSetArea().append(scene.positive, 64, 128, 0, 0, 1.0)
        (corner,) = host_nodes.ConditioningSetArea().append(small_conditioning("sd15", 5), 64, 64, 40, 64, 1.0)
        out = self.run(scene, left + corner + scene.positive)
        assert out.isfinite().all()
        assert relative_error(out, scene.host(scene.sigmas("simple", 3))) > 1e-2

    def test_the_same_prompt_twice_is_once(self, scene: Scene) -> None:
        expected = self.run(scene)
        assert_close(self.run(scene, scene.positive + scene.positive), expected)

    def test_a_prompt_of_two_chunks_beside_one_of_one(self, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        """The host repeats the shorter embedding when it batches both; halves by themselves have no need to."""
        long = small_conditioning("sd15", 6, tokens=154)
        long[0][1][TOKENS_KEY] = torch.cat([token_set(1, 2), token_set(3, 4)])[None]
        batched = self.run(scene, scene.positive, long)
        longer = self.run(scene, long, small_conditioning("sd15", 2))
        monkeypatch.setattr(type(scene.patcher), "get_free_memory", lambda self, device: 0)
        assert_close(self.run(scene, long, small_conditioning("sd15", 2)), longer)
        short = small_conditioning("sd15", 1)
        short[0][1][TOKENS_KEY] = token_set(*scene.TOKENS)[None]
        assert_close(self.run(scene, short, long), batched)

    def test_the_hosts_own_encoding_is_accepted(self, scene: Scene) -> None:
        with_tokens = self.run(scene)
        plain = small_conditioning("sd15", 1)
        every_word = small_conditioning("sd15", 1)
        every_word[0][1][TOKENS_KEY] = ~token_set(0)[None]
        out = self.run(scene, plain)
        assert torch.equal(out, self.run(scene, every_word))
        assert not torch.equal(out, with_tokens)

    def test_a_prompt_for_a_part_of_sampling(self, scene: Scene) -> None:
        (late,) = host_nodes.ConditioningSetTimestepRange().set_range(scene.positive, 0.4, 1.0)
        assert self.run(scene, late).isfinite().all()

    def test_masked_conditioning(self, scene: Scene) -> None:
        (masked,) = host_nodes.ConditioningSetMask().append(scene.positive, torch.ones(1, 16, 16), "default", 1.0)
        expected = self.run(scene)
        assert_close(self.run(scene, masked), expected)

    def test_the_mask_may_come_from_the_conditioning_alone(self) -> None:
        both_masks, one = (Scene("sd15", True, masked, torch.float32) for masked in (True, False))
        sigmas = one.sigmas("simple", 2)
        assert torch.equal(both_masks.hole, one.hole)
        assert relative_error(one.host(sigmas, both(one.patcher)), one.host(sigmas)) > 1e-2

    def test_without_any_mask_it_says_what_to_connect(self) -> None:
        scene = Scene("sd15", False, False, torch.float32)
        with pytest.raises(ValueError, match="connect a MASK to the PAIntA node"):
            scene.host(scene.sigmas("simple", 2), both(scene.patcher))


class TestOtherPatches:
    """Nodes of the host on the same model, before and after ours."""

    @staticmethod
    def others() -> dict[str, Any]:
        from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
        from comfy_extras.nodes_freelunch import FreeU_V2
        from comfy_extras.nodes_hypertile import HyperTile
        from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
        from comfy_extras.nodes_pag import PerturbedAttentionGuidance
        from comfy_extras.nodes_sag import SelfAttentionGuidance
        from comfy_extras.nodes_tomesd import TomePatchModel

        def lora(model: Any) -> Any:
            model = model.clone()
            generator = torch.Generator().manual_seed(5)
            keys = [k for k in model.model_state_dict() if k.endswith("attn1.to_q.weight")]
            patches = {
                key: ("diff", (0.1 * torch.randn(model.model_state_dict()[key].shape, generator=generator),))
                for key in keys
            }
            assert len(model.add_patches(patches, 0.5)) == len(keys)
            return model

        return {
            "FreeU_V2": lambda m: FreeU_V2.execute(m, 1.3, 1.4, 0.9, 0.2).result[0],
            "PerturbedAttentionGuidance": lambda m: PerturbedAttentionGuidance.execute(m, 3.0).result[0],
            "SelfAttentionGuidance": lambda m: SelfAttentionGuidance.execute(m, 0.5, 2.0).result[0],
            "DifferentialDiffusion": lambda m: DifferentialDiffusion.execute(m).result[0],
            "PatchModelAddDownscale": lambda m: PatchModelAddDownscale.execute(
                m, 3, 2.0, 0.0, 0.35, True, "bicubic", "bicubic"
            ).result[0],
            "HyperTile": lambda m: HyperTile.execute(m, 32, 2, 2, False)[0],
            "TomePatchModel": lambda m: TomePatchModel.execute(m, 0.3).result[0],
            "LoRA": lora,
        }

    @pytest.mark.parametrize("name", list(others()))
    def test_both_orders_agree_and_both_act(self, name: str) -> None:
        size = (16, 16)
        hole = boxes(size, (slice(4, 12), slice(6, 16)))
        hole[..., 4:6, :] *= 0.7  # where Differential Diffusion differs from a plain noise mask
        scene = Scene("sd15", True, True, torch.float32, hole=hole)
        other = self.others()[name]
        sigmas = scene.sigmas("simple", 2)

        def run(model: Any) -> torch.Tensor:
            torch.manual_seed(0)  # HyperTile draws its tiles from the global generator
            return scene.host(sigmas, model)

        before = run(both(other(scene.patcher)))
        after = run(other(both(scene.patcher)))
        assert_close(before, after, 1e-5)
        assert relative_error(before, run(both(scene.patcher))) > 1e-4, f"{name} has no effect beside ours"
        assert relative_error(before, run(other(scene.patcher))) > 1e-4, f"ours have no effect beside {name}"
        assert hooks_on(scene.model.diffusion_model) == 0

    def test_a_pass_of_the_negative_prompt_alone_does_not_split_the_others(self, scene: Scene) -> None:
        """SAG evaluates the negative prompt by itself at each step; the two halves of CFG stay in one call."""
        model = sampling_run.with_method(self.others()["SelfAttentionGuidance"](scene.patcher), PAIntA()).clone()
        rows: list[list[int]] = []

        def note(executor, x, timesteps, context, y, control, transformer_options, **kwargs):
            rows.append(transformer_options["cond_or_uncond"])
            return executor(x, timesteps, context, y, control, transformer_options, **kwargs)

        model.add_wrapper_with_key("diffusion_model", "test", note)
        scene.host(scene.sigmas("simple", 3), model)
        assert [len(call) for call in rows] == [2, 1] * 3

    def test_a_replaced_attention_is_chained_and_not_lost(self, scene: Scene) -> None:
        calls = []

        def halved(q, k, v, extra_options, mask=None):
            calls.append(extra_options["block"])
            return 0.5 * v

        theirs = scene.patcher.clone()
        theirs.set_model_attn1_replace(halved, "input", 7)
        sigmas = scene.sigmas("simple", 2)
        before = scene.host(sigmas, sampling_run.with_method(theirs, PAIntA()))
        assert set(calls) == {("input", 7)}
        after = sampling_run.with_method(scene.patcher, PAIntA())
        after.set_model_attn1_replace(halved, "input", 7)
        assert torch.equal(scene.host(sigmas, after), before)

    def test_a_replacement_that_attends_as_the_host_does_changes_nothing(self, scene: Scene) -> None:
        from comfy.ldm.modules.attention import optimized_attention

        def as_host(q, k, v, extra_options):
            return optimized_attention(q, k, v, extra_options["n_heads"])

        theirs = scene.patcher.clone()
        for index in (4, 5, 7, 8):
            theirs.set_model_attn1_replace(as_host, "input", index)
        sigmas = scene.sigmas("simple", 2)
        expected = scene.host(sigmas, both(scene.patcher))
        assert_close(scene.host(sigmas, both(theirs)), expected)

    def test_keys_appended_by_another_patch_keep_their_weight(self, scene: Scene) -> None:
        """A reference picture's keys, say: PAIntA scales the picture's own keys and no others."""

        def append(n, context, value, extra_options):
            extra = torch.full_like(context[:, :3], 0.7)
            return n, torch.cat((context, extra), dim=1), torch.cat((value, -extra), dim=1)

        model = scene.patcher.clone()
        model.set_model_attn1_patch(append)
        sigmas = scene.sigmas("simple", 2)
        out = scene.host(sigmas, sampling_run.with_method(model, PAIntA()))
        assert relative_error(out, scene.host(sigmas, sampling_run.with_method(scene.patcher, PAIntA()))) > 1e-3
        assert relative_error(out, scene.host(sigmas, model)) > 1e-3

    def test_an_attention_override_stays_in_use(self, scene: Scene) -> None:
        counts = {True: 0, False: 0}

        def counted(function, *args, **kwargs):
            counts[torch.is_grad_enabled()] += 1
            return function(*args, **kwargs)

        model = both(scene.patcher)
        model.model_options["transformer_options"]["optimized_attention_override"] = counted
        scene.host(scene.sigmas("simple", 1), model)
        # Recording passes use the host's differentiable attention; everything else goes through the override.
        assert counts[True] == 0
        assert counts[False] > 0

    def test_writing_into_what_autograd_has_saved_changes_no_gradient(self, scene: Scene) -> None:
        """The same patch written in place and not: FreeU and others do the former."""

        def in_place(h, hsp, options):
            h[:, ::2] = h[:, ::2] * (1.0 + h.mean(1, keepdim=True).tanh())
            return h, hsp

        def apart(h, hsp, options):
            scale = torch.zeros_like(h)
            scale[:, ::2] = 1.0
            return h * (1.0 + scale * h.mean(1, keepdim=True).tanh()), hsp

        sigmas = scene.sigmas("simple", 2)
        results = []
        for patch in (in_place, apart):
            model = sampling_run.with_method(scene.patcher, RASG(eta=0.5)).clone()
            model.set_model_output_block_patch(patch)
            results.append(scene.host(sigmas, model))
        assert_close(*results)

    def test_a_controlnet_on_the_same_model(self, scene: Scene) -> None:
        plain = scene.host(scene.sigmas("simple", 3), both(scene.patcher))
        scene.add_controlnet()
        sigmas = scene.sigmas("simple", 3)
        guided = scene.host(sigmas, both(scene.patcher))
        assert guided.isfinite().all()
        assert relative_error(guided, plain) > 1e-4
        assert relative_error(guided, scene.host(sigmas)) > 1e-3


class TestErrors:
    def test_an_error_in_the_middle_leaves_nothing_behind(self, scene: Scene) -> None:
        sigmas = scene.sigmas("simple", 3)
        model = both(scene.patcher)
        expected = scene.host(sigmas, model)
        for stop_at in (1, 2, 3):
            calls = itertools.count(1)

            def interrupt(h, options, calls=calls, stop_at=stop_at):
                if options["block"] == ("input", 5) and next(calls) == stop_at:
                    raise comfy.model_management.InterruptProcessingException
                return h

            broken = model.clone()
            broken.set_model_input_block_patch(interrupt)
            with pytest.raises(comfy.model_management.InterruptProcessingException):
                scene.host(sigmas, broken)
            assert hooks_on(scene.model.diffusion_model) == 0
            assert not torch.is_grad_enabled() or not torch.is_inference_mode_enabled()
            assert torch.equal(scene.host(sigmas, model), expected)

    def test_a_graph_that_does_not_fit_goes_to_main_memory(self, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        score_gradient = pack_module("model_patches.core.score_gradient")
        model = both(scene.patcher)
        sigmas = scene.sigmas("simple", 3)
        expected = scene.host(sigmas, model)
        where, gradient = [], score_gradient._RecordedCall._differentiated

        def too_big(self):
            if not where:
                raise comfy.model_management.OOM_EXCEPTION("out of memory")
            return gradient(self)

        saving_copies = pack_module("model_patches.core.autograd").saving_copies

        def note(module, on_cpu):
            where.append(on_cpu)
            return saving_copies(module, on_cpu)

        monkeypatch.setattr(score_gradient._RecordedCall, "_differentiated", too_big)
        monkeypatch.setattr(score_gradient, "saving_copies", note)
        assert_close(scene.host(sigmas, model), expected, 1e-5)
        assert where == [True] * 3

    @pytest.mark.quick
    def test_a_model_without_a_unet_is_refused(self) -> None:
        class Flux(torch.nn.Module):
            diffusion_model = torch.nn.Linear(1, 1)

        class Patcher:
            model = Flux()

        for settings in (PAIntA(), RASG()):
            with pytest.raises(ValueError, match=r"works on SD1\.5, SD2 and SDXL.*this MODEL is Flux") as refused:
                sampling_run.with_method(Patcher(), settings)
            assert "\n" not in str(refused.value)

    def test_a_compiled_model_is_refused(self, scene: Scene) -> None:
        from comfy_extras.nodes_torch_compile import TorchCompileModel

        compiled = TorchCompileModel.execute(both(scene.patcher), "inductor").result[0]
        with pytest.raises(ValueError, match="TorchCompileModel"):
            scene.host(scene.sigmas("simple", 2), compiled)

    @pytest.mark.parametrize("shape", [(0, 8, 8), (5,)])
    def test_a_mask_that_is_none_is_refused(self, scene: Scene, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="mask"):
            sampling_run.with_method(scene.patcher, PAIntA(mask=torch.ones(shape)))


class TestPrecision:
    @pytest.mark.parametrize(("family", "dtype"), [("sd15", torch.float16), ("sdxl", torch.bfloat16)], ids=str)
    def test_half_precision_follows_float32(self, family: str, dtype: torch.dtype) -> None:
        half, full = (Scene(family, True, True, of) for of in (dtype, torch.float32))
        sigmas = full.sigmas("simple", 4)[1:3]
        guided = half.host(sigmas, both(half.patcher, eta=0.3))
        expected = full.host(sigmas, both(full.patcher, eta=0.3))
        # As close to float32 as the plain model is in the same type.
        plain = relative_error(half.host(sigmas), full.host(sigmas))
        assert relative_error(guided, expected) < 4 * plain
