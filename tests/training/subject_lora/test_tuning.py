"""A subject's LoRA: two steps against a literal loop in float64, and the file against the host's own loader."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from devtools.pack import load_pack, pack_module
from truefill_testing.literal_dreammix import weighted_loss
from truefill_testing.scene import exact_unet, forget_models, patcher_of, randn
from truefill_testing.small_models import small_conditioning

import comfy.lora  # isort: skip
import comfy.model_base  # isort: skip
import comfy.model_management  # isort: skip

load_pack()
adapters = pack_module("training.subject_lora.adapters")
tuning = pack_module("training.subject_lora.tuning")

SIZE = (16, 13)
RANK = 3


@pytest.fixture(scope="module", autouse=True)
def _no_leftovers():
    yield
    forget_models()


def settings(**changes: Any) -> Any:
    return tuning.Tuning(**{"steps": 2, "accumulate": 2, "learning_rate": 1e-2, "rank": RANK, "seed": 5, **changes})


def example_of(family: str, inpainting: bool, seed: int) -> Any:
    masks = (randn(2, 1, *SIZE, seed=seed + 1) > 0).float()
    concat = [
        {"concat_latent_image": 5.0 * randn(1, 4, *SIZE, seed=seed + 2 + k).float(), "concat_mask": masks[k : k + 1]}
        for k in range(2)
    ]
    return tuning.Example(
        latent=5.0 * randn(1, 4, *SIZE, seed=seed).float(),
        masks=masks,
        concat=concat if inpainting else [],
        prompts=[small_conditioning(family, seed=seed), small_conditioning(family, seed=seed + 1)],
    )


def literally(
    family: str, inpainting: bool, v_prediction: bool, subject: list[Any], regular: list[Any], given: Any
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The weights up @ down of each layer after two steps, with W + up down as one matrix; the losses."""
    patcher = patcher_of(family, inpainting, torch.float64, v_prediction=v_prediction)
    unet, table = exact_unet(family, inpainting), patcher.model.model_sampling.sigmas.double()
    scale = patcher.model.latent_format.scale_factor
    generator = torch.Generator().manual_seed(given.seed)
    names = [name for name, _ in unet.named_modules() if name.endswith((".to_k", ".to_v"))]
    pairs = {}
    # As they lie in the network: each attention's keys, then its values.
    for name in names:
        rows, columns = unet.get_parameter(f"{name}.weight").shape
        down = (torch.randn(given.rank, columns, generator=generator) / given.rank).double().requires_grad_()
        pairs[name] = (down, torch.zeros(rows, given.rank, dtype=torch.float64, requires_grad=True))
    weights = [weight for pair in pairs.values() for weight in pair]
    optimizer = torch.optim.SGD(weights, lr=given.learning_rate)
    losses = []
    for step in range(given.steps):
        optimizer.zero_grad()
        losses.append(0.0)
        for part in range(given.accumulate):
            for examples, share, is_regular in ((subject, 1.0, 0), (regular, given.regular_weight, 1)):
                if not examples:
                    continue
                chance = np.random.default_rng((given.seed, step, part, is_regular))
                example = examples[int(chance.integers(len(examples)))]
                mask, prompt = int(chance.integers(2)), int(chance.integers(2))
                time, noise_seed = int(chance.integers(1000)), int(chance.integers(1 << 31))
                clean = scale * example.latent.double()
                noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(noise_seed)).double()
                share_of_signal = 1.0 / (1.0 + table[time] ** 2)
                z = share_of_signal.sqrt() * clean + (1.0 - share_of_signal).sqrt() * noise
                right = noise
                if v_prediction:
                    right = share_of_signal.sqrt() * noise - (1.0 - share_of_signal).sqrt() * clean
                if inpainting:
                    concat = example.concat[mask]
                    z = torch.cat(
                        [z, concat["concat_mask"].double(), scale * concat["concat_latent_image"].double()], 1
                    )
                ((context, options),) = example.prompts[prompt]
                y = patcher.model.encode_adm(
                    pooled_output=options["pooled_output"], width=8 * SIZE[1], height=8 * SIZE[0]
                )
                merged = {
                    f"{name}.weight": unet.get_parameter(f"{name}.weight") + up @ down
                    for name, (down, up) in pairs.items()
                }
                arguments = (z, torch.tensor([float(time)], dtype=torch.float64))
                keywords = {"context": context.double(), "y": None if y is None else y.double()}
                made = torch.func.functional_call(unet, merged, arguments, keywords)
                of_mask = example.masks[mask : mask + 1].double()
                loss = weighted_loss((made - right) ** 2, of_mask, given.inside, given.outside)
                loss = share * loss / given.accumulate
                loss.backward()
                losses[-1] += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(weights, given.clip)
        optimizer.step()
    return {name: (up @ down).detach() for name, (down, up) in pairs.items()}, losses


@pytest.mark.parametrize(
    ("family", "inpainting", "v_prediction", "with_regular"),
    [
        ("sd15", True, False, True),
        ("sd2", False, True, False),
        ("sdxl", False, False, True),
    ],
)
def test_two_steps_are_the_literal_ones(family: str, inpainting: bool, v_prediction: bool, with_regular: bool) -> None:
    patcher = patcher_of(family, inpainting, torch.float64, v_prediction=v_prediction)
    subject = [example_of(family, inpainting, 30), example_of(family, inpainting, 40)]
    regular = [example_of(family, inpainting, 50)] if with_regular else []
    given = settings(learning_rate=1.0)
    told: list[float] = []
    with torch.inference_mode():
        tuner = tuning.Tuner(patcher, given)
    weights = [weight for of in tuner.adapters.values() for weight in of.double().parameters()]
    assert isinstance(tuner.optimizer, torch.optim.Adam)
    # Adam divides each gradient by its own size: what rounding does to the smallest ones would be as large as any step.
    tuner.optimizer = torch.optim.SGD(weights, lr=given.learning_rate)
    with torch.inference_mode():
        tuner.run(subject, regular, lambda step, loss: told.append(loss))
    right, losses = literally(family, inpainting, v_prediction, subject, regular, given)
    assert np.allclose(told, losses, rtol=1e-5) and right.keys() == tuner.adapters.keys()
    for name, expected in right.items():
        ours = tuner.adapters[name]
        apart = (ours.up @ ours.down).detach() - expected
        assert float(apart.norm() / expected.norm()) < 1e-5, name
    assert all(bool(of.up.abs().max() > 0) for of in tuner.adapters.values())


