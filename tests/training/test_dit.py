"""The demo model's transformer: trained as the host runs it, and loaded as the host loads it."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from devtools.pack import ensure_host, pack_module

ensure_host()

import comfy.model_management  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402

diffusion = pack_module("training.diffusion")
dit = pack_module("training.demo.dit")
export = pack_module("training.demo.export")
latents = pack_module("training.demo.latents")
loop = pack_module("training.loop")
shipped = pack_module("training.demo.shipped")
vocabulary = pack_module("training.demo.vocabulary")
demo_dit = pack_module("weights.demo_dit")


@pytest.fixture(scope="module")
def network():
    """With weights that let every block act."""
    made = dit.new_dit(seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in made.parameters():
        if not parameter.any():
            parameter.data.normal_(0.0, 0.05, generator=generator)
    return made


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(2, 4, 32, 32, generator=generator),
        torch.tensor([0.3, 0.8]),
        torch.randn(2, 77, 192, generator=generator),
    )


def test_it_starts_as_a_network_that_says_nothing(inputs):
    assert not dit.predict_flow(dit.new_dit(seed=0), *inputs).any()


def test_what_is_trained_is_what_the_host_runs(network, inputs):
    made = dit.predict_flow(network, *inputs)
    with torch.no_grad():
        expected = copy.deepcopy(network)(*inputs)
    assert expected.std() > 0.01
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)
    assert not comfy.model_management.in_training


def test_its_gradient_is_that_of_finite_differences(network, inputs):
    x, levels, context = (value.double() for value in inputs)
    network = copy.deepcopy(network).double()
    weight = network.double_blocks[1].txt_attn.qkv.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    dit.predict_flow(network, x, levels, context).square().mean().backward()
    assert weight.grad is not None
    slope = float((weight.grad * direction).sum())
    errors, kept = [], weight.data.clone()
    for sign in (1, -1):
        weight.data = kept + sign * 1e-4 * direction
        with torch.no_grad():
            errors.append(float(dit.predict_flow(network, x, levels, context).square().mean()))
    weight.data = kept
    assert slope == pytest.approx((errors[0] - errors[1]) / 2e-4, rel=1e-2)


def test_a_perfect_flow_costs_nothing_and_samples_the_picture():
    clean = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def perfect(x, levels):
        return (x - clean) / levels[:, None, None, None]

    assert diffusion.flow_loss(perfect, clean, torch.Generator().manual_seed(0)) < 1e-6
    assert diffusion.flow_loss(lambda x, t: torch.zeros_like(x), clean, torch.Generator().manual_seed(0)) > 0.5
    torch.testing.assert_close(diffusion.flow_euler(perfect, torch.randn(2, 4, 8, 8), 10), clean, atol=1e-4, rtol=1e-4)


def make_task():
    clean = torch.randn(8, 4, 32, 32, generator=torch.Generator().manual_seed(5)).half()
    of_both = latents.Latents(clean)
    return dit.DitTask(of_both, of_both, vocabulary.world_vocabulary(), shipped.shipped_text(), seed=0)


def test_a_coarse_token_lies_in_the_middle_of_the_four_that_it_stands_for(network):
    places = []
    handle = network.pe_embedder.register_forward_pre_hook(lambda module, inputs: places.append(inputs[0][0, -64:]))
    try:
        with torch.no_grad():
            dit.predict_flow(network, torch.zeros(1, 4, 16, 16), torch.ones(1), torch.zeros(1, 5, 192), coarse=2)
            handle.remove()
            handle = network.pe_embedder.register_forward_pre_hook(
                lambda module, inputs: places.append(inputs[0][0, -256:])
            )
            dit.predict_flow(network, torch.zeros(1, 4, 32, 32), torch.ones(1), torch.zeros(1, 5, 192))
    finally:
        handle.remove()
    coarse, fine = places[0].unflatten(0, (8, 8)), places[1].unflatten(0, (8, 2, 8, 2))
    torch.testing.assert_close(coarse, fine.mean(dim=(1, 3)))


def test_coarse_steps_see_the_mean_of_four_cells_and_no_padding(monkeypatch):
    task, seen = make_task(), {}
    monkeypatch.setattr(dit, "COARSE_STEPS", 1)
    fine, coarse = task.batch(0, 1, 2), task.batch(0, 0, 2)
    assert fine["latents"].shape[-1] == 32 and fine["labels"].shape[-1] == 16
    assert coarse["latents"].shape[-1] == 16 and coarse["labels"].shape[-1] == 8

    def keep(network, x, levels, context, coarse):
        seen[coarse] = context.shape[1]
        return real(network, x, levels, context, coarse)

    real = dit.predict_flow
    monkeypatch.setattr(dit, "predict_flow", keep)
    for batch in (fine, coarse):
        assert task.losses(batch, torch.Generator().manual_seed(0))["loss"].isfinite()
    # Up to the end of the longest caption.
    words = max(int((row != row[-1]).sum()) for row in coarse["rows"])
    assert seen == {1: 77, 2: words + 1}


def test_muon_moves_a_matrix_alike_in_all_directions_of_its_gradient():
    weight, other = (torch.nn.Parameter(torch.zeros(size)) for size in ((24, 16), (3,)))
    generator = torch.Generator().manual_seed(0)
    columns, rows = torch.randn(24, 2, generator=generator), torch.randn(2, 16, generator=generator)
    gradient = columns @ torch.diag(torch.tensor([10.0, 0.1])) @ rows

    class OneMatrix:
        def matrices(self):
            return [weight]

    settings = loop.Settings(steps=1, batch=1, learning_rate=1e-2, muon=True)
    adam, muon = loop._optimizers(OneMatrix(), [weight, other], settings)
    assert [group["params"] for group in adam.param_groups] == [[other]]
    weight.grad = gradient
    muon.step()
    first, second = torch.linalg.svdvals(gradient)[:2]
    assert first / second > 50
    first, second = torch.linalg.svdvals(weight.detach())[:2]
    assert 0 < first / second < 2
    # As large as AdamW's step, which moves each weight by the rate (arXiv 2502.16982: 0.2 of it, by root mean square).
    assert float(weight.detach().square().mean().sqrt()) < 1e-2
    without = loop._optimizers(OneMatrix(), [weight, other], replace(settings, muon=False))
    assert len(without) == 1


def test_the_matrices_are_the_blocks_own():
    task = make_task()
    names = {name for name, weight in task.networks.named_parameters() if any(weight is one for one in task.matrices())}
    assert "network.double_blocks.0.img_attn.qkv.weight" in names and "network.single_blocks.5.linear2.weight" in names
    assert all("blocks" in name and "mod" not in name for name in names)


def test_a_run_with_muon_is_resumed_as_if_it_had_not_stopped(tmp_path):
    settings = loop.Settings(steps=2, batch=2, learning_rate=1e-3, bfloat16=False, muon=True)
    runs = []
    for stops in ((), (1,)):
        calls = itertools.count()
        folder = tmp_path / str(len(stops))
        trainer = None
        for stop in (*stops, 99):
            trainer = loop.Trainer(make_task(), settings, folder, torch.device("cpu"))
            trainer.train(lambda calls=calls, stop=stop: next(calls) >= stop)
        assert trainer is not None and trainer.step == 2
        runs.append(trainer.task.network)
    for one, other in zip(runs[0].parameters(), runs[1].parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="has muon True, this one False"):
        loop.Trainer(make_task(), replace(settings, muon=False), folder, torch.device("cpu"))


def test_a_step_lowers_the_loss_and_its_file_is_what_the_host_samples_with(tmp_path, monkeypatch):
    monkeypatch.setattr(dit, "COARSE_STEPS", 0)
    task = make_task()
    settings = loop.Settings(steps=8, batch=4, learning_rate=1e-3, bfloat16=False, warm_up=1, ema=0.0)
    trainer = loop.Trainer(task, settings, tmp_path / "dit", torch.device("cpu"))
    before = task.evaluate()["dev_loss"]
    trainer.train(lambda: False, lambda progress: None)
    assert task.evaluate()["dev_loss"] < before
    assert set(task.networks) == {"network", "labels"}

    written = export.export(tmp_path, tmp_path / "out")
    assert [path.name for path in written] == [demo_dit.FILE]
    model = demo_dit.host_dit(load_file(written[0]))
    assert model.model.model_sampling.shift == demo_dit.SHIFT
    positive, negative = ([[torch.randn(1, 77, 192), {"pooled_output": None}]] for _ in range(2))
    noise = torch.randn(1, 4, 24, 40)
    sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "simple", 2)
    with torch.inference_mode():
        made = comfy.sample.sample_custom(
            model,
            noise,
            3.0,
            comfy.samplers.sampler_object("euler"),
            sigmas,
            positive,
            negative,
            torch.zeros(1, 4, 24, 40),
            disable_pbar=True,
        )
    assert made.shape == noise.shape and made.isfinite().all()
