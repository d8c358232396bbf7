"""The host's samplers with another noise: equal to the host's own where the noise, or its amount, is the host's."""

from __future__ import annotations

import inspect
from functools import cache

import pytest
import torch

from devtools.pack import pack_module
from truefill_testing.literal_sampling import released_sigma, training_betas, true_ddim_sigma
from truefill_testing.small_models import small_conditioning, small_model

import comfy.sample  # isort: skip
import comfy.samplers  # isort: skip
from comfy.k_diffusion import sampling as k_diffusion  # isort: skip

stochastic = pack_module("model_patches.hd_painter.stochastic_samplers")

# Every sampler of the host's list that takes a noise sampler and is not deterministic all the same.
NOISY = [
    name
    for name in comfy.samplers.KSAMPLER_NAMES
    if name not in ("dpm_fast", "dpm_adaptive", "res_multistep", "res_multistep_cfg_pp")
    and "noise_sampler" in inspect.signature(getattr(k_diffusion, f"sample_{name}")).parameters
]
SIZE = (9, 7)


@cache
def model():
    return small_model("sd15", inpainting=False)


def sample(sampler, steps: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    noise, latent = (torch.randn(1, 4, *SIZE, generator=generator) for _ in range(2))
    sigmas = comfy.samplers.calculate_sigmas(model().model.model_sampling, "karras", steps)
    positive, negative = small_conditioning("sd15", 1), small_conditioning("sd15", 2)
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            model(), noise, 3.0, sampler, sigmas, positive, negative, latent, disable_pbar=True, seed=7
        )


def default_noise(x: torch.Tensor, seed: int | None):
    return k_diffusion.default_noise_sampler(x, seed=seed)


def assert_same(value: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert float((value - expected).abs().max() / expected.abs().max()) < tolerance


@pytest.mark.parametrize("name", list(stochastic.STOCHASTIC_FORMS))
def test_eta_0_is_the_deterministic_sampler(name: str) -> None:
    host = comfy.samplers.sampler_object(name)
    assert_same(sample(stochastic.with_noise(host, 0.0, default_noise)), sample(host))


def test_ddim_keeps_its_own_noise_for_the_known_part() -> None:
    changed = stochastic.with_noise(comfy.samplers.sampler_object("ddim"), 0.0, default_noise)
    assert changed.inpaint_options == {"random": True}


@pytest.mark.parametrize("name", NOISY)
def test_its_own_noise_at_its_own_eta_is_the_hosts_sampler(name: str) -> None:
    host = comfy.samplers.sampler_object(name)
    assert torch.equal(sample(stochastic.with_noise(host, 1.0, None)), sample(host))


@pytest.mark.parametrize("name", NOISY)
def test_the_noise_given_is_the_noise_added(name: str) -> None:
    host = comfy.samplers.sampler_object(name)
    calls = []

    def counted(x: torch.Tensor, seed: int | None):
        inner = default_noise(x, seed)

        def draw(sigma, sigma_next):
            calls.append(float(sigma))
            return inner(sigma, sigma_next)

        return draw

    changed = sample(stochastic.with_noise(host, 1.0, counted))
    assert calls
    with_host_option = comfy.samplers.KSAMPLER(
        lambda model, x, sigmas, extra_args, **rest: host.sampler_function(
            model, x, sigmas, extra_args=extra_args, noise_sampler=default_noise(x, extra_args["seed"]), **rest
        )
    )
    assert torch.equal(changed, sample(with_host_option))


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m", "dpmpp_2s_ancestral", "dpmpp_sde", "seeds_2"])
def test_a_little_eta_adds_as_much_noise_as_ddim_does(name: str) -> None:
    """The deviation from the deterministic path grows with eta as DDIM's does, whatever the sampler calls its eta."""
    assert 0.3 < deviation(name, 0.05) / deviation("euler", 0.05) < 3.0


@cache
def deviation(name: str, eta: float) -> float:
    sampler = comfy.samplers.sampler_object(name)
    noisy, still = (sample(stochastic.with_noise(sampler, e, default_noise), steps=12) for e in (eta, 0.0))
    return float((noisy - still).std())


@pytest.mark.parametrize(
    "name", ["heun", "dpm_fast", "dpm_adaptive", "lms", "uni_pc", "uni_pc_bh2", "deis", "ipndm", "dpmpp_2m_cfg_pp"]
)
def test_a_sampler_without_noise_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"adds none: choose euler, ddim") as refused:
        stochastic.with_noise(comfy.samplers.sampler_object(name), 0.1, default_noise)
    assert "\n" not in str(refused.value)


def test_a_foreign_sampler_object_is_refused() -> None:
    class Foreign(comfy.samplers.Sampler):
        pass

    with pytest.raises(ValueError, match="Foreign"):
        stochastic.with_noise(Foreign(), 0.1, default_noise)


def test_churn_is_refused() -> None:
    churning = comfy.samplers.ksampler("euler", {"s_churn": 2.0})
    with pytest.raises(ValueError, match="s_churn"):
        stochastic.with_noise(churning, 0.1, default_noise)


@pytest.mark.quick
def test_the_given_sampler_is_not_changed() -> None:
    host = comfy.samplers.ksampler("euler_ancestral", {"eta": 0.7})
    function = host.sampler_function
    stochastic.with_noise(host, 0.1, default_noise)
    assert host.extra_options == {"eta": 0.7}
    assert host.sampler_function is function


@pytest.mark.quick
def test_released_sigma_is_its_formula() -> None:
    model_sampling = model().model.model_sampling
    betas = training_betas()
    for t, s in ((999, 979), (500, 480), (41, 21)):
        sigma, sigma_next = model_sampling.sigmas[t], model_sampling.sigmas[s]
        abar_t, abar_s = (float(1 / (1 + level.double() ** 2)) for level in (sigma, sigma_next))
        expected = released_sigma(float(betas[t]), float(betas[s])) / true_ddim_sigma(abar_t, abar_s)
        assert stochastic.released_over_ddim(model_sampling, sigma, sigma_next) == pytest.approx(expected, rel=1e-3)
    assert stochastic.released_over_ddim(model_sampling, sigma, torch.tensor(0.0)) == 0.0


def test_released_sigma_is_for_ddim_alone() -> None:
    stochastic.with_noise(comfy.samplers.sampler_object("ddim"), 0.1, default_noise, "released")
    with pytest.raises(ValueError, match="dpmpp_2m_sde"):
        stochastic.with_noise(comfy.samplers.sampler_object("dpmpp_2m_sde"), 0.1, default_noise, "released")


@pytest.mark.quick
@pytest.mark.parametrize("name", ["lcm", "ddpm", "er_sde", "sa_solver"])
def test_samplers_without_an_eta_say_so(name: str) -> None:
    assert not stochastic.has_eta(comfy.samplers.sampler_object(name))


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m", "euler_ancestral", "dpmpp_3m_sde_gpu"])
def test_samplers_with_an_eta_say_so(name: str) -> None:
    assert stochastic.has_eta(comfy.samplers.sampler_object(name))
