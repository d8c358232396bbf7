"""LAR-Gen's stages: what they train is what the nodes run, and what they are given is what the paper gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from devtools.pack import ensure_host, pack_module
from truefill_testing import demo_subject

ensure_host()

import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402

export = pack_module("training.lar_gen.export")
quadruples = pack_module("training.lar_gen.quadruples")
shipped = pack_module("training.demo.shipped")
start = pack_module("training.lar_gen.start")
vision = pack_module("training.lar_gen.vision")
diffusion = pack_module("training.diffusion")
latents = pack_module("training.demo.latents")
subjects = pack_module("training.world.subjects")
weights = pack_module("weights.demo_subject")
reference = pack_module("model_patches.lar_gen.reference")
SIGMA = 2.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_subject.write_untrained(tmp_path_factory.mktemp("subject"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return weights.load_demo_subject(folder)


def denoised_by_the_nodes(loaded: Any, task: Any, batch: dict[str, torch.Tensor], beta: float, refine: bool) -> Any:
    """One step of the host's Euler from SIGMA to 0, of the files that were written: the picture that the model expects."""
    run = pack_module("model_patches.core.sampling_run")
    attention = pack_module("model_patches.core.unet_attention")
    assign = pack_module("model_patches.lar_gen.decoupled_attention").Assign
    resampler = pack_module("model_patches.lar_gen.resampler").Resampler.from_tensors(loaded.weights.resampler)
    places = [t.place for t in attention.transformer_places(loaded.model.model.diffusion_model)]
    settings = assign(
        strength=beta,
        subject=resampler(batch["own"]),
        nothing=resampler(batch["own"][:1]),
        projections=loaded.weights.by_place(places),
    )
    model = run.with_method(loaded.model, settings)
    scale = pack_module("weights.demo_model").LATENT_SCALE
    if refine:
        branch = pack_module("model_patches.lar_gen.branch").Branch(model=loaded.branch, **loaded.weights.detail)
        settings = reference.Refine(
            latents=batch["subject"] / scale, is_one=False, branch=branch, details=batch["details"]
        )
        model = run.with_method(model, settings)
    mask, masked = batch["known"][:, :1], batch["known"][:, 1:]
    text = [[batch["context"][:1], {"concat_latent_image": masked / scale, "concat_mask": mask}]]
    noise = torch.randn(batch["latents"].shape, generator=torch.Generator().manual_seed(0))
    sampler = comfy.samplers.sampler_object("euler")
    made = comfy.sample.sample_custom(
        model,
        noise,
        1.0,
        sampler,
        torch.tensor([SIGMA, 0.0]),
        text,
        text,
        batch["latents"] / scale,
        noise_mask=mask,
        disable_pbar=True,
        seed=11,
    )
    return made * scale, noise


@pytest.mark.parametrize("refine", [False, True], ids=["assign", "assign and refine"])
def test_what_is_trained_is_what_the_nodes_run(loaded: Any, refine: bool) -> None:
    """The prediction that a stage is trained by, from its own forward pass, against the nodes on the exported half precision."""
    *_, first, second = demo_subject.untrained_tasks()
    task = second if refine else first
    # One subject and one shape twice, so that the host has one prompt.
    batch = task._batch(task._train, np.asarray([1, 1]), np.zeros(2, dtype=bool), np.zeros(2, dtype=bool))
    batch["subject"] = demo_subject.encoded(4).subject[:2].float()
    beta = 0.3 if refine else 1.0
    made, noise = denoised_by_the_nodes(loaded, task, batch, beta, refine)
    sampling = loaded.model.model.model_sampling
    sigma = torch.full((2,), SIGMA)
    time = sampling.timestep(sigma).round().long()
    # The host blends what is known in before it asks the model.
    x = batch["latents"] + SIGMA * noise
    scaled = x / (SIGMA**2 + 1) ** 0.5
    with torch.no_grad():
        tokens = first.main.resampler(batch["own"])
        stored = None
        if refine:
            branch_noise = reference.reference_noise(11, SIGMA, True, batch["subject"].shape)
            share = 1.0 / (SIGMA**2 + 1)
            assert abs(float(diffusion.signal_shares()[time[0]]) - share) < 0.01
            noisy = (batch["subject"] + SIGMA * branch_noise) * share**0.5
            stored = second.features(noisy, time, batch["details"])
        eps = first.main(torch.cat([scaled, batch["known"]], dim=1), time, batch["context"], tokens, beta, stored)
        without = first.main(torch.cat([scaled, batch["known"]], dim=1), time, batch["context"], tokens, 0.0)
    expected = x - SIGMA * eps
    hole = (batch["known"][:, :1] > 0).expand_as(made)
    error = (made - expected)[hole].abs()
    # Half precision of weights and states; without the subject it would be another picture.
    assert float(error.mean()) < 0.1 * float((SIGMA * (eps - without))[hole].abs().mean())
    assert float((SIGMA * (eps - without))[hole].abs().mean()) > 0.01


