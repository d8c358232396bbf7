"""Training: losses fall, a resumed run equals an uninterrupted one, latents are made once."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from devtools.pack import pack_module

curves = pack_module("training.curves")
export = pack_module("training.demo.export")
latents = pack_module("training.demo.latents")
loop = pack_module("training.loop")
narrow_taesd = pack_module("training.demo.narrow_taesd")
vocabulary = pack_module("training.demo.vocabulary")
scenes = pack_module("training.world.scenes")
holes = pack_module("training.world.holes")
VaeTask = pack_module("training.demo.vae").VaeTask
ClassifierTask = pack_module("training.demo.classifier").ClassifierTask
segmenter_task = pack_module("training.demo.segmenter")
TextToImageTask = pack_module("training.demo.text2image").TextToImageTask
InpaintTask = pack_module("training.demo.inpaint").InpaintTask

CPU = torch.device("cpu")
SETTINGS = loop.Settings(steps=6, batch=2, learning_rate=1e-3, warm_up=2, record_every=2)


def some_latents(count: int = 4):
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).half()

    hole = (random(count, 1, 32, 32) > 0).half()
    return latents.Latents(random(count, 4, 32, 32), random(count, 4, 32, 32), hole, random(4, 32, 32))


def make_task(name: str):
    if name == "vae":
        return VaeTask(seed=0)
    if name == "classifier":
        return ClassifierTask(seed=0)
    if name == "segmenter":
        return segmenter_task.SegmenterTask(seed=0)
    text2image = TextToImageTask(some_latents(), some_latents(), vocabulary.world_vocabulary(), seed=0)
    if name == "text2image":
        return text2image
    return InpaintTask(
        some_latents(),
        some_latents(),
        vocabulary.world_vocabulary(),
        text2image.unet.state_dict(),
        text2image.text.state_dict(),
    )


TASKS = ("vae", "text2image", "inpaint", "classifier", "segmenter")


# The classifier's steps are the cheapest: stopped after 1 step, in the middle of a record, and again after 3.
@pytest.mark.parametrize(("name", "stops"), [(name, (1, 2) if name == "classifier" else (1,)) for name in TASKS])
def test_a_resumed_run_equals_an_uninterrupted_one(name, stops, tmp_path):
    done = sum(stops)
    settings = replace(SETTINGS, steps=done + 1)
    whole = loop.Trainer(make_task(name), settings, tmp_path / "whole", CPU)
    assert whole.train()
    for steps in stops:
        part = loop.Trainer(make_task(name), settings, tmp_path / "parts", CPU)
        calls = itertools.count()
        assert not part.train(should_stop=lambda calls=calls, steps=steps: next(calls) >= steps)
    last = loop.Trainer(make_task(name), settings, tmp_path / "parts", CPU)
    assert last.step == done and last.train()
    one, other = (torch.load(tmp_path / folder / "checkpoint.pt", weights_only=True) for folder in ("whole", "parts"))
    assert one["step"] == other["step"] == done + 1
    assert one["history"] == other["history"] and len(one["history"]) == (done + 1) // SETTINGS.record_every
    for part in ("networks", "average"):
        for key, tensor in one[part].items():
            assert torch.equal(tensor, other[part][key]), (part, key)


@pytest.mark.parametrize(
    ("name", "rate"),
    [("vae", 2e-3), ("text2image", 2e-3), ("inpaint", 2e-3), ("classifier", 2e-3), ("segmenter", 2e-3)],
)
def test_the_loss_of_one_batch_falls(name, rate, tmp_path):
    task = make_task(name)
    batch = task.batch(0, 0, 4)
    if name in ("text2image", "inpaint"):
        # Noise alone cannot be learnt by heart: pictures that are all alike can.
        batch["latents"] = torch.ones_like(batch["latents"])
    optimizer = torch.optim.Adam(task.networks.parameters(), lr=rate)
    values = []
    for _ in range(14):
        loss = task.losses(batch, torch.Generator().manual_seed(1))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert np.isfinite(values).all()
    assert values[-1] < 0.85 * values[0]


def test_every_weight_is_trained():
    task = make_task("text2image")
    # Layers that start at zero hide those before them.
    with torch.no_grad():
        for parameter in task.networks.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    task.losses(task.batch(0, 0, 2), torch.Generator().manual_seed(0))["loss"].backward()
    idle = [name for name, p in task.networks.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_the_inpainting_task_leaves_the_text_encoder_alone():
    task = make_task("inpaint")
    assert not any(name.startswith("text") for name, _ in task.networks.named_parameters())
    batch = task.batch(0, 0, 40)
    assert batch["known"].shape == (40, 5, 32, 32)
    everything = batch["known"][:, 0].flatten(1).amin(dim=1) == 1
    assert 2 < everything.sum() < 25


def test_captions_are_dropped_now_and_then():
    task = make_task("text2image")
    rows = task.batch(0, 0, 200)["rows"]
    empty = torch.tensor(vocabulary.world_vocabulary().rows(""))
    assert 6 < (rows == empty).all(dim=1).sum() < 40
    assert (rows[:, 0] == empty[0]).all()


@pytest.mark.parametrize("kind", segmenter_task.KINDS)
def test_what_the_segmenter_is_asked_for_lies_on_its_object(kind):
    rng = np.random.default_rng(3)
    batch = segmenter_task._prompts(rng, [segmenter_task._example("dev", rng) for _ in range(3)], kind)
    masks = batch["masks"]
    assert masks.shape == (3, segmenter_task.PROMPTS, 256, 256) and masks.flatten(2).sum(dim=-1).min() >= 150
    assert ("points" in batch) == ("point" in kind) and ("rough" in batch) == (kind == "rough")
    assert ("boxes" in batch) == (kind in ("box", "box and point", "rough"))
    for picture, thing in itertools.product(range(3), range(segmenter_task.PROMPTS)):
        mask = masks[picture, thing]
        if "rough" in batch:
            rough = batch["rough"][picture, thing]
            assert bool((rough & mask).any()) and bool(((rough <= mask) | (rough >= mask)).all())
            # The box is around what is drawn.
            mask = rough
        if "points" in batch:
            found = [bool(mask[int(y), int(x)]) for x, y in batch["points"][picture, thing].tolist()]
            assert found == (batch["labels"][picture, thing] == 1).tolist()
        if "boxes" in batch:
            rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
            exact = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])[:, 0].float()
            size = (exact[2:] - exact[:2]).repeat(2)
            assert ((batch["boxes"][picture, thing] - exact).abs() <= 0.1 * size + 1e-3).all()


def test_a_new_segmenter_sees_its_prompts():
    """Else it learns to find things, but never which one is meant."""
    network = segmenter_task.new_segmenter(0)
    pixels = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    points = torch.tensor([[[[60.5, 60.5]], [[68.5, 60.5]], [[200.5, 180.5]]]])
    with torch.no_grad():
        masks = network(pixel_values=pixels, input_points=points, input_labels=torch.ones(1, 3, 1)).pred_masks[0]
    near, far = ((masks[0] - masks[other]).std() / masks[0].std() for other in (1, 2))
    assert far > 0.1 and near < 0.8 * far


def test_pictures_for_the_segmenter_are_scenes_mosaics_and_parts_beside_padding():
    rng = np.random.default_rng(5)
    padded, crowded = 0, 0
    for _ in range(40):
        picture, masks = segmenter_task._example("dev", rng)
        assert picture.shape == (256, 256, 3) and 0 <= picture.min() and picture.max() <= 1
        assert masks.dtype == bool and masks.sum(axis=(1, 2)).min() >= 150
        # What can be seen of things does not overlap.
        assert masks.sum(axis=0).max() == 1
        padding = np.isclose(picture, segmenter_task.MEAN, atol=1e-7).all(axis=-1)
        if padding.any():
            rows, columns = (~padding).any(axis=1).nonzero()[0], (~padding).any(axis=0).nonzero()[0]
            assert rows.max() < 255 or columns.max() < 255
            assert not (masks & padding).any()
        padded += bool(padding.any())
        crowded += len(masks) > 5
    assert 8 < padded < 26 and 4 < crowded < 22


def test_the_exported_segmenter_is_read_as_segment_anything(tmp_path):
    trainer = loop.Trainer(make_task("segmenter"), replace(SETTINGS, steps=1), tmp_path / "segmenter", CPU)
    trainer.train()
    (file,) = pack_module("training.demo.export").export(tmp_path, tmp_path / "out")
    assert file.stat().st_size < 5e6
    read = pack_module("weights.segmenters").read_segmenter(file)
    trainer.use_average()
    mine = trainer.task.segmenter.state_dict()
    assert read.config.vision_config.image_size == 256 and read.state_dict().keys() == mine.keys()
    for name, tensor in read.state_dict().items():
        torch.testing.assert_close(tensor, mine[name], atol=1e-3, rtol=1e-3)


def test_batches_depend_on_seed_and_step_only():
    task = make_task("classifier")
    first, again, other = task.batch(1, 5, 2), task.batch(1, 5, 2), task.batch(1, 6, 2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["pixels"], other["pixels"])


def test_batches_of_workers_are_the_same(tmp_path):
    runs = []
    for workers in (0, 2):
        trainer = loop.Trainer(
            make_task("classifier"), replace(SETTINGS, steps=2, workers=workers), tmp_path / str(workers), CPU
        )
        trainer.train()
        runs.append(trainer.history)
    assert runs[0] == runs[1]


def test_a_run_keeps_its_settings(tmp_path):
    trainer = loop.Trainer(make_task("classifier"), SETTINGS, tmp_path, CPU)
    trainer.save()
    with pytest.raises(ValueError, match="has batch 2, this one 3"):
        loop.Trainer(make_task("classifier"), replace(SETTINGS, batch=3), tmp_path, CPU)
    loop.Trainer(make_task("classifier"), replace(SETTINGS, save_every=1.0), tmp_path, CPU)


def test_a_run_may_become_longer_until_it_slows_down(tmp_path):
    settings = replace(SETTINGS, steps=8, warm_up=1)
    whole = loop.Trainer(make_task("classifier"), replace(settings, steps=12), tmp_path / "whole", CPU)
    whole.train()
    calls = itertools.count()
    loop.Trainer(make_task("classifier"), settings, tmp_path / "part", CPU).train(lambda: next(calls) >= 6)
    longer = loop.Trainer(make_task("classifier"), replace(settings, steps=12), tmp_path / "part", CPU)
    assert longer.step == 6
    longer.train()
    for one, other in zip(whole.task.networks.parameters(), longer.task.networks.parameters(), strict=True):
        assert torch.equal(one, other)
    calls = itertools.count()
    loop.Trainer(make_task("classifier"), settings, tmp_path / "late", CPU).train(lambda: next(calls) >= 8)
    with pytest.raises(ValueError, match="has steps 8, this one 12"):
        loop.Trainer(make_task("classifier"), replace(settings, steps=12), tmp_path / "late", CPU)


def test_a_run_that_has_ended_can_be_restarted_and_says_so(tmp_path):
    settings = replace(SETTINGS, steps=8, warm_up=1)
    longer = replace(settings, steps=12)
    loop.Trainer(make_task("classifier"), settings, tmp_path, CPU).train()
    with pytest.raises(ValueError, match="has steps 8, this one 12"):
        loop.Trainer(make_task("classifier"), longer, tmp_path, CPU)
    calls = itertools.count()
    again = loop.Trainer(make_task("classifier"), longer, tmp_path, CPU, restart=True)
    assert again.step == 8
    assert loop.learning_rate_at(8, longer) == settings.learning_rate > loop.learning_rate_at(7, settings)
    assert not again.train(lambda: next(calls) >= 2)
    # What was restarted is resumed like any other run.
    resumed = loop.Trainer(make_task("classifier"), longer, tmp_path, CPU)
    before = [{"steps": 8, "batch": settings.batch, "learning_rate": settings.learning_rate}]
    assert resumed.train() and resumed.restarts == before
    record = export._record(tmp_path)
    assert (record["restarts"], record["trained_steps"], record["steps"]) == (before, 12, 12)


def test_a_restart_may_change_the_batch_and_says_how_it_was(tmp_path):
    settings = replace(SETTINGS, steps=8, warm_up=1)
    other = replace(settings, steps=12, batch=settings.batch + 1, learning_rate=settings.learning_rate / 2)
    loop.Trainer(make_task("classifier"), settings, tmp_path, CPU).train()
    again = loop.Trainer(make_task("classifier"), other, tmp_path, CPU, restart=True)
    assert again.train()
    record = export._record(tmp_path)
    assert (record["batch"], record["learning_rate"]) == (other.batch, other.learning_rate)
    assert record["restarts"] == [{"steps": 8, "batch": settings.batch, "learning_rate": settings.learning_rate}]
    with pytest.raises(ValueError, match=f"has batch {other.batch}"):
        loop.Trainer(make_task("classifier"), replace(other, batch=settings.batch), tmp_path, CPU)
    with pytest.raises(ValueError, match="has seed 0, this one 1"):
        loop.Trainer(make_task("classifier"), replace(other, steps=16, seed=1), tmp_path, CPU, restart=True)


def test_a_run_that_has_not_ended_is_not_restarted(tmp_path):
    settings = replace(SETTINGS, steps=16, warm_up=1)
    calls = itertools.count()
    loop.Trainer(make_task("classifier"), settings, tmp_path, CPU).train(lambda: next(calls) >= 14)
    with pytest.raises(ValueError, match="has steps 16, this one 24"):
        loop.Trainer(make_task("classifier"), replace(settings, steps=24), tmp_path, CPU, restart=True)


def test_a_run_leaves_its_record(tmp_path):
    reports = []
    trainer = loop.Trainer(make_task("classifier"), SETTINGS, tmp_path, CPU)
    trainer.train(report=reports.append)
    assert [report.step for report in reports] == [2, 4, 6]
    assert reports[-1].seconds_left == 0 and reports[0].seconds_left > 0
    history = json.loads((tmp_path / "losses.json").read_text())
    assert [row["step"] for row in history] == [2, 4, 6] and {"loss", "shape", "colour", "pattern"} <= set(history[0])
    with Image.open(tmp_path / "losses.png") as picture:
        assert picture.width > 400
    assert not list(tmp_path.glob("*.partial"))
    average = loop.averaged_weights(tmp_path, "classifier")
    trainer.use_average()
    for name, tensor in trainer.task.classifier.state_dict().items():
        assert torch.equal(tensor, average[name])


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="train the stage 'vae' first"):
        loop.averaged_weights(tmp_path / "vae", "vae")


def test_the_learning_rate_rises_stays_and_falls():
    settings = loop.Settings(steps=1000, batch=1, learning_rate=1.0, warm_up=100)
    rates = [loop.learning_rate_at(step, settings) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and rates[99] == rates[500] == 1.0
    assert rates[-1] == pytest.approx(0.05, abs=0.01) and max(rates) == 1.0


def test_a_curve_of_one_point_can_be_drawn():
    assert curves.draw_curves([{"step": 20, "loss": 0.5, "other": 0.0}], "run").width > 400


def test_processes_make_the_same_latents_in_the_same_order(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 2)
    monkeypatch.setattr(latents, "_AT_ONCE", 1)
    vae = narrow_taesd.NarrowTAESD()
    alone, together = (
        latents.load_latents(tmp_path / str(workers), vae, "train", 4, True, CPU, workers=workers) for workers in (0, 2)
    )
    for name in ("clean", "masked", "hole"):
        assert torch.equal(getattr(alone, name), getattr(together, name))
    pixels = latents.as_pixels(np.stack([scenes.make_scene("train", index).picture for index in range(4)]))
    torch.testing.assert_close(together.clean, latents.encode(vae, pixels, CPU), atol=0.02, rtol=0.02)


def test_latents_are_made_once_and_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 2)
    monkeypatch.setattr(latents, "_AT_ONCE", 2)
    vae = narrow_taesd.NarrowTAESD()
    calls = itertools.count()
    stopped = latents.load_latents(tmp_path, vae, "train", 4, True, CPU, should_stop=lambda: next(calls) >= 3)
    assert stopped is None and len(list(tmp_path.rglob("*.npz"))) == 3
    reports = []

    def report(done, total):
        reports.append((done, total))

    made = latents.load_latents(tmp_path, vae, "train", 4, True, CPU, report=report, workers=1)
    assert reports == [(3, 4)]
    assert made.clean.shape == made.masked.shape == (4, 4, 32, 32)
    assert made.hole.shape == (4, 1, 32, 32) and made.blank.shape == (4, 32, 32)
    pixels = latents.as_pixels(np.stack([scenes.make_scene("train", 3).picture]))
    torch.testing.assert_close(made.clean[3:], latents.encode(vae, pixels, CPU), atol=0.02, rtol=0.02)
    hole = torch.from_numpy(holes.scene_hole("train", 3)).float()[None, None]
    torch.testing.assert_close(
        made.masked[3:], latents.encode(vae, latents.with_hole(pixels, hole), CPU), atol=0.02, rtol=0.02
    )
    torch.testing.assert_close(made.hole[3:], latents.latent_hole(hole).half())
    assert not torch.equal(made.clean, made.masked)
    # Another autoencoder has other latents.
    assert latents.fingerprint(vae.state_dict()) != latents.fingerprint(narrow_taesd.NarrowTAESD(1).state_dict())
