"""LAR-Gen's Refine, written out in the host's own UNet. The reference branch is the base model itself, training-free,
or, as released, a trained network of its plan.

    noise         N_p = randn(z's shape), from the run's seed, sigma and p; p: the positive or the negative prompt
    reference     X_p = (z + sigma N_p) / sqrt(sigma^2 + 1), and after it [0, z] for a branch of 9 channels
    stored        m = norm1(x) of each transformer block in the output blocks, of the branch on X_p with
                  the row's timestep, text and y; no ControlNet, no patches
      trained     a branch of 4 channels, with the subject's context c_s for the text, and
                  [pooled ; the rest of y] for y if there is a pooled text of the null prompt
    in the block  n = norm1(x) of the UNet's own row
                  without = A(n, n);  with = A(n, [n ; m]);  m of the branch's block in the same place
                  to_out(without + strength w (with - without))

A(n, c) = softmax(to_q(n) to_k(c)^T / sqrt(d)) to_v(c) per head, in the block by the UNet's own weights whatever the
branch. [n ; m] is along the tokens; of several views of one subject m is all of theirs. c_s is each view's own, the same
for both prompts. w is how much a pixel reads the subject, 1 unless a region is given.

Every row has its own reference, a view at a time. It runs in the dtype of the UNet's weights, float64 in a `Scene`
unless told otherwise. Strength 0 is the host's own sampling; for SD2 to about 5e-6 only, where the host computes the
scores in float32 whatever the dtype.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from devtools.pack import ensure_host

from .scene import Scene

ensure_host()

from comfy.ldm.modules.attention import BasicTransformerBlock, CrossAttention  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402

ROLES = ("positive", "negative")
"""By what the host calls them in `cond_or_uncond`, 0 and 1."""

Region = Callable[[tuple[int, int]], torch.Tensor]
"""(height, width) of a grid of pixels -> how much each reads the subject, [B, height * width]."""


@dataclass(frozen=True)
class Branch:
    """A trained reference network, for S pictures of subjects."""

    unet: UNetModel
    """Of the plan and the dtype of the UNet that reads it, with weights of its own and always 4 channels."""
    context: torch.Tensor
    """[S, T, C]: what its cross-attentions read of each picture, for the positive and the negative prompt."""
    pooled: torch.Tensor | None = None
    """[1, P], in place of the first P columns of a row's y."""

    def __post_init__(self) -> None:
        assert self.unet.in_channels == 4


def reference_noise(seed: int, sigma: float, role: str, shape: Sequence[int]) -> torch.Tensor:
    """The reference's noise, float32, at a noise level for a role: of nothing else than these and the run's seed."""
    digest = hashlib.sha256(f"{seed} {sigma!r} {role}".encode("ascii")).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big"))
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)


def reference_input(z: torch.Tensor, sigma: float, role: str, seed: int, channels: int) -> torch.Tensor:
    """The branch's input [S, channels, h', w'], float64, for the subject's latents z [S, 4, h', w'] at a noise level."""
    z = z.double()
    noisy = (z + sigma * reference_noise(seed, sigma, role, z.shape).double()) / (sigma**2 + 1.0) ** 0.5
    if channels == 4:
        return noisy
    assert channels == 9
    return torch.cat([noisy, torch.zeros_like(z[:, :1]), z], dim=1)


