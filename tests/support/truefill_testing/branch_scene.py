"""A small model with a control branch: by the node's method, and by the host with the oracle as its UNet's forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from devtools.pack import load_pack, pack_module

from .branch_files import SMALL, Layout, random_branch, small_heads
from .literal_branch import branch_input, branch_outputs, injected_base
from .scene import Scene, boxes

load_pack()
branch = pack_module("model_patches.painternet.branch")
network = pack_module("model_patches.painternet.network")
readers = pack_module("weights.painternet")

HOLE = boxes((128, 104), (slice(20, 75), slice(30, 104)), (slice(24, 128), slice(32, 61)))
"""In pixels, for the scene's two pictures of 16x13 cells."""


class MeanVae:
    """In the place of a VAE: each cell is what its pixels are on average, in four mixtures."""

    latent_channels = 4
    mixture = torch.tensor([[1.0, 0.2, -0.4], [0.1, -1.0, 0.3], [0.6, 0.6, 0.6], [-0.3, 0.5, 1.0]])

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        planes = (2.0 * pixels[..., :3] - 1.0).movedim(-1, 1).float()
        return 5.0 * torch.einsum("lc,bchw->blhw", self.mixture, torch.nn.functional.avg_pool2d(planes, 8))


def picture(seed: int = 51, size: tuple[int, int] = (128, 104), count: int = 2) -> torch.Tensor:
    """[count, *size, 3] in [0, 1]."""
    return torch.rand(count, *size, 3, generator=torch.Generator().manual_seed(seed))


@dataclass(eq=False)
class SmallBranch:
    """A random branch for `small_models`."""

    family: str
    layout: Layout | None = None
    seed: int = 61

    def __post_init__(self) -> None:
        self.layout = self.layout or SMALL[self.family]
        self.state = random_branch(self.layout, self.seed)
        weights = readers.branch_weights(self.state, "a test's branch", 16)
        if self.family == "sd15":
            weights = replace(weights, plan=replace(weights.plan, heads=4, head_channels=None))
        self.weights = weights
        self.model = network.branch_model(weights)

    def settings(self, **changes: Any) -> Any:
        """The method's."""
        given = {"network": self.model, "kind": self.weights.kind, "vae": MeanVae(), "picture": picture(), "mask": HOLE}
        return branch.Branch(**{**given, **changes})

    def on(self, model: Any, **changes: Any) -> Any:
        """A model with the branch on it."""
        return branch.with_branch(model, self.settings(**changes))

    def literal(
        self, x: torch.Tensor, timesteps: Any, context: Any, y: Any
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Of its input [rows, 9, h, w]."""
        return branch_outputs(self.state, x, timesteps, context, y, lambda channels: small_heads(self.family, channels))


@contextmanager
def branched_literally(
    scene: Scene, small: SmallBranch, layer_scale: float = 1.0, attention_scale: float = 1.0
) -> Iterator[None]:
    """Within, the scene's UNet is the oracle's, which reads the branch's own picture and hole, and the UNet's prompts."""
    unet = scene.model.diffusion_model
    forward = unet._forward
    shown = torch.where(HOLE[:, 0, :, :, None] > 0, 0.0, picture())
    known = MeanVae().encode(shown) * scene.scale

    def literally(x: Any, timesteps: Any = None, context: Any = None, y: Any = None, *rest: Any, **more: Any) -> Any:
        times = len(x) // len(HOLE)
        seen = branch_input(x[:, :4], known.repeat(times, 1, 1, 1), HOLE.repeat(times, 1, 1, 1))
        layers, attentions = small.literal(seen, timesteps, context, y)
        made = injected_base(unet, x, timesteps, context, y, layers, attentions, layer_scale, attention_scale)
        return made.to(x)

    unet._forward = literally
    try:
        yield
    finally:
        unet._forward = forward