@pytest.mark.parametrize(("family", "outputs"), [pytest.param("sd15", False, marks=pytest.mark.quick), ("sdxl", True)])
def test_the_file_is_what_was_trained_and_loads_in_the_host(family: str, outputs: bool) -> None:
    """By the host's LoRA loader: it changes the projections of the attentions, and by up @ down."""
    patcher = patcher_of(family, False, torch.float32)
    given = settings(outputs=outputs)
    with torch.inference_mode():
        tuner = tuning.Tuner(patcher, given)
        tuner.run([example_of(family, False, 30)], [], lambda step, loss: None)
        tensors = adapters.as_file(tuner.adapters, tuner.unet_config)
        loaded = comfy.lora.load_lora(tensors, comfy.lora.model_lora_keys_unet(patcher.model, {}))
        model = patcher.clone()
        assert set(model.add_patches(loaded, 1.0)) == set(loaded)
    kinds = (".to_k.weight", ".to_v.weight", *([".to_out.0.weight"] if outputs else []))
    of_model = {name for name in patcher.model.state_dict() if name.endswith(kinds)}
    assert set(loaded) == of_model and len(of_model) == len(tuner.adapters) > 10
    with torch.inference_mode():
        before = {name: weight.clone() for name, weight in patcher.model.state_dict().items()}
        comfy.model_management.load_models_gpu([model])
        after = {name: weight.clone() for name, weight in model.model.state_dict().items()}
        model.detach()
    for name in before:
        made = after[name] - before[name]
        if name not in of_model:
            assert not made.any(), name
            continue
        of = tuner.adapters[name.removeprefix("diffusion_model.").removesuffix(".weight")]
        assert torch.allclose(made, (of.up @ of.down).detach(), atol=1e-6) and made.any()


@pytest.mark.quick
def test_the_model_is_as_it_was_also_after_an_interrupt() -> None:
    patcher = patcher_of("sd15", False, torch.float32)
    before = {name: weight.clone() for name, weight in patcher.model.state_dict().items()}

    def stop(step: int, loss: float) -> None:
        raise comfy.model_management.InterruptProcessingException

    with torch.inference_mode():
        tuner = tuning.Tuner(patcher, settings())
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            tuner.run([example_of("sd15", False, 30)], [], stop)
    assert tuner.step == 1
    assert all(torch.equal(weight, before[name]) for name, weight in patcher.model.state_dict().items())
    assert not any(module._forward_hooks for module in patcher.model.modules())


def test_a_run_in_two_parts_and_without_recomputing_is_the_same() -> None:
    patcher = patcher_of("sd15", True, torch.float32)
    examples = [example_of("sd15", True, 30)]
    found = []
    for parts, recompute in (((2,), True), ((1, 2), True), ((2,), False)):
        tuner = tuning.Tuner(patcher, settings(recompute=recompute))
        for until in parts:
            tuner.run(examples, examples, lambda step, loss: None, until)
        found.append({name: of.up.detach() for name, of in tuner.adapters.items()})
    for other in found[1:]:
        assert all(torch.allclose(other[name], weight, atol=1e-6) for name, weight in found[0].items())


@pytest.mark.quick
def test_models_that_cant_be_tuned_get_one_sentence() -> None:
    patcher = patcher_of("sd15", False, torch.float32).clone()
    patcher.model = type("Flux", (), {"model_type": comfy.model_base.ModelType.FLUX, "diffusion_model": None})()
    with pytest.raises(ValueError, match=r"this one is Flux \(FLUX\)"):
        tuning.check(patcher)
    small = torch.nn.Module()
    small.input_blocks = torch.nn.ModuleList()
    small.weight = torch.nn.Parameter(torch.zeros(2).to(torch.float8_e4m3fn), requires_grad=False)
    patcher.model = type("SD", (), {"model_type": comfy.model_base.ModelType.EPS, "diffusion_model": small})()
    with pytest.raises(ValueError, match=r"quantized \(weight: float8_e4m3fn\)"):
        tuning.check(patcher)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_learns_the_same(dtype: torch.dtype) -> None:
    """The LoRA is in full precision; the model's rounding is all that differs, and no gradient is lost."""
    found = {}
    for kind in (torch.float32, dtype):
        tuner = tuning.Tuner(patcher_of("sd15", False, kind), settings(steps=1, accumulate=1))
        told: list[float] = []
        tuner.run([example_of("sd15", False, 30)], [], lambda step, loss, told=told: told.append(loss))
        found[kind] = (told[0], torch.cat([of.up.detach().flatten() for of in tuner.adapters.values()]))
    (exact_loss, exact), (loss, half) = found[torch.float32], found[dtype]
    assert loss == pytest.approx(exact_loss, rel=0.05)
    assert half.dtype == torch.float32 and half.isfinite().all()
    # Adam's first step is the gradient's sign: most of them agree.
    assert float((half.sign() == exact.sign()).float().mean()) > 0.9
