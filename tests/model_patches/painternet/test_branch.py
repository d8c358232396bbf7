"""A control branch through the host's sampling: the host with the paper's formulas in its UNet, and properties."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from devtools.pack import load_pack, pack_module
from truefill_testing.branch_files import SMALL, without_attention
from truefill_testing.branch_scene import HOLE, MeanVae, SmallBranch, branched_literally, picture
from truefill_testing.pilot_scene import CALM, pilot
from truefill_testing.scene import Scene, forget_models, relative_error
from truefill_testing.small_models import small_conditioning
from truefill_testing.subject_weights import random_assign

import comfy.model_management  # isort: skip
from comfy.ldm.modules.attention import optimized_attention  # isort: skip
import nodes as host_nodes  # isort: skip

load_pack()
branch = pack_module("model_patches.painternet.branch")
sampling_run = pack_module("model_patches.core.sampling_run")
PAIntA = pack_module("model_patches.hd_painter.painta").PAIntA
RASG = pack_module("model_patches.hd_painter.rasg").RASG
SemanticBoundary = pack_module("model_patches.pilot.semantic_boundary").SemanticBoundary
Refine = pack_module("model_patches.lar_gen.reference").Refine


@pytest.fixture(scope="module", autouse=True)
def _no_leftovers():
    yield
    forget_models()


@pytest.mark.parametrize(
    ("family", "inpainting", "attention", "scales"),
    [
        pytest.param(
            "sd15", False, True, {"strength": 0.8, "layer_scale": 0.5, "attention_scale": 1.2}, marks=pytest.mark.quick
        ),
        ("sd15", True, True, {}),
        ("sd15", False, False, {"strength": 0.7}),
        ("sd2", False, True, {}),
        ("sdxl", False, True, {"strength": 0.8, "attention_scale": 0.5}),
        ("sdxl", True, False, {}),
    ],
)
def test_it_is_the_formula(family: str, inpainting: bool, attention: bool, scales: dict[str, float]) -> None:
    scene = Scene(family, inpainting, True, v_prediction=family == "sd2")
    small = SmallBranch(family, SMALL[family] if attention else without_attention(SMALL[family]))
    sigmas = scene.sigmas("simple", 3)
    plain, ours = scene.host(sigmas), scene.host(sigmas, small.on(scene.patcher, **scales))
    strength = scales.get("strength", 1.0)
    factors = [strength * scales.get(name, 1.0) for name in ("layer_scale", "attention_scale")]
    with branched_literally(scene, small, *factors):
        right = scene.host(sigmas)
    assert relative_error(ours, right) < 1e-5 and relative_error(ours, plain) > 1e-2
    assert torch.equal(scene.host(sigmas), plain)


def test_each_scale_0_is_its_points_gone_and_both_are_no_node() -> None:
    scene, small = Scene("sd15", False, True), SmallBranch("sd15")
    sigmas = scene.sigmas("simple", 2)
    plain = scene.host(sigmas)
    for layer_scale, attention_scale in ((0.0, 1.0), (1.0, 0.0)):
        ours = scene.host(sigmas, small.on(scene.patcher, layer_scale=layer_scale, attention_scale=attention_scale))
        with branched_literally(scene, small, layer_scale, attention_scale):
            right = scene.host(sigmas)
        assert relative_error(ours, right) < 1e-5 and relative_error(ours, plain) > 1e-3
    no_scale = {"layer_scale": 0.0, "attention_scale": 0.0}
    for options in (no_scale, {"strength": 0.0}, {"mask": torch.zeros(128, 104)}, {"start_percent": 1.0}):
        assert torch.equal(scene.host(sigmas, small.on(scene.patcher, **options)), plain), options
    late = scene.host(sigmas, small.on(scene.patcher, start_percent=0.5))
    assert (
        relative_error(late, plain) > 1e-3 and relative_error(late, scene.host(sigmas, small.on(scene.patcher))) > 1e-3
    )


def test_a_fresh_branch_is_no_node() -> None:
    """Its zero convolutions are zero."""
    scene, small = Scene("sd15", False, True, torch.float32), SmallBranch("sd15")
    for point in small.model.model.points:
        for weight in point.parameters():
            weight.data.zero_()
    sigmas = scene.sigmas("simple", 2)
    assert torch.equal(scene.host(sigmas, small.on(scene.patcher)), scene.host(sigmas))


def test_it_reads_the_prompts_it_is_given_each_for_its_rows() -> None:
    scene, small = Scene("sdxl", False, True, torch.float32), SmallBranch("sdxl")
    sigmas = scene.sigmas("simple", 2)
    own = scene.host(sigmas, small.on(scene.patcher))
    others = [branch.Text.of(small_conditioning("sdxl", seed), "a prompt") for seed in (8, 9)]
    theirs = [branch.Text.of(conditioning, "a prompt") for conditioning in (scene.positive, scene.negative)]
    same = scene.host(sigmas, small.on(scene.patcher, positive=theirs[0], negative=theirs[1]))
    assert relative_error(same, own) < 1e-5
    for index, name in enumerate(("positive", "negative")):
        assert relative_error(scene.host(sigmas, small.on(scene.patcher, **{name: others[index]})), own) > 1e-3
    # The prompt of one side is the other's where they are swapped: rows are told apart by their role.
    swapped = scene.host(sigmas, small.on(scene.patcher, positive=theirs[1], negative=theirs[0]))
    assert relative_error(swapped, own) > 1e-3


def test_a_longer_prompt_of_its_own() -> None:
    scene, small = Scene("sd15", False, True, torch.float32), SmallBranch("sd15")
    sigmas = scene.sigmas("simple", 2)
    ((context, options),) = scene.positive
    twice = branch.Text.of([[torch.cat([context, context], dim=1), options]], "a prompt")
    own = scene.host(sigmas, small.on(scene.patcher))
    assert relative_error(scene.host(sigmas, small.on(scene.patcher, positive=twice)), own) < 1e-4


@pytest.mark.quick
def test_what_it_would_see_twice_it_sees_once() -> None:
    """A branch without attention has no prompt, and two prompts may be one."""
    scene = Scene("sd15", False, True, torch.float32)
    reading, blind = SmallBranch("sd15"), SmallBranch("sd15", without_attention(SMALL["sd15"]))
    sigmas, rows = scene.sigmas("simple", 1), []
    for small in (reading, blind):
        small.model.model.unet.time_embed[-1].register_forward_hook(
            lambda module, given, output: rows.append(len(output))
        )
    text = branch.Text.of(scene.positive, "a prompt")
    scene.host(sigmas, reading.on(scene.patcher))
    scene.host(sigmas, reading.on(scene.patcher, positive=text, negative=text))
    scene.host(sigmas, blind.on(scene.patcher))
    assert rows == [4, 2, 2]


def test_several_branches_add_up_and_come_off_alone() -> None:
    scene = Scene("sd15", False, True)
    first, second = SmallBranch("sd15", seed=61), SmallBranch("sd15", without_attention(SMALL["sd15"]), seed=62)
    sigmas = scene.sigmas("simple", 2)
    both = scene.host(sigmas, second.on(first.on(scene.patcher)))
    assert relative_error(both, scene.host(sigmas, first.on(second.on(scene.patcher)))) < 1e-5
    assert relative_error(both, scene.host(sigmas, first.on(scene.patcher))) > 1e-3
    assert relative_error(both, scene.host(sigmas, second.on(scene.patcher))) > 1e-3
    halves = scene.host(sigmas, first.on(first.on(scene.patcher, strength=0.5), strength=0.5))
    assert relative_error(halves, scene.host(sigmas, first.on(scene.patcher))) < 1e-4


@pytest.mark.quick
def test_the_host_loads_it_and_lets_it_go() -> None:
    scene, small = Scene("sd15", False, True, torch.float32), SmallBranch("sd15")
    model = small.on(small.on(scene.patcher))
    loaded = [[one.model for one in of] for key, of in model.additional_models.items() if "Branch" in key]
    assert loaded == [[small.model.model]] * 2
    settings = small.settings(strength=0.0, number=1)
    assert len(sampling_run.with_method(model, settings).additional_models) == 1
    assert not scene.patcher.additional_models


def test_beside_the_other_methods_in_any_order() -> None:
    scene, small = Scene("sd15", True, True, torch.float32), SmallBranch("sd15")
    sigmas = scene.sigmas("simple", 3)
    subject = Refine(latents=5.0 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)), is_one=True)
    others = (
        PAIntA(end_percent=1.0),
        RASG(eta=0.1),
        SemanticBoundary(),
        random_assign(scene.model.diffusion_model),
        subject,
    )

    def guided(model: Any) -> Any:
        for settings in others:
            model = sampling_run.with_method(model, settings)
        return model

    together = scene.host(sigmas, small.on(guided(scene.patcher)))
    assert torch.equal(together, scene.host(sigmas, guided(small.on(scene.patcher))))
    assert relative_error(together, scene.host(sigmas, guided(scene.patcher))) > 1e-3
    assert relative_error(together, scene.host(sigmas, small.on(scene.patcher))) > 1e-3


def test_refines_look_at_the_subject_goes_without_the_branch() -> None:
    """It is another picture than the branch's."""
    scene, small = Scene("sd15", False, True, torch.float32), SmallBranch("sd15")
    subject = Refine(latents=5.0 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)), is_one=True)
    shapes = []
    layer = scene.model.diffusion_model.input_blocks[1][0]
    handle = layer.register_forward_hook(
        lambda module, given, output: shapes.append((output.shape[-2:], output.clone()))
    )
    try:
        sigmas = scene.sigmas("simple", 1)
        scene.host(sigmas, sampling_run.with_method(scene.patcher, subject))
        alone = [of for size, of in shapes if tuple(size) == (8, 8)]
        shapes.clear()
        scene.host(sigmas, sampling_run.with_method(small.on(scene.patcher), subject))
        beside = [of for size, of in shapes if tuple(size) == (8, 8)]
    finally:
        handle.remove()
    assert len(alone) == len(beside) == 1 and torch.equal(alone[0], beside[0])


