"""Methods that the pack does not know, from outside: the protocol is all that a method needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from devtools.pack import ensure_host, pack_module
from truefill_testing.scene import Scene, forget_models, relative_error
from truefill_testing.small_models import small_model

ensure_host()

import comfy.model_management  # noqa: E402
import comfy.samplers  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402

protocol = pack_module("model_patches.core.protocol")
attention = pack_module("model_patches.core.unet_attention")
painta = pack_module("model_patches.hd_painter.painta")
with_method = pack_module("model_patches.core.sampling_run").with_method
PAIntA, RASG = painta.PAIntA, pack_module("model_patches.hd_painter.rasg").RASG


@pytest.fixture(scope="module", autouse=True)
def _no_leftovers():
    yield
    forget_models()


@pytest.fixture
def scene() -> Scene:
    return Scene("sd15", True, True, torch.float32)


@dataclass(frozen=True, eq=False, kw_only=True)
class Quiet(protocol.Method):
    """A method in a few lines: what self-attention says counts less."""

    name: ClassVar = "Quiet"
    order: ClassVar = 150

    def begin(self, run: Any, hole: torch.Tensor) -> Any:
        return QuietRun(self.strength)


class QuietRun(protocol.MethodRun):
    def __init__(self, strength: float) -> None:
        self._strength = strength

    def edit(self, call: Any) -> AbstractContextManager[None]:
        attention.add_patch(call.options, "attn1_output_patch", lambda y, extra: y * (1.0 - 0.5 * self._strength))
        return nullcontext()


class TestAToyMethod:
    @pytest.mark.quick
    def test_it_is_the_hosts_own_patch(self, scene: Scene) -> None:
        sigmas = scene.sigmas("simple", 3)
        patched = scene.patcher.clone()
        patched.set_model_attn1_output_patch(lambda y, extra: y * 0.5)
        assert torch.equal(scene.host(sigmas, with_method(scene.patcher, Quiet())), scene.host(sigmas, patched))

    def test_beside_the_packs_methods_in_any_order(self, scene: Scene) -> None:
        sigmas = scene.sigmas("simple", 3)

        def of(*methods: Any) -> torch.Tensor:
            model = scene.patcher
            for settings in methods:
                model = with_method(model, settings)
            return scene.host(sigmas, model)

        quiet, ours = Quiet(), (PAIntA(), RASG(eta=0.1))
        together = of(quiet, *ours)
        assert torch.equal(together, of(*ours, quiet)) and torch.equal(together, of(ours[1], quiet, ours[0]))
        assert relative_error(together, of(*ours)) > 1e-3 and relative_error(together, of(quiet)) > 1e-3

    def test_strength_0_takes_it_off_and_percentages_limit_it(self, scene: Scene) -> None:
        sigmas = scene.sigmas("simple", 3)
        plain, model = scene.host(sigmas), with_method(scene.patcher, Quiet())
        assert torch.equal(scene.host(sigmas, with_method(model, Quiet(strength=0.0))), plain)
        assert torch.equal(scene.host(sigmas, with_method(scene.patcher, Quiet(start_percent=1.0))), plain)
        assert torch.equal(scene.host(sigmas, with_method(scene.patcher, Quiet(mask=torch.zeros(8, 8)))), plain)
        late = scene.host(sigmas, with_method(scene.patcher, Quiet(start_percent=0.5)))
        assert relative_error(late, plain) > 1e-3 and relative_error(late, scene.host(sigmas, model)) > 1e-3

    @pytest.mark.quick
    def test_messages_name_those_that_are_present(self, scene: Scene) -> None:
        unmasked = Scene("sd15", False, False, torch.float32)
        with pytest.raises(ValueError, match=r"^Quiet needs to know where the hole is"):
            unmasked.host(scene.sigmas("simple", 1), with_method(unmasked.patcher, Quiet()))


@dataclass(frozen=True, eq=False, kw_only=True)
class Reference(protocol.Method):
    """As LAR-Gen's Refine will: a second network reads a picture, noised at the call's noise level; its self-attentions' inputs
    become further keys and values of the model's."""

    name: ClassVar = "Reference"
    order: ClassVar = 150

    network: ModelPatcher
    picture: torch.Tensor
    seen: list[Any]

    def models(self) -> list[ModelPatcher]:
        return [self.network]

    def begin(self, run: Any, hole: torch.Tensor) -> Any:
        return ReferenceRun(self, run)


class ReferenceRun(protocol.MethodRun):
    def __init__(self, settings: Reference, run: Any) -> None:
        self._settings = settings
        (self._network,) = run.models(settings)

    def edit(self, call: Any) -> AbstractContextManager[None]:
        settings, network = self._settings, self._network.model
        settings.seen.append((self._network, call.sigma))
        scale = (1.0 + call.sigma**2) ** 0.5
        noise = torch.randn(settings.picture.shape, generator=torch.Generator().manual_seed(0))
        noised = (settings.picture + call.sigma * noise).expand(len(call.x), -1, -1, -1) / scale
        read: dict[Any, torch.Tensor] = {}

        def note(n: torch.Tensor, context: Any, value: Any, extra: dict[str, Any]) -> Any:
            read[(*extra["block"], extra["block_index"])] = n
            return n, context, value

        options = {"patches": {"attn1_patch": [note]}}
        network.diffusion_model(noised.to(call.x), call.timesteps, call.context, transformer_options=options)

        def append(n: torch.Tensor, context: Any, value: Any, extra: dict[str, Any]) -> Any:
            longer = torch.cat((n, read[(*extra["block"], extra["block_index"])]), dim=1)
            return n, longer, longer

        attention.add_patch(call.options, "attn1_patch", append)
        return nullcontext()


