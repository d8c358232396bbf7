"""Assign through the host's sampling: the host with a literal decoupled cross-attention in every block, and properties."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from devtools.pack import load_pack, pack_module
from truefill_testing.scene import Scene, boxes, forget_models, randn, relative_error
from truefill_testing.subject_weights import random_projections

import nodes as host_nodes  # isort: skip

load_pack()
Assign = pack_module("model_patches.lar_gen.decoupled_attention").Assign
sampling_run = pack_module("model_patches.core.sampling_run")
unet_attention = pack_module("model_patches.core.unet_attention")
PAIntA = pack_module("model_patches.hd_painter.painta").PAIntA
RASG = pack_module("model_patches.hd_painter.rasg").RASG
SemanticBoundary = pack_module("model_patches.pilot.semantic_boundary").SemanticBoundary

TOKENS = 5
BETA = 0.45


@pytest.fixture(scope="module", autouse=True)
def _no_leftovers():
    yield
    forget_models()


class Subject:
    """Weights and tokens for a scene: a subject for each picture, or one for all."""

    def __init__(self, scene: Scene, subjects: int) -> None:
        places = unet_attention.transformer_places(scene.model.diffusion_model)
        self.crosses = {t.place: t.cross for t in places}
        pairs = random_projections(list(self.crosses.values()))
        self.projections = dict(zip(self.crosses, pairs, strict=True))
        width = next(iter(self.crosses.values())).to_k.weight.shape[1]
        self.tokens = randn(subjects, TOKENS, width, seed=21).float()
        self.nothing = randn(1, TOKENS, width, seed=22).float()

    def on(self, model: Any, beta: float = BETA, **options: Any) -> Any:
        settings = Assign(
            strength=beta, subject=self.tokens, nothing=self.nothing, projections=self.projections, **options
        )
        return sampling_run.with_method(model, settings)


@contextmanager
def literally(
    subject: Subject, scene: Scene, negative_first: bool, weights: Any = None, of_text: float = 1.0
) -> Iterator[None]:
    """The host's cross-attentions written out with whole matrices, in float64: `of_text` times text, beta times the subject.

    `weights` gives how much each pixel of a grid of so many reads the subject, [B, pixels], instead of 1.
    """
    batch = len(scene.hole)
    of_rows = [subject.tokens.double().expand(batch, -1, -1), subject.nothing.double().expand(batch, -1, -1)]

    def forward(place: Any, cross: Any) -> Any:
        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            found = []
            for head in range(cross.heads):
                here = slice(head * cross.dim_head, (head + 1) * cross.dim_head)
                scores = query[..., here] @ key[..., here].transpose(1, 2) * cross.dim_head**-0.5
                found.append(scores.softmax(dim=-1) @ value[..., here])
            return torch.cat(found, dim=-1)

        def written_out(x: torch.Tensor, context: torch.Tensor, **_: Any) -> torch.Tensor:
            assert x.dtype == torch.float64
            order = of_rows[::-1] if negative_first else of_rows
            tokens = torch.cat(order) if len(x) == 2 * batch else of_rows[0]
            to_k, to_v = (of.double() for of in subject.projections[place])
            query = cross.to_q(x)
            text = attend(query, cross.to_k(context), cross.to_v(context))
            read = attend(query, tokens @ to_k.T, tokens @ to_v.T)
            if weights is not None:
                own = weights(x.shape[1]).double()
                read = read * own.repeat(len(x) // batch, 1)[..., None]
            return cross.to_out(of_text * text + BETA * read)

        return written_out

    for place, cross in subject.crosses.items():
        cross.forward = forward(place, cross)
    try:
        yield
    finally:
        for cross in subject.crosses.values():
            del cross.forward


@pytest.mark.parametrize(
    ("family", "inpainting", "subjects"),
    [pytest.param("sd15", True, 2, marks=pytest.mark.quick), ("sd2", False, 1), ("sdxl", True, 1)],
)
def test_it_is_the_formula(family: str, inpainting: bool, subjects: int) -> None:
    scene = Scene(family, inpainting, True)
    subject = Subject(scene, subjects)
    sigmas = scene.sigmas("simple", 3)
    plain, ours = scene.host(sigmas), scene.host(sigmas, subject.on(scene.patcher))
    with literally(subject, scene, negative_first=True):
        right = scene.host(sigmas)
    assert relative_error(ours, right) < 1e-5 and relative_error(ours, plain) > 1e-2
    assert torch.equal(scene.host(sigmas), plain)


@pytest.mark.quick
def test_where_a_mask_says() -> None:
    """In pixels; each cell of a grid as much as the mask covers of it."""
    scene = Scene("sd15", True, True)
    subject = Subject(scene, 1)
    where = boxes((16, 13), (slice(0, 9), slice(2, 13)), (slice(4, 16), slice(0, 7)))
    mask = torch.nn.functional.interpolate(where, scale_factor=8)[:, 0]
    sigmas = scene.sigmas("simple", 2)
    grids = {16 * 13: (16, 13), 8 * 7: (8, 7), 4 * 4: (4, 4), 2 * 2: (2, 2)}

    def weights(pixels: int) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(where.double(), grids[pixels]).flatten(1)

    ours = scene.host(sigmas, subject.on(scene.patcher, mask=mask))
    with literally(subject, scene, negative_first=True, weights=weights):
        right = scene.host(sigmas)
    assert relative_error(ours, right) < 1e-5
    assert relative_error(ours, scene.host(sigmas, subject.on(scene.patcher))) > 1e-3


@pytest.mark.quick
def test_beta_0_an_empty_mask_and_a_closed_window_are_no_node() -> None:
    scene = Scene("sd15", True, True, torch.float32)
    subject = Subject(scene, 1)
    sigmas = scene.sigmas("simple", 2)
    plain = scene.host(sigmas)
    for options in ({"beta": 0.0}, {"mask": torch.zeros(128, 104)}, {"start_percent": 1.0}):
        assert torch.equal(scene.host(sigmas, subject.on(scene.patcher, **options)), plain), options
    late = scene.host(sigmas, subject.on(scene.patcher, start_percent=0.5))
    assert relative_error(late, plain) > 1e-3
    assert relative_error(late, scene.host(sigmas, subject.on(scene.patcher))) > 1e-3


def test_beside_the_other_methods_in_any_order() -> None:
    scene = Scene("sd15", True, True, torch.float32)
    subject = Subject(scene, 2)
    sigmas = scene.sigmas("simple", 3)
    others = (PAIntA(end_percent=1.0), RASG(eta=0.1), SemanticBoundary())

    def guided(model: Any) -> Any:
        for settings in others:
            model = sampling_run.with_method(model, settings)
        return model

    together = scene.host(sigmas, subject.on(guided(scene.patcher)))
    assert torch.equal(together, scene.host(sigmas, guided(subject.on(scene.patcher))))
    assert relative_error(together, scene.host(sigmas, guided(scene.patcher))) > 1e-3
    assert relative_error(together, scene.host(sigmas, subject.on(scene.patcher))) > 1e-3


def test_beside_another_packs_replacement_both_count() -> None:
    """An IP-Adapter pack's, which replaces cross-attention: the subject is added to what it makes."""
    scene = Scene("sd15", True, True)
    subject = Subject(scene, 1)
    sigmas = scene.sigmas("simple", 2)
    model = scene.patcher.clone()

    def replaced(q: Any, k: Any, v: Any, extra_options: dict[str, Any]) -> torch.Tensor:
        return 0.5 * unet_attention.attention(q, k, v, extra_options)

    for place in subject.crosses:
        model.set_model_attn2_replace(replaced, *place[:2], place[2])
    both = scene.host(sigmas, subject.on(model))
    with literally(subject, scene, negative_first=True, of_text=0.5):
        right = scene.host(sigmas)
    assert relative_error(both, right) < 1e-5
    assert relative_error(both, scene.host(sigmas, model)) > 1e-3


