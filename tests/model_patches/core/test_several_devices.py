"""Every method where the host evaluates the prompts on several GPUs at once, each with a copy of the model: MultiGPU CFG Split.

The second GPU is the CPU by another name; the threads and copies are the host's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from devtools.pack import load_pack, pack_module
from truefill_testing.branch_scene import SmallBranch
from truefill_testing.methods import METHODS, TRANSFORMERS, sampled, sampled_by_transformer
from truefill_testing.scene import forget_models, relative_error
from truefill_testing.small_models import CONTEXT_DIM, small_model
from truefill_testing.small_transformers import small_transformer

import comfy.model_management  # isort: skip
import comfy.multigpu  # isort: skip

load_pack()
with_method = pack_module("model_patches.core.sampling_run").with_method
reference = pack_module("model_patches.lar_gen.reference")
branches = pack_module("model_patches.lar_gen.branch")

DEVICES = [torch.device("cpu"), torch.device("cpu", 0)]


@pytest.fixture(autouse=True)
def _two_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: DEVICES)
    yield
    comfy.model_management.unload_all_models()
    forget_models()


def loadable(inpainting: bool) -> Any:
    """A model as of the host's own loaders."""
    patcher = small_model("sd15", inpainting)
    patcher.cached_patcher_init = (lambda: small_model("sd15", inpainting), ())
    return patcher


def split_of(patcher: Any) -> Any:
    """As the node MultiGPU CFG Split gives it on."""
    model = comfy.multigpu.create_multigpu_deepclones(patcher, len(DEVICES))
    assert len(model.get_additional_models_with_key("multigpu")) == 1
    return model


def split(inpainting: bool) -> Any:
    return split_of(loadable(inpainting))


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> set[torch.device]:
    """The devices that have been given work."""
    found: set[torch.device] = set()
    submit = comfy.multigpu.MultiGPUThreadPool.submit

    def noted(pool: Any, device: torch.device, *work: Any, **named: Any) -> None:
        found.add(device)
        submit(pool, device, *work, **named)

    monkeypatch.setattr(comfy.multigpu.MultiGPUThreadPool, "submit", noted)
    return found


@pytest.mark.parametrize("name", [name for name in METHODS if name != "Branch"])
def test_it_does_what_it_does_on_one(name: str, used: set[torch.device]) -> None:
    inpainting = METHODS[name].inpainting
    expected = sampled(name, small_model("sd15", inpainting))
    assert not used
    assert relative_error(sampled(name, split(inpainting)), expected) < 1e-4
    # Here the negative prompt waits for the positive one.
    one_by_one = name in ("PAIntA", "PAIntA, RASG", "RASG")
    assert used == set(DEVICES[:1] if one_by_one else DEVICES)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_so_does_one_without_a_unet(family: str, used: set[torch.device]) -> None:
    patcher = small_transformer(family)
    patcher.cached_patcher_init = (small_transformer, (family,))
    expected = sampled_by_transformer(family, small_transformer(family))
    assert relative_error(sampled_by_transformer(family, split_of(patcher)), expected) < 1e-4
    # The negative prompt waits for the positive one.
    assert used == set(DEVICES[:1])


@pytest.mark.parametrize("comes_first", [True, False])
def test_a_branch_gets_one_sentence(comes_first: bool) -> None:
    small, said = (
        SmallBranch("sd15"),
        "Apply Branch has a network of its own and works on one GPU: take ComfyUI's 'MultiGPU",
    )
    with pytest.raises(ValueError, match=said) as refused:
        if comes_first:
            split_of(small.on(loadable(False)))
        else:
            sampled("Branch", split(False))
    assert "\n" not in str(refused.value)


def test_a_reference_network_gets_one_sentence() -> None:
    width = CONTEXT_DIM["sd15"]
    branch = branches.Branch(model=loadable(False), weight=torch.zeros(width, 1), bias=torch.zeros(width))
    settings = reference.Refine(
        latents=torch.zeros(1, 4, 8, 8), is_one=True, branch=branch, details=torch.zeros(1, 6, 1)
    )
    model = with_method(split(True), settings)
    with pytest.raises(
        ValueError, match="Refine has a network of its own and works on one GPU: take ComfyUI's 'MultiGPU"
    ):
        sampled("none", model)