@contextmanager
def refined_literally(
    scene: Scene,
    z: torch.Tensor,
    is_one: bool,
    *,
    strength: float = 1.0,
    seed: int = 0,
    region: Region | None = None,
    branch: Branch | None = None,
) -> Iterator[None]:
    """Within, `scene.host` samples with the subject z [S, 4, h', w'], in the model's scale, written into its UNet.

    `is_one`: the S pictures are views of one subject. Otherwise there is a subject for each picture, or one for all.
    Without a `branch` the model's own UNet is the branch.
    """
    batch = len(scene.hole)
    assert is_one or len(z) in (1, batch)
    assert branch is None or len(branch.context) == len(z)
    unet = scene.model.diffusion_model
    reference = unet if branch is None else branch.unet
    # The UNet's, and the branch's in the same places.
    attentions, sources = ([block.attn1 for block in _output_blocks(of)] for of in (unet, reference))
    forward_of_unet, forward_of_reference = unet._forward, reference._forward

    stored: dict[CrossAttention, list[torch.Tensor]] | None = None
    """For each row of the call the tokens [T, C] of its subject; None while there is no main pass."""
    gathered: dict[CrossAttention, torch.Tensor] = {}
    """The tokens [T, C] of the reference pass that is running or was the last, by the branch's attentions."""
    read: set[CrossAttention] = set()
    """The attentions of this main pass that have read the subject."""

    def views_of(picture: int) -> range:
        if is_one:
            return range(len(z))
        subject = picture if len(z) > 1 else 0
        return range(subject, subject + 1)

    def read_by_branch(
        view: slice, context: torch.Tensor, y: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The context and y of a row's reference [1, .], of the row's own."""
        if branch is None:
            return context, y
        context = branch.context[view].to(context.dtype)
        if branch.pooled is None:
            return context, y
        assert y is not None and len(branch.pooled) == 1
        return context, torch.cat([branch.pooled.to(y.dtype), y[:, branch.pooled.shape[1] :]], dim=1)

    def unet_forward(
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        y: torch.Tensor | None,
        control: Any,
        transformer_options: dict[str, Any],
        **others: Any,
    ) -> torch.Tensor:
        nonlocal stored
        groups = transformer_options["cond_or_uncond"]
        sigma = _common_sigma(transformer_options)
        assert len(x) == batch * len(groups)

        rows: dict[CrossAttention, list[torch.Tensor]] = {attention: [] for attention in attentions}
        for row in range(len(x)):
            group, picture = divmod(row, batch)
            seen = reference_input(z, sigma, ROLES[groups[group]], seed, reference.in_channels).to(x.dtype)
            own = slice(row, row + 1)
            of_views: dict[CrossAttention, list[torch.Tensor]] = {attention: [] for attention in attentions}
            for number in views_of(picture):
                gathered.clear()
                view = slice(number, number + 1)
                text, vector = read_by_branch(view, context[own], None if y is None else y[own])
                # Options of its own: the host writes into them, and the run's hold other methods' patches.
                forward_of_reference(
                    seen[view],
                    timesteps[own],
                    context=text,
                    y=vector,
                    control=None,
                    transformer_options={},
                )
                for attention, source in zip(attentions, sources, strict=True):
                    of_views[attention].append(gathered[source])
            for attention in attentions:
                rows[attention].append(torch.cat(of_views[attention]))

        stored = rows
        read.clear()
        try:
            output = forward_of_unet(x, timesteps, context, y, control, transformer_options, **others)
        finally:
            stored = None
        # Where someone replaces a block's self-attention, the host does not call ours.
        assert read == set(attentions)
        return output

    def attention_forward(attention: CrossAttention) -> Callable[..., torch.Tensor]:
        def without_the_subject(n: torch.Tensor) -> torch.Tensor:
            assert len(n) == 1
            gathered[attention] = n[0].clone()
            return attention.to_out(_attend(attention, n[0], n[0])[None])

        def with_the_subject(n: torch.Tensor, tokens: list[torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
            assert len(n) == len(tokens) and n.shape[1] == grid[0] * grid[1]
            weights = torch.ones(batch, n.shape[1]) if region is None else region(grid)
            assert weights.shape == (batch, n.shape[1])
            weights = weights.to(n.dtype)
            found = []
            for row, subject in enumerate(tokens):
                own = _attend(attention, n[row], n[row])
                both = _attend(attention, n[row], torch.cat([n[row], subject]))
                found.append(own + strength * weights[row % batch][:, None] * (both - own))
            read.add(attention)
            return attention.to_out(torch.stack(found))

        def written_out(
            n: torch.Tensor,
            context: torch.Tensor | None = None,
            value: torch.Tensor | None = None,
            mask: torch.Tensor | None = None,
            transformer_options: dict[str, Any] | None = None,
        ) -> torch.Tensor:
            # Someone's patch of the keys and values, which the formula says nothing of.
            assert context is None and value is None and mask is None
            if stored is None:
                return without_the_subject(n)
            assert transformer_options is not None
            _, _, height, width = transformer_options["activations_shape"]
            return with_the_subject(n, stored[attention], (height, width))

        return written_out

    with ExitStack() as replaced:
        # Once each, where the branch's are the UNet's own.
        for attention in dict.fromkeys([*attentions, *sources]):
            replaced.enter_context(_replaced(attention, "forward", attention_forward(attention)))
        replaced.enter_context(_replaced(unet, "_forward", unet_forward))
        yield


def _attend(attention: CrossAttention, n: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """A(n, c) [N, heads * d] for a row's n [N, C] and c [M, C]."""
    query, key, value = attention.to_q(n), attention.to_k(context), attention.to_v(context)
    found = []
    for head in range(attention.heads):
        here = slice(head * attention.dim_head, (head + 1) * attention.dim_head)
        scores = query[:, here] @ key[:, here].T * attention.dim_head**-0.5
        found.append(scores.softmax(dim=-1) @ value[:, here])
    return torch.cat(found, dim=-1)


def _output_blocks(unet: torch.nn.Module) -> list[BasicTransformerBlock]:
    """The transformer blocks in the output blocks, whose first attention is a self-attention."""
    blocks = [module for module in unet.output_blocks.modules() if isinstance(module, BasicTransformerBlock)]
    assert blocks and not any(block.disable_self_attn for block in blocks)
    return blocks


def _common_sigma(transformer_options: dict[str, Any]) -> float:
    sigmas = transformer_options["sigmas"]
    assert sigmas.dtype == torch.float32 and bool((sigmas == sigmas[0]).all())
    return float(sigmas[0])


@contextmanager
def _replaced(module: torch.nn.Module, name: str, function: Callable[..., torch.Tensor]) -> Iterator[None]:
    """The module with a function of the instance's own instead of its class's, or instead of the one that it had."""
    had = vars(module).get(name)
    vars(module)[name] = function
    try:
        yield
    finally:
        if had is None:
            del vars(module)[name]
        else:
            vars(module)[name] = had