@pytest.mark.quick
def test_a_second_network_under_the_hosts_memory_manager(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    second = small_model("sd15", False, seed=7)
    loaded, seen, scaled = [], [], []
    load, scale = comfy.model_management.load_models_gpu, painta._scaled

    def note_loading(models: Any, *args: Any, **kwargs: Any) -> Any:
        loaded.extend(models)
        return load(models, *args, **kwargs)

    def note_keys(keys: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        scaled.append((keys, factors, scale(keys, factors)))
        return scaled[-1][2]

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", note_loading)
    monkeypatch.setattr(painta, "_scaled", note_keys)
    settings = Reference(network=second, picture=torch.randn(1, 4, *scene.size), seen=seen)
    sigmas = scene.sigmas("simple", 3)
    model = with_method(with_method(scene.patcher, PAIntA(end_percent=1.0)), settings)
    out = scene.host(sigmas, model)
    # The host has loaded it, and not a copy of its weights.
    assert any(patcher.model is second.model for patcher in loaded)
    assert seen and all(patcher.model is second.model for patcher, _ in seen)
    # At the sampler's noise levels.
    assert sorted({sigma for _, sigma in seen}) == pytest.approx(sorted(float(sigma) for sigma in sigmas[:-1]))
    # PAIntA scales the picture's keys, and leaves what was appended.
    assert scaled
    for keys, factors, after in scaled:
        pixels = factors.shape[1]
        assert keys.shape[1] == 2 * pixels
        assert torch.equal(after[:, pixels:], keys[:, pixels:])
        assert torch.equal(after[:, :pixels], keys[:, :pixels] * factors[..., None])
    assert any(not torch.equal(before, after) for before, _, after in scaled)
    assert relative_error(out, scene.host(sigmas, with_method(scene.patcher, PAIntA(end_percent=1.0)))) > 1e-3
    # Taken off, the network is no longer the model's.
    off = with_method(model, Reference(strength=0.0, network=second, picture=settings.picture, seen=seen))
    assert not off.get_additional_models()


@dataclass(frozen=True, eq=False, kw_only=True)
class Branch(protocol.Method):
    """As PainterNet's will: something is added to the inputs of the model's layers, known only during the call."""

    name: ClassVar = "Branch"
    order: ClassVar = 50

    weight: float

    def begin(self, run: Any, hole: torch.Tensor) -> Any:
        return BranchRun(self.weight, hole)


class BranchRun(protocol.MethodRun):
    def __init__(self, weight: float, hole: torch.Tensor) -> None:
        self._weight, self._hole = weight, hole

    @contextmanager
    def edit(self, call: Any) -> Iterator[None]:
        holes = torch.cat([rows.cut(self._hole) for rows in call.rows])

        def add(_module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            h = args[0]
            return (h + self._weight * torch.nn.functional.adaptive_avg_pool2d(holes, h.shape[-2:]).to(h), *args[1:])

        with ExitStack() as hooks:
            for layer in first_layers(call.unet):
                hooks.callback(layer.register_forward_pre_hook(add).remove)
            yield


def first_layers(unet: Any) -> list[torch.nn.Module]:
    """Of some blocks. The host never calls a block, only its layers."""
    return [block[0] for block in (unet.input_blocks[1], unet.middle_block, unet.output_blocks[0])]


@pytest.mark.quick
def test_adding_to_layers_inputs(scene: Scene) -> None:
    sigmas = scene.sigmas("simple", 2)
    unet = scene.model.diffusion_model
    plain = scene.host(sigmas)
    assert torch.equal(scene.host(sigmas, with_method(scene.patcher, Branch(weight=0.0))), plain)
    branched = scene.host(sigmas, with_method(scene.patcher, Branch(weight=0.5)))
    assert not any(module._forward_pre_hooks for module in unet.modules())
    holes = scene.hole

    def literal(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        h = args[0]
        rows = torch.cat([holes] * (len(h) // len(holes)))
        return (h + 0.5 * torch.nn.functional.adaptive_avg_pool2d(rows, h.shape[-2:]), *args[1:])

    handles = [layer.register_forward_pre_hook(literal) for layer in first_layers(unet)]
    try:
        assert relative_error(branched, scene.host(sigmas)) < 1e-5
    finally:
        for handle in handles:
            handle.remove()
    assert relative_error(branched, plain) > 1e-3


@pytest.mark.quick
def test_an_error_in_a_method_leaves_nothing_behind(scene: Scene) -> None:
    class Failing(QuietRun):
        def call_unet(self, call_next: Any, call: Any) -> torch.Tensor:
            raise RuntimeError("in the middle")

    class Fails(Quiet):
        def begin(self, run: Any, hole: torch.Tensor) -> Any:
            return Failing(1.0)

    sigmas = scene.sigmas("simple", 2)
    plain = scene.host(sigmas)
    model = with_method(with_method(scene.patcher, PAIntA(end_percent=1.0)), Fails())
    with pytest.raises(RuntimeError, match="in the middle"):
        scene.host(sigmas, model)
    assert not any(module._forward_pre_hooks for module in scene.model.diffusion_model.modules())
    assert torch.equal(scene.host(sigmas), plain)
