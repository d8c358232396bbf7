"""The search for a noise that the attention likes better, on small networks through the host's sampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from devtools.pack import load_pack, pack_module
from truefill_testing.scene import Scene, forget_models

import comfy.samplers  # isort: skip

load_pack()
noise_search = pack_module("evaluation.noise_search")
sampling_run = pack_module("model_patches.core.sampling_run")


@pytest.fixture(scope="module", autouse=True)
def _no_leftovers():
    yield
    forget_models()


@pytest.mark.parametrize("inpainting", [True, False])
def test_the_score_rises_and_the_noise_stays_noise(inpainting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene("sd15", inpainting, True)
    sigmas, scores, begun = scene.sigmas("simple", 2), [], []
    sample = comfy.samplers.sampler_object("euler").sampler_function

    def note(model: Any, x: torch.Tensor, sigmas: torch.Tensor, **keywords: Any) -> torch.Tensor:
        begun.append(x.clone())
        return sample(model, x, sigmas, **keywords)

    plain = scene.host(sigmas, sampler=comfy.samplers.KSAMPLER(note))
    search = noise_search.NoiseSearch(steps=6, scores=scores)
    searched = scene.host(sigmas, sampling_run.with_method(scene.patcher, search), comfy.samplers.KSAMPLER(note))
    assert scores == sorted(scores) and len(scores) == 6 and scores[-1] > scores[0] + 0.1 * abs(scores[0])
    assert not torch.equal(searched, plain)
    before, after = begun
    for own, first, found in zip(scene.hole > 0, before, after, strict=True):
        own = own.expand_as(first)
        assert torch.equal(found[~own], first[~own]) and not torch.equal(found[own], first[own])
        for of in (torch.mean, torch.std):
            assert float(of(found[own])) == pytest.approx(float(of(first[own])), abs=1e-4)
    assert torch.equal(scene.host(sigmas), scene.host(sigmas, sampler=comfy.samplers.KSAMPLER(sample)))