def test_the_files_are_small_and_have_lar_gens_names(folder: Path) -> None:
    paths = [folder / name for name in (weights.FILE, weights.REFERENCE_FILE)]
    assert sum(path.stat().st_size for path in paths) < 20e6
    state, branch = (load_file(path) for path in paths)
    assert {tensor.dtype for of in (state, branch) for tensor in of.values()} == {torch.float16}
    named = [name for name in state if name.endswith("to_k_ip.weight")]
    assert "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k_ip.weight" in named and len(named) == 7
    assert "image_proj_model.latents" in state and "patch_projector.weight" in branch
    trained = [name for name in branch if name.startswith("ref_")]
    assert len(trained) == 6 * 5 and all(".attn2." in name for name in trained)


def test_without_a_run_the_training_goes_on_from_what_ships(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    stages = pack_module("training.lar_gen.stages")
    monkeypatch.setattr(start, "FOLDER", folder)
    monkeypatch.setattr(start, "read_file", lambda name: load_file(folder / name))
    for read in (stages.trained_vision, stages.trained_main):
        ours, shipped = (read(runs).state_dict() for runs in (folder.parent / "runs", tmp_path))
        assert ours.keys() == shipped.keys()
        assert all(torch.equal(tensor.half(), shipped[name].half()) for name, tensor in ours.items())


def test_the_two_first_stages_belong_together(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """With one of them trained anew the other is not taken from what ships."""
    stages = pack_module("training.lar_gen.stages")
    monkeypatch.setattr(start, "FOLDER", folder)
    (tmp_path / stages.VISION).symlink_to(folder.parent / "runs" / stages.VISION)
    stages.trained_vision(tmp_path)
    with pytest.raises(FileNotFoundError, match="train the stage 'subject-assign' first"):
        stages.trained_main(tmp_path)


def test_without_a_reference_network_refine_is_the_model_itself(folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("*.safetensors"):
        if path.name != weights.REFERENCE_FILE:
            (tmp_path / path.name).symlink_to(path)
    found = weights.load_demo_subject(tmp_path)
    assert found.branch is None and not found.weights.branch and len(found.weights.named) == 7


def test_the_reference_network_is_the_text_to_image_model_but_for_what_was_trained(loaded: Any, folder: Path) -> None:
    own = loaded.branch.model.diffusion_model.state_dict()
    base = load_file(folder / "truefill_demo_text2image.safetensors")
    changed = [
        name
        for name, tensor in own.items()
        if not torch.equal(tensor.float(), base[f"model.diffusion_model.{name}"].float())
    ]
    assert len(changed) == 6 * 5 and all(".attn2." in name for name in changed)


def test_text_and_subject_are_dropped_each_on_its_own() -> None:
    _, _, task, _ = demo_subject.untrained_tasks()
    empty = task._contexts[task._places[""]]
    texts, subjects_dropped, references = [], [], []
    for step in range(40):
        batch = task.batch(0, step, 16)
        texts += [torch.equal(of, empty) for of in batch["context"]]
        subjects_dropped += [not bool(of.any()) for of in batch["own"]]
        references += [bool(of.any()) for of in batch["subject"]]
    for dropped in (texts, subjects_dropped):
        assert 0.06 < np.mean(dropped) < 0.14
    both = np.mean(np.asarray(texts) & np.asarray(subjects_dropped))
    assert 0.0 < both < 0.03
    # The reference network always sees the subject, as released.
    assert all(references)


def test_the_losses_are_those_of_the_paper() -> None:
    """The noise's error at beta 1 and 0.3, the hole counting four times; the branch at the main UNet's own noise level."""
    _, _, first, second = demo_subject.untrained_tasks()
    for task, main, beta in ((first, first.main, 1.0), (second, second._main, 0.3)):
        batch = task.batch(0, 0, 3)
        seed = 5
        with torch.no_grad():
            # So that beta makes a difference.
            for weight in main.projections.parameters():
                weight.mul_(8.0)
            made = task.losses(batch, torch.Generator().manual_seed(seed))["loss"].item()
            generator = torch.Generator().manual_seed(seed)
            branch_noise = torch.randn(3, 4, 32, 32, generator=generator) if task is second else None
            times = ((torch.arange(3) + torch.rand(3, generator=generator)) / 3 * 1000).long()
            noise = torch.randn(3, 4, 32, 32, generator=generator)
            tokens = main.resampler(batch["own"])
            total = 0.0
            for row in range(3):
                one = slice(row, row + 1)
                share = float(diffusion.signal_shares()[times[row]])
                x = share**0.5 * batch["latents"][one] + (1 - share) ** 0.5 * noise[one]
                stored = None
                if branch_noise is not None:
                    noisy = share**0.5 * batch["subject"][one] + (1 - share) ** 0.5 * branch_noise[one]
                    stored = second.features(noisy, times[one], batch["details"][one])
                known = torch.cat([batch["hole"][one], batch["known"][one, 1:]], dim=1)
                eps = main(torch.cat([x, known], dim=1), times[one], batch["context"][one], tokens[one], beta, stored)
                squared = ((eps - noise[one]) ** 2).mean(dim=1)[0]
                inside = batch["hole"][row, 0] == 1
                error = (4 * squared[inside].sum() + squared[~inside].sum()) / (4 * inside.sum() + (~inside).sum())
                snr = share / (1 - share)
                total += float(error) * min(snr, 5.0) / snr
        assert made == pytest.approx(total / 3, rel=1e-4), task.name


def test_only_what_the_paper_trains_moves() -> None:
    _, _, first, second = demo_subject.untrained_tasks()
    for task in (first, second):
        generator = torch.Generator().manual_seed(0)
        task.losses(task.batch(0, 0, 2), generator)["loss"].backward()
        grads = {name: parameter.grad for name, parameter in task.networks.named_parameters()}
        assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in grads.values()), task.name
    names = {name.split(".")[0] for name in dict(second.networks.named_parameters())}
    assert names == {"cross", "detail"}
    assert all(parameter.grad is None for parameter in second._main.parameters() if not parameter.requires_grad)
    trained = {id(of) for of in second.networks.parameters()}
    assert all(id(of) in trained or of.grad is None for of in second._branch.parameters())


def test_encoded_quadruples_are_what_the_nodes_encode(tmp_path: Path) -> None:
    """The hole is gray in the masked picture, the subject lies on white, and a second call reads the files."""
    encoders = quadruples.Encoders(shipped.shipped_vae(), vision.Vision(seed=0).eval(), torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quadruples, "SHARD", 2)
        patch.setattr(quadruples, "_AT_ONCE", 2)
        asked: list[tuple[int, int]] = []
        paths = quadruples.encode_quadruples(tmp_path, encoders, "dev", 3, report=lambda *of: asked.append(of))
        assert asked == [(0, 4), (1, 4), (2, 4), (3, 4)]
        again = quadruples.encode_quadruples(
            tmp_path, encoders, "dev", 3, report=lambda *of: pytest.fail("encoded again")
        )
        assert again == paths
        assert quadruples.encode_quadruples(tmp_path / "new", encoders, "dev", 3, should_stop=lambda: True) is None
    found = quadruples.load_quadruples(paths)
    at_once = encoders.encode([subjects.make_quadruple("dev", index, index) for index in range(4)])
    for name in ("clean", "subject", "own"):
        torch.testing.assert_close(getattr(at_once, name).float(), getattr(found, name).float(), atol=0.05, rtol=0.05)
    assert at_once.prompt.tolist() == found.prompt.tolist()
    assert found.clean.shape == found.masked.shape == found.subject.shape == (4, 4, 32, 32)
    assert found.own.shape == found.details.shape == (4, 65, 160)
    vae = pack_module("weights.demo_model").host_vae(pack_module("weights.demo_model").read("vae"))
    scale = pack_module("weights.demo_model").LATENT_SCALE
    for index in range(4):
        quadruple = subjects.make_quadruple("dev", index, index)
        pixels = latents.as_pixels(quadruple.picture[None])
        hole = torch.from_numpy(quadruple.hole).float()[None, None]
        (cut,) = pack_module("imaging.subject").cut_out(
            latents.as_pixels(quadruple.reference[None]).movedim(1, -1),
            torch.from_numpy(quadruple.reference_mask).float()[None],
        )
        white = pack_module("imaging.subject").for_branch(cut, 256)[None]
        for name, picture in (
            ("clean", pixels.movedim(1, -1)),
            ("masked", ((pixels - 0.5) * (1 - hole) + 0.5).movedim(1, -1)),
            ("subject", white),
        ):
            with torch.inference_mode():
                expected = vae.encode(picture) * scale
            # bfloat16, as it is encoded.
            error = (getattr(found, name)[index].float() - expected[0]).abs()
            assert error.mean() < 0.02, name
        assert found.prompt[index] == quadruple.prompt


def test_the_shipped_autoencoder_is_narrow_again() -> None:
    narrow_taesd, demo_model = pack_module("training.demo.narrow_taesd"), pack_module("weights.demo_model")
    state = demo_model.read("vae")
    again = narrow_taesd.widen(shipped.shipped_vae().state_dict(), demo_model.LATENT_SCALE)
    assert again.keys() == {*state, "vae_scale"} or again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor.float()) for name, tensor in state.items() if name != "vae_scale")


