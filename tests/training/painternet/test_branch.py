"""A branch's training: the paper's loss and its gradient, what it is shown, and that what is trained is what the nodes run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from devtools.pack import ensure_host, load_pack, pack_module
from truefill_testing import literal_branch

ensure_host()
load_pack()
attention_loss = pack_module("training.painternet.attention_loss")
regions = pack_module("training.painternet.regions")
training = pack_module("training.painternet.branch")
exporting = pack_module("training.painternet.export")
loop = pack_module("training.loop")
networks = pack_module("training.demo.networks")
narrow_taesd = pack_module("training.demo.narrow_taesd")
subject_files = pack_module("imaging.subject_files")
network = pack_module("model_patches.painternet.network")
readers = pack_module("weights.painternet")
vocabulary = pack_module("training.demo.vocabulary")
captions = pack_module("training.world.captions")
scenes = pack_module("training.world.scenes")
unet_attention = pack_module("model_patches.core.unet_attention")


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.double() - expected.double()).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.quick
def test_the_attention_loss_and_its_gradient_are_the_papers() -> None:
    generator = torch.Generator().manual_seed(3)
    grids, words = ((8, 8), (4, 4)), (3, 1, 0)
    raw = [torch.randn(3, 2, h * w, 9, generator=generator, dtype=torch.float64, requires_grad=True) for h, w in grids]
    hole = (torch.rand(3, 1, 8, 8, generator=generator) > 0.6).float()
    tokens = torch.zeros(3, 9, dtype=torch.bool)
    for row, count in enumerate(words):
        tokens[row, 1 : 1 + count] = True

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, raw))

    def ours_of() -> torch.Tensor:
        return attention_loss.actual_token_attention_loss([of.softmax(-1) for of in raw], tokens, hole)

    ours = ours_of()
    positions = [literal_branch.own_token_positions(count) for count in words]
    right = literal_branch.actual_token_attention_loss([of.softmax(-1) for of in raw], positions, hole)
    assert relative_error(ours, right) < 1e-5
    for one, other in zip(gradients(ours), gradients(right), strict=True):
        assert relative_error(one, other) < 1e-5
    # A row without words asks for nothing.
    assert not gradients(ours_of())[0][2].any()


@pytest.mark.quick
def test_a_region_is_an_object_in_its_scene_with_its_own_words() -> None:
    kinds = set()
    for index in range(30):
        region, again = (regions.make_region("train", index) for _ in range(2))
        assert np.array_equal(region.hole, again.hole) and region.prompt == again.prompt
        scene = scenes.make_scene("train", index)
        assert np.array_equal(region.picture, scene.picture) and region.hole.dtype == bool
        covered = [float((mask & region.hole).sum() / max(mask.sum(), 1)) for mask in scene.masks]
        asked = [
            region.prompt in captions._wordings(item.shape, item.colour, item.pattern) for item in scene.layout.objects
        ]
        assert any(asked) and max(share for share, mine in zip(covered, asked, strict=True) if mine) > 0.99
        rows, columns = np.nonzero(region.hole)
        is_box = region.hole.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        kinds.add(
            "box" if is_box else "outline" if any((mask == region.hole).all() for mask in scene.masks) else "irregular"
        )
    assert kinds == {"box", "outline", "irregular"}


@pytest.fixture(scope="module")
def encoded() -> Any:
    vae = narrow_taesd.NarrowTAESD()
    networks.initialise(vae, 0)
    found = [regions.make_region("train", index) for index in range(4)]
    return regions.Encoded.of([regions.encode_regions(vae.eval(), found, torch.device("cpu"))])


def text_encoder() -> Any:
    return networks.TextEncoder(vocabulary.world_vocabulary(), seed=2).requires_grad_(False)


def task(encoded: Any, name: str = "branch") -> Any:
    words = vocabulary.world_vocabulary()
    branch = training.new_branch(networks.new_unet(9, seed=1), training.KINDS[name].attention_points)
    base = networks.new_unet(4, seed=3)
    # A fresh one's is zero: it would predict nothing, whatever it is told.
    base.out[2].weight.data.normal_(std=0.05, generator=torch.Generator().manual_seed(6))
    return training.BranchTask(name, encoded, encoded, base, branch, text_encoder(), words)


@pytest.mark.quick
def test_a_branch_begins_as_the_inpainting_unet_and_changes_nothing() -> None:
    """Where nothing is padded, for the mask channel is 1 = keep there and 1 = hole here."""
    inpainting = networks.new_unet(9, seed=1)
    branch = training.new_branch(inpainting, True)
    generator = torch.Generator().manual_seed(4)
    noisy, masked = torch.randn(2, 1, 4, 16, 16, generator=generator)
    hole = (torch.rand(1, 1, 16, 16, generator=generator) > 0.5).float()
    first = torch.nn.functional.conv2d
    own, theirs = branch.unet.input_blocks[0][0], inpainting.input_blocks[0][0]
    ours = first(torch.cat([noisy, masked, 1 - hole], 1), own.weight, own.bias)
    assert torch.allclose(ours, first(torch.cat([noisy, hole, masked], 1), theirs.weight, theirs.bias), atol=1e-5)
    features = branch(torch.cat([noisy, masked, 1 - hole], 1), torch.tensor([100]), torch.randn(1, 77, 192))
    assert not any(of.any() for of in (*features.layers, *features.attentions.values()))


def test_a_step_is_the_literal_one(encoded: Any) -> None:
    """Raw prompts, latents and the step's seed in; the branch, the noise and both losses written out."""
    words = vocabulary.world_vocabulary()
    one, text = task(encoded), text_encoder()
    generator = torch.Generator().manual_seed(5)
    for point in one.branch.points:
        for weight in point.parameters():
            weight.data.normal_(std=0.05, generator=generator)
    of_prompt = {prompt: text(words.batch([prompt]))[0].detach() for prompt in (*encoded.prompt.tolist(), "")}

    def said_in(batch: dict[str, torch.Tensor]) -> list[str]:
        nearest = [
            min(of_prompt, key=lambda prompt: float((of_prompt[prompt] - context).abs().max()))
            for context in batch["context"]
        ]
        assert all(
            torch.allclose(of_prompt[prompt], of, atol=1e-6)
            for prompt, of in zip(nearest, batch["context"], strict=True)
        )
        return nearest

    # A prompt is left out now and then.
    batch = next(batch for step in range(20) if "" in said_in(batch := one.batch(seed=0, step=step, size=6)))
    said = said_in(batch)
    with torch.no_grad():
        losses = one.losses(batch, torch.Generator().manual_seed(7))
    rows = [int((encoded.clean.float() - of).flatten(1).abs().sum(1).argmin()) for of in batch["latents"]]
    assert (
        all(prompt in ("", encoded.prompt[row]) for prompt, row in zip(said, rows, strict=True)) and len(set(said)) > 2
    )
    clean, hole, masked = (of[rows].double() for of in (encoded.clean, encoded.hole, encoded.masked))

    draws = torch.Generator().manual_seed(7)
    times = ((torch.arange(6) + torch.rand(6, generator=draws)) / 6 * 1000).long()
    noise = torch.randn(clean.shape, generator=draws).double()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    share = (1.0 - betas).cumprod(0)[times][:, None, None, None]
    x = share.sqrt() * clean + (1.0 - share).sqrt() * noise
    with torch.no_grad():
        context = text(words.batch(said))
    state = readers.branch_state(network.weights_of(one.branch, training.demo_plan(), "x"))
    maps: list[torch.Tensor] = []
    layers, attentions = literal_branch.branch_outputs(
        state, torch.cat([x, masked, 1.0 - hole], 1), times, context, None, lambda channels: channels // 32, maps
    )
    predicted = literal_branch.injected_base(one.base, x, times, context, None, layers, attentions, 1.0, 1.0)

    weight = 1.0 + 3.0 * hole
    error = ((predicted - noise).square().mean(1, keepdim=True) * weight).mean((1, 2, 3)) / weight.mean((1, 2, 3))
    snr = (share / (1.0 - share)).flatten()
    of_noise = (error * snr.clamp(max=5.0) / snr).mean()
    positions = [literal_branch.own_token_positions(len(of.split())) for of in said]
    of_attention = literal_branch.actual_token_attention_loss(maps, positions, hole)
    assert len(maps) == len(unet_attention.transformer_places(one.base))
    assert float(losses["noise"]) == pytest.approx(float(of_noise), rel=1e-4)
    assert float(losses["attention"]) == pytest.approx(float(of_attention), rel=1e-4)
    assert float(losses["loss"]) == pytest.approx(float(of_noise + 1e-4 * of_attention), rel=1e-4)