def test_beside_a_lora_on_the_model_it_is_the_formula() -> None:
    scene, small = Scene("sd15", False, True), SmallBranch("sd15")
    sigmas, model = scene.sigmas("simple", 2), scene.patcher.clone()
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    change = torch.randn(32, 24, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert model.add_patches({key: (change,)}, 0.5) == [key]
    ours = scene.host(sigmas, small.on(model))
    with branched_literally(scene, small):
        right = scene.host(sigmas, model)
    assert relative_error(ours, right) < 1e-5
    assert relative_error(ours, scene.host(sigmas, small.on(scene.patcher))) > 1e-3


@pytest.mark.parametrize("memory", ["record", "recompute"])
def test_with_the_pilot_sampler(memory: str) -> None:
    scene, small = Scene("sd15", False, True, torch.float32), SmallBranch("sd15")
    settings = pilot.PILOT(**CALM, interval=1, iterations=2, memory=memory)
    sigmas = scene.sigmas("simple", 2)
    plain, ours = (
        scene.host(sigmas, model, pilot.pilot_sampler(settings, lambda text: None))
        for model in (scene.patcher, small.on(scene.patcher))
    )
    assert ours.isfinite().all() and relative_error(ours, plain) > 1e-3


def test_recomputing_blocks_changes_nothing() -> None:
    """The branch's additions are there again when a block runs once more in the backward pass."""
    scene, small = Scene("sd15", False, True), SmallBranch("sd15")
    sigmas = scene.sigmas("simple", 2)
    made = [
        scene.host(
            sigmas,
            small.on(scene.patcher),
            pilot.pilot_sampler(pilot.PILOT(**CALM, interval=1, iterations=2, memory=memory), lambda text: None),
        )
        for memory in ("record", "recompute")
    ]
    assert relative_error(*made) < 1e-9


def test_controlnet_areas_and_a_batch_split_for_want_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    scene, small = Scene("sd15", True, True, torch.float32), SmallBranch("sd15")
    scene.add_controlnet()
    (limited,) = host_nodes.ConditioningSetArea().append(scene.positive, 64, 64, 32, 32, 1.0)
    scene.positive = scene.positive + limited
    sigmas, model = scene.sigmas("simple", 2), small.on(scene.patcher)
    together = scene.host(sigmas, model)
    monkeypatch.setattr(type(scene.patcher), "get_free_memory", lambda self, device: 0)
    assert relative_error(scene.host(sigmas, model), together) < 1e-4


def test_who_reads_the_cross_attentions_input_reads_what_the_attention_does() -> None:
    """As PAIntA and SBC do, whatever comes first."""
    scene, small = Scene("sd15", False, True, torch.float32), SmallBranch("sd15")
    read, used = [], []

    def look(n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, extra_options: dict[str, Any]) -> Any:
        read.append(n.clone())
        return n, context, value

    attention = scene.model.diffusion_model.input_blocks[1][1].transformer_blocks[0].attn2
    handle = attention.register_forward_pre_hook(lambda module, given: used.append(given[0].clone()))
    model = scene.patcher.clone()
    model.set_model_attn2_patch(look)
    try:
        scene.host(scene.sigmas("simple", 1), small.on(model))
    finally:
        handle.remove()
    assert torch.equal(read[0], used[0])


def test_a_cross_attention_that_another_pack_has_replaced_asks_with_the_control_points() -> None:
    """As IP-Adapter packs replace them: here by the host's own attention, so that nothing may change."""
    scene, small = Scene("sd15", False, True), SmallBranch("sd15")
    sigmas, model, asked = scene.sigmas("simple", 2), scene.patcher.clone(), []

    def replaced(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        asked.append(q)
        return optimized_attention(q, k, v, extra["n_heads"], transformer_options=extra)

    for block in (("input", 1), ("input", 4), ("middle", 0), ("output", 5)):
        model.set_model_attn2_replace(replaced, *block)
    ours = scene.host(sigmas, small.on(model))
    with branched_literally(scene, small):
        right = scene.host(sigmas)
    assert len(asked) == 2 * 4 and relative_error(ours, right) < 1e-5


@pytest.mark.quick
def test_other_patches_stay_and_nothing_is_left_on_the_unet() -> None:
    scene, small = Scene("sd15", False, True, torch.float32), SmallBranch("sd15")
    seen: list[str] = []

    def noticed(name: str) -> Any:
        def patch(*given: Any) -> Any:
            seen.append(name)
            return given[:3] if name == "attn2" else given[:2] if name == "output" else given[0]

        return patch

    model = scene.patcher.clone()
    model.set_model_attn2_patch(noticed("attn2"))
    model.set_model_output_block_patch(noticed("output"))
    model.set_model_input_block_patch_after_skip(noticed("input"))
    forward = scene.model.diffusion_model.forward
    sigmas = scene.sigmas("simple", 1)
    before = scene.host(sigmas)
    scene.host(sigmas, small.on(model))
    assert {"attn2", "output", "input"} == set(seen)
    unet = scene.model.diffusion_model
    assert unet.forward == forward and not any(module._forward_hooks for module in unet.modules())
    assert torch.equal(scene.host(sigmas), before)


def test_after_an_interrupt_nothing_stays_behind() -> None:
    scene, small = Scene("sd15", False, True, torch.float32), SmallBranch("sd15")
    sigmas, model = scene.sigmas("simple", 2), small.on(scene.patcher)
    before, expected = scene.host(sigmas), scene.host(sigmas, model)

    def interrupt(h: torch.Tensor, skip: torch.Tensor, options: dict[str, Any]) -> Any:
        raise comfy.model_management.InterruptProcessingException

    broken = model.clone()
    broken.set_model_output_block_patch(interrupt)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        scene.host(sigmas, broken)
    assert not any(module._forward_hooks for module in scene.model.diffusion_model.modules())
    assert torch.equal(scene.host(sigmas), before) and torch.equal(scene.host(sigmas, model), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    scene, single, small = (
        Scene("sd15", False, True, dtype),
        Scene("sd15", False, True, torch.float32),
        SmallBranch("sd15"),
    )
    sigmas = scene.sigmas("simple", 2)
    half, exact = (of.host(sigmas, small.on(of.patcher)) for of in (scene, single))
    hosts_own = relative_error(scene.host(sigmas), single.host(sigmas))
    assert relative_error(half, exact) < 3 * hosts_own
    assert relative_error(exact, single.host(sigmas)) > 3 * hosts_own


@pytest.mark.quick
def test_a_latent_of_another_size_gets_the_picture_in_that_size() -> None:
    """As a second pass at a higher resolution has it; the VAE is asked before models are loaded."""
    small, larger = SmallBranch("sd15"), picture(size=(256, 208))
    settings = small.settings(picture=larger, mask=torch.nn.functional.interpolate(HOLE, scale_factor=2))
    prepared = settings.prepared((16, 13))
    assert tuple(prepared.latents.shape) == (2, 4, 16, 13)
    fitted = torch.nn.functional.interpolate(
        larger.movedim(-1, 1), (128, 104), mode="bicubic", antialias=True, align_corners=False
    ).clamp(0, 1)
    expected = MeanVae().encode(torch.where(HOLE > 0, 0.0, fitted).movedim(1, -1))
    assert relative_error(prepared.latents[:, :, :2], expected[:, :, :2]) < 1e-6
    scene = Scene("sd15", False, True, torch.float32)
    sigmas = scene.sigmas("simple", 1)
    assert relative_error(scene.host(sigmas, branch.with_branch(scene.patcher, settings)), scene.host(sigmas)) > 1e-3


@pytest.mark.quick
def test_an_odd_picture_is_cut_as_the_vae_cuts_it() -> None:
    odd = picture(size=(133, 111))
    planes = odd.movedim(-1, 1)
    assert torch.equal(branch.fitted(planes, (16, 13), 8), planes[..., 2:130, 3:107])
    assert branch.fitted(planes, (8, 8), 8).shape[-2:] == (64, 64)
    # What is hidden are the pixels of the hole, and no others.
    mask = torch.zeros(1, 1, 133, 111)
    mask[..., 50:67, 35:51] = 1.0
    vae = MeanVae()
    seen = []
    vae.encode = lambda pixels: seen.append(pixels) or MeanVae().encode(pixels)
    branch.masked_latents(vae, odd[:1], mask, (16, 13))
    (shown,) = seen
    assert torch.equal((shown == 0).all(-1)[0], mask[0, 0, 2:130, 3:107] > 0)
    keep = branch.keep_channel(mask, (16, 13), 8)
    assert keep[0, 0].tolist() == [
        [float(not (6 <= row < 9 and 4 <= column < 6)) for column in range(13)] for row in range(16)
    ]


@pytest.mark.quick
def test_the_mask_channel_is_of_the_nearest_pixel() -> None:
    mask = torch.zeros(1, 1, 32, 24)
    mask[..., 8:16, 0:9] = 0.3
    keep = branch.keep_channel(mask, (4, 3), 8)
    assert keep[0, 0].tolist() == [[1, 1, 1], [0, 0, 1], [1, 1, 1], [1, 1, 1]]


@pytest.mark.quick
def test_a_part_of_the_picture_is_cut_out_of_picture_and_mask() -> None:
    settings = SmallBranch("sd15").settings()
    part = settings.prepared((16, 13)).of_part(lambda planes: planes[..., 8:72, 16:80])
    assert torch.equal(part.picture, picture()[:, 8:72, 16:80]) and torch.equal(part.mask, HOLE[..., 8:72, 16:80])
    assert part.latents is None and part.prepared((8, 8)).latents.shape[-2:] == (8, 8)


@pytest.mark.quick
def test_what_does_not_fit_gets_one_sentence() -> None:
    scene, other = Scene("sd15", False, True, torch.float32), Scene("sdxl", False, True, torch.float32)
    small = SmallBranch("sd15")
    with pytest.raises(
        ValueError, match=r"^Apply Branch was given another branch \(PainterNet, 28 layers\) and .* one family\.$"
    ):
        small.on(other.patcher)
    flux = SimpleNamespace(model=SimpleNamespace(diffusion_model=torch.nn.Linear(1, 1)))
    with pytest.raises(ValueError, match=r"^Apply Branch works on SD1.5, SD2 and SDXL checkpoints .*\.$"):
        small.settings().check(flux)
    with pytest.raises(ValueError, match=r"^These batches don't go together: 2 in 'image', 3 in 'mask'; .*\.$"):
        small.on(scene.patcher, mask=torch.ones(3, 128, 104))
    wide = branch.Text(context=torch.zeros(1, 77, 40), pooled=None)
    with pytest.raises(
        ValueError, match=r"^Apply Branch's branch \(PainterNet\) reads prompts of width 24, and .* 40: .*\.$"
    ):
        small.on(scene.patcher, positive=wide)
    fitting = branch.Text(context=torch.zeros(1, 77, 24), pooled=None)
    with pytest.raises(
        ValueError, match=r"^Apply Branch's branch \(PainterNet\) reads prompts of width 24, and .* 40: .*\.$"
    ):
        small.on(scene.patcher, positive=fitting, negative=wide)
    with pytest.raises(ValueError, match=r"^Apply Branch's positive is 2 prompts in one .*\.$"):
        branch.Text.of(2 * scene.positive, "positive")
    vae = MeanVae()
    vae.mixture = torch.ones(16, 3)
    with pytest.raises(ValueError, match=r"^Apply Branch was given a VAE whose latents have 16 channels, .*\.$"):
        scene.host(scene.sigmas("simple", 1), small.on(scene.patcher, vae=vae))