@pytest.mark.quick
def test_a_weighted_loss_is_the_mean_of_the_weighted_errors() -> None:
    clean, weight = torch.zeros(2, 4, 4, 4), torch.ones(2, 1, 4, 4)
    weight[:, :, :2] = 4.0

    def predict(x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        # All noise but for an error of 1 in the upper half.
        share = diffusion.signal_shares()[times][:, None, None, None]
        made = x / (1 - share).sqrt()
        made[:, :, :2] += 1.0
        return made

    def loss(weight: torch.Tensor | None) -> float:
        return float(diffusion.noise_loss(predict, clean, torch.Generator().manual_seed(0), weight))

    # 4 of 5 parts of the weight lie in the upper half, which is half of the cells.
    assert loss(weight) == pytest.approx(loss(None) * (0.8 / 0.5), rel=1e-4)
    assert loss(torch.full_like(weight, 7.0)) == pytest.approx(loss(None), rel=1e-5)


def test_stages_come_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = pack_module("training.lar_gen.stages")
    monkeypatch.setattr(stages, "subject_ships", lambda: False)
    with pytest.raises(FileNotFoundError, match="train the stage 'subject-vision' first"):
        stages.subject_task(
            stages.ASSIGN, stages.SubjectSource(tmp_path, 2), 0, torch.device("cpu"), lambda: False, print
        )