@pytest.mark.parametrize("name", ["branch", "branch-of-layers"])
def test_what_is_trained_is_what_the_nodes_load(encoded: Any, tmp_path: Path, name: str) -> None:
    one = task(encoded, name)
    before = {key: tensor.clone() for key, tensor in one.base.state_dict().items()}
    settings = loop.Settings(steps=2, batch=2, learning_rate=1e-3, bfloat16=False, ema=0.5)
    trainer = loop.Trainer(one, settings, tmp_path / name, torch.device("cpu"))
    assert trainer.train(lambda: False, lambda progress: None)
    assert all(torch.equal(tensor, before[key]) for key, tensor in one.base.state_dict().items())
    trained = exporting.trained_branch(tmp_path / name)
    assert bool(trained.attention_points) == (name == "branch")
    assert any(weight.any() for point in trained.points for weight in point.parameters())
    tensors, head_channels = exporting.branch_tensors(tmp_path / name)
    weights = readers.branch_weights(tensors, "x", head_channels)
    assert weights.plan == training.demo_plan()
    loaded = network.branch_model(weights).model
    x, context = torch.randn(1, 9, 16, 16), torch.randn(1, 77, 192)
    with torch.no_grad():
        ours, theirs = (of(x, torch.tensor([100]), context).layers[-1] for of in (loaded, trained))
    # In 8 bits.
    assert relative_error(ours, theirs) < 0.2


def test_pictures_of_a_folder_are_trained_on_beside_the_worlds(
    encoded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = pack_module("training.painternet.stages")
    monkeypatch.setattr(stages, "load_regions", lambda *given: encoded)
    scene = scenes.make_scene("dev", 1)
    subject_files.save_subjects(
        tmp_path,
        torch.from_numpy(scene.picture)[None].float() / 255.0,
        [torch.from_numpy(scene.masks[:2]).float()],
        [["a red thing", "another thing"]],
        smallest=0.0,
        largest=1.0,
    )

    def made(folder: Path | None) -> Any:
        device = torch.device("cpu")
        return stages.branch_task(
            "branch", tmp_path, 4, folder, 0, device, lambda: False, lambda split: lambda done, total: None
        )

    batches = [made(folder).batch(seed=0, step=0, size=64) for folder in (None, tmp_path)]
    kinds = [len(torch.unique(batch["latents"].flatten(1), dim=0)) for batch in batches]
    assert kinds == [4, 4 + 2]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"^The folder .*empty has no subject: .*\.$"):
        made(tmp_path / "empty")
