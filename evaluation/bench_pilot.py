"""Time and memory of PILOT's passes on a full-depth UNet: ours, the literal form, and a conditional forward pass.

Random weights: the cost does not depend on them. A pass is one iteration of the optimiser: the conditional prediction, both
losses, and their gradient with respect to the latent. The literal form does what the formulas and the released code say: both
halves of CFG in one graph through the whole UNet, weights that require gradients, every cross-attention as a matrix. That its
losses are ours is checked first. Within one size the rows run in turn, round by round; times are medians. Memory is the greatest
growth during two passes over what is held before them. A picture has the released schedule: 100 passes and 100 guided steps.

    python dev.py bench pilot [--family SDXL] [--sizes 256 512] [--literal-up-to 512] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import comfy.model_management
import comfy.samplers
import torch

from ..model_patches.core.unet_attention import transformer_places
from ..model_patches.pilot import sampler as pilot
from ..model_patches.pilot.semantic_boundary import known_cells
from . import full_size
from .tables import show_table

SIGMA = 10.0
PASSES, GUIDED_STEPS = 100, 100
TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2}
# Random weights attend to all alike: the loss is a difference of means of a tenth, and can be as small as their rounding.
ROUNDING = {torch.float32: 1e-8, torch.float16: 1e-4}
EULER = comfy.samplers.sampler_object("euler")


def gaps(run: Callable[[Callable[..., None]], None], device: torch.device) -> list[float]:
    """Seconds between the calls of a sampler's callback."""
    times: list[float] = []

    def note(*_: Any) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    run(note)
    return [later - earlier for earlier, later in pairwise(times)]


def sample_pilot(model: Any, scene: Any, memory: pilot.Memory, callback: Callable[..., None] | None) -> None:
    """Two passes of PILOT and the guided step after them."""
    settings = pilot.PILOT(interval=1, iterations=2, memory=memory)
    scene.sample(model, pilot.pilot_sampler(settings, lambda text: None), (SIGMA, 8.0), callback=callback)