def test_prompts_with_areas_and_a_batch_split_for_want_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene("sd15", True, True, torch.float32)
    subject = Subject(scene, 2)
    (limited,) = host_nodes.ConditioningSetArea().append(scene.positive, 64, 64, 32, 32, 1.0)
    scene.positive = scene.positive + limited
    sigmas = scene.sigmas("simple", 2)
    model = subject.on(scene.patcher)
    together = scene.host(sigmas, model)
    monkeypatch.setattr(type(scene.patcher), "get_free_memory", lambda self, device: 0)
    assert relative_error(scene.host(sigmas, model), together) < 1e-4


@pytest.mark.quick
def test_each_picture_reads_its_own_subject() -> None:
    scene = Scene("sd15", True, True, torch.float32)
    subject = Subject(scene, 2)
    sigmas = scene.sigmas("simple", 2)
    first = scene.host(sigmas, subject.on(scene.patcher))
    subject.tokens = subject.tokens.clone()
    subject.tokens[1] += 1.0
    second = scene.host(sigmas, subject.on(scene.patcher))
    assert relative_error(second[0], first[0]) < 1e-4 < 1e-2 < relative_error(second[1], first[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    scene, single = Scene("sd15", True, True, dtype), Scene("sd15", True, True, torch.float32)
    sigmas = scene.sigmas("simple", 2)
    half, exact = (of.host(sigmas, Subject(of, 1).on(of.patcher)) for of in (scene, single))
    hosts_own = relative_error(scene.host(sigmas), single.host(sigmas))
    assert relative_error(half, exact) < 3 * hosts_own
    assert relative_error(exact, single.host(sigmas)) > 3 * hosts_own


@pytest.mark.quick
def test_messages() -> None:
    scene = Scene("sd15", True, True, torch.float32)
    subject = Subject(scene, 3)
    with pytest.raises(ValueError, match=r"^Assign was given 3 subjects for 2 pictures: "):
        scene.host(scene.sigmas("simple", 1), subject.on(scene.patcher))
    other = Subject(Scene("sdxl", True, True, torch.float32), 1)
    with pytest.raises(
        ValueError, match=r"^Assign was given weights for a text of width 40, and this MODEL's has 24: "
    ):
        other.on(scene.patcher)
    del subject.projections["middle", 0, 0]
    with pytest.raises(ValueError, match=r"^Assign's weights have 15 blocks and this MODEL has 16"):
        subject.on(scene.patcher)
