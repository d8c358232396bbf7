"""What sees subjects: the host's own class computes it, and it is shown what Encode Subject shows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from devtools.pack import ensure_host, pack_module

ensure_host()

import comfy.clip_vision  # noqa: E402

vision = pack_module("training.lar_gen.vision")
contrast = pack_module("training.lar_gen.contrast")
likeness = pack_module("training.lar_gen.likeness")
subjects = pack_module("training.world.subjects")
lar_gen = pack_module("model_patches.lar_gen.subject")
config = pack_module("weights.demo_subject").VISION_CONFIG


def test_it_sees_what_the_hosts_clip_vision_sees() -> None:
    """Through the node's own way to the host: cut out, squared, normalized; and all zeros for nothing."""
    # In half precision, as it ships and as the host keeps it.
    ours = vision.Vision(seed=3).half().float().eval()
    host = comfy.clip_vision.ClipVisionModel(config)
    missing, unexpected = host.load_sd(ours.model.state_dict())
    assert not missing and not unexpected
    quadruple = subjects.make_quadruple("dev", 5, 5)
    with torch.inference_mode():
        states = lar_gen.clip_states(host, [vision.subject_of(quadruple.reference, quadruple.reference_mask)])
        own, details, seen = ours(vision.clip_pixels(quadruple.reference, quadruple.reference_mask)[None])
        nothing, *_ = ours.states(torch.zeros(1, 3, 224, 224))
    torch.testing.assert_close(own, states.own, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(details, states.details, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(nothing, states.nothing, atol=1e-4, rtol=1e-4)
    assert seen.shape == (1, 128) and (own - details).abs().max() > 0.01


@pytest.mark.quick
def test_contrast_is_the_cross_entropy_of_finding_the_other_view_both_ways() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(2, 5, 7, generator=generator)
    first, second = seen.double().numpy()
    total = 0.0
    for one, other in ((first, second), (second, first)):
        for place in range(5):
            cosines = [one[place] @ of / math.sqrt((one[place] @ one[place]) * (of @ of)) for of in other]
            total -= math.log(math.exp(cosines[place] / 0.07) / sum(math.exp(of / 0.07) for of in cosines))
    assert float(contrast.contrast_loss(seen)) == pytest.approx(total / 10, abs=1e-4)
    assert contrast.share_found(torch.stack([seen[0], 3.0 * seen[0]])) == 1.0
    assert contrast.share_found(torch.stack([seen[0], seen[0].roll(1, 0)])) == 0.0


@pytest.mark.quick
def test_four_in_a_row_have_the_same_tones_and_differ_in_all_else() -> None:
    looks = contrast.alike_looks("train", np.arange(8))
    for of in (looks[:4], looks[4:]):
        assert all(np.array_equal(look.tones, of[0].tones) and look.shape == of[0].shape for look in of)
        assert len({tuple(look.wave) for look in of}) == 4 and len({look.mark.tobytes() for look in of}) == 4
    assert not np.array_equal(looks[0].tones, looks[4].tones)


def test_batches_are_made_of_seed_and_step_alone() -> None:
    for task in (vision.VisionTask(seed=0), likeness.LikenessTask(seed=0)):
        first, again, later = task.batch(7, 3, 4), task.batch(7, 3, 4), task.batch(7, 4, 4)
        for name, tensor in first.items():
            assert torch.equal(tensor, again[name])
        assert not torch.equal(first["pixels"], later["pixels"])
        views = first["pixels"]
        assert views.shape[:2] == (2, 4) and 0.0 <= views.min() and views.max() <= 1.0
        assert not torch.equal(views[0], views[1])


def test_a_few_steps_lower_the_losses() -> None:
    for task in (vision.VisionTask(seed=0), likeness.LikenessTask(seed=0)):
        batch = task.batch(0, 0, 8)
        optimizer = torch.optim.AdamW(task.networks.parameters(), lr=1e-3)
        losses = []
        for _ in range(6):
            loss = task.losses(batch, torch.Generator())["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.1