class Literal:
    """PILOT's pass written out, on the host's UNet."""

    def __init__(self, model: Any, scene: Any) -> None:
        self._base, self._scene = model.model, scene
        self._unet = model.model.diffusion_model
        self._hole = scene.hole.to(next(self._unet.parameters()).device)
        self._maps: list[torch.Tensor] = []

    def losses(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """L_bg and L_sc at the host's latent x [1, 4, h, w]; the graph is recorded if gradients are."""
        self._maps = []
        scene, device, dtype = self._scene, x.device, self._unet.dtype
        sampling = self._base.model_sampling
        sigma = torch.tensor([SIGMA], device=device)
        inputs = sampling.calculate_input(sigma, x).to(dtype).repeat(2, 1, 1, 1)
        context = torch.cat((scene.sides[1][0][0], scene.sides[0][0][0])).to(device, dtype)
        timestep = sampling.timestep(sigma).float().repeat(2)
        with ExitStack() as forwards:
            for t in transformer_places(self._unet):
                forwards.enter_context(mock.patch.object(t.cross, "forward", self._attending(t)))
            _, conditional = self._unet(inputs, timestep, context=context).chunk(2)
        denoised = sampling.calculate_denoised(sigma, conditional.float(), x)
        latent = self._base.process_latent_in(scene.latent.to(device))
        background = 0.25 * ((1.0 - self._hole) * (latent - denoised)).square().sum()
        return background, torch.stack(self._maps).mean()

    def one_pass(self) -> None:
        """The losses and the latent's gradient."""
        self._unet.requires_grad_(True)
        try:
            x = (SIGMA * self._scene.noise).to(self._hole.device).requires_grad_()
            background, centralisation = self.losses(x)
            torch.autograd.grad(background + 100.0 * centralisation, x)
        finally:
            self._unet.requires_grad_(False)

    def _attending(self, t: Any) -> Callable[..., torch.Tensor]:
        cells = [side // t.factor for side in self._hole.shape[-2:]]
        known = known_cells(self._hole, (cells[0], cells[1])).flatten()
        tokens = self._scene.sides[0][0][1]["truefill_prompt_tokens"][0].to(known.device)

        def attend(x: torch.Tensor, context: torch.Tensor, value: Any = None, **_: Any) -> torch.Tensor:
            cross = t.cross
            q, k, v = (
                part.unflatten(2, (cross.heads, -1)).transpose(1, 2)
                for part in (cross.to_q(x), cross.to_k(context), cross.to_v(context))
            )
            probabilities = (q.float() @ k.float().mT * cross.dim_head**-0.5).softmax(dim=-1)
            if t.factor > 1:
                heard = probabilities[1, :, :, tokens].sum(dim=-1).mean(dim=0)
                one_kind = bool(known.all()) or not bool(known.any())
                self._maps.append(heard.new_zeros(()) if one_kind else heard[known].mean() - heard[~known].mean())
            spoken = torch.ones_like(probabilities[0, 0])
            spoken[known, 1:] = 0.0
            return cross.to_out(((probabilities * spoken).to(v.dtype) @ v).transpose(1, 2).flatten(2))

        return attend


def check_losses(model: Any, scene: Any, dtype: torch.dtype) -> None:
    """Raises AssertionError where the literal form has other losses than ours at the same latent."""
    found: dict[str, float] = {}
    background, centralisation = pilot.background_loss, pilot.Centralisation.loss

    def noting(name: str, of: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def note(*arguments: Any) -> torch.Tensor:
            result = of(*arguments)
            found.setdefault(name, float(result.detach().sum()))
            return result

        return note

    with (
        mock.patch.object(pilot, "background_loss", noting("background", background)),
        mock.patch.object(pilot.Centralisation, "loss", noting("centralisation", centralisation)),
        torch.inference_mode(),
    ):
        sample_pilot(model, scene, "record", None)
    start = SIGMA * scene.noise + model.model.process_latent_in(scene.latent)
    with torch.no_grad():
        literal = Literal(model, scene).losses(start.to(next(model.model.diffusion_model.parameters()).device))
    for name, theirs in zip(("background", "centralisation"), literal, strict=True):
        error = abs(found[name] - float(theirs))
        assert error < TOLERANCE[dtype] * abs(float(theirs)) + ROUNDING[dtype], (name, found[name], float(theirs))


def measure_size(
    model: Any,
    size: int,
    with_literal: bool,
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
    family: str = "SD1.5",
) -> list[dict[str, Any]]:
    """A line for each row at one size: median seconds and MiB of a pass, and their ratios."""
    scene = full_size.Scene(size, family)
    literal = Literal(model, scene)
    if with_literal:
        check_losses(model, scene, dtype)
    runs: dict[str, Callable[[Callable[..., None]], None]] = {
        "conditional forward": lambda note: scene.sample(model, EULER, (12.0, 10.0, 8.0, 6.0), 1.0, note),
        "guided step": lambda note: scene.sample(model, EULER, (12.0, 10.0, 8.0, 6.0), 7.5, note),
        "record": lambda note: sample_pilot(model, scene, "record", note),
        "recompute": lambda note: sample_pilot(model, scene, "recompute", note),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    memory: dict[str, list[float]] = {name: [] for name in runs}
    if with_literal:
        seconds["literal"], memory["literal"] = [], []
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            between: list[float] = []
            with torch.inference_mode():
                _, grown = full_size.measure(lambda run=run, between=between: between.extend(gaps(run, device)), device)
            if round_:
                # The last gap of PILOT's is its guided step.
                seconds[name].append(between[0])
                memory[name].append(grown)
        if with_literal:
            taken, grown = full_size.measure(literal.one_pass, device)
            if round_:
                seconds["literal"].append(taken)
                memory["literal"].append(grown)
    rows: list[dict[str, Any]] = []
    forward, guided = (statistics.median(seconds[name]) for name in ("conditional forward", "guided step"))
    for name, taken in seconds.items():
        middle, grown = statistics.median(taken), statistics.median(memory[name])
        row = {"pixels": size, "pass": name, "seconds": middle, "x forward": middle / forward, "MiB": round(grown)}
        if name in ("record", "recompute", "literal"):
            row["picture"] = PASSES * middle + GUIDED_STEPS * guided
        rows.append(row)
    if with_literal:
        last = rows[-1]
        for row in rows[2:]:
            row |= {"x literal": row["seconds"] / last["seconds"], "x its MiB": row["MiB"] / last["MiB"]}
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python dev.py bench pilot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[256, 512], help="pixels of the side (default: 256 512)"
    )
    parser.add_argument("--literal-up-to", type=int, default=512, help="greatest size for the literal form")
    parser.add_argument(
        "--family", choices=full_size.FAMILIES, default="SD1.5", help="default: SD1.5; SDXL has no literal form"
    )
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds (default: 3)")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args()
    device = comfy.model_management.get_torch_device()
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    model = full_size.full_size_model(device, dtype, inpainting=False, family=options.family)
    where = f"{full_size.machine(device)}, {str(dtype).removeprefix('torch.')}"
    rows: list[dict[str, Any]] = []
    for size in options.sizes:
        with_literal = options.family == "SD1.5" and size <= options.literal_up_to
        found = measure_size(model, size, with_literal, options.rounds, device, dtype, options.family)
        show_table(f"{where}; full-depth {options.family} UNet, {size} pixels", found)
        rows += found
    if options.json:
        options.json.write_text(json.dumps({"machine": where, "rows": rows}, indent=1))
