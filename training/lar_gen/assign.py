"""LAR-Gen's first stage: the main UNet learns to read a subject's tokens in every cross-attention, beside the text.

The main UNet, the resampler and the projections to_k_ip and to_v_ip are trained, at beta = 1; LAR-Gen takes its resampler from
IP-Adapter, which this world has none of. Text and subject are dropped independently. The hole counts more than what is known, of
which there is more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import nn

from ...model_patches.core.unet_attention import Place, transformer_places
from ...model_patches.lar_gen.resampler import Resampler
from ...weights.demo_model import CONTEXT_DIM
from ...weights.demo_subject import VISION_CONFIG
from ..demo.networks import TextEncoder, attention_options, initialise, plain_attention
from ..demo.vocabulary import Vocabulary
from ..diffusion import noise_loss
from ..loop import Batch, Task, step_seed
from .quadruples import Encoded

BETA = 1.0
TEXT_DROPPED, SUBJECT_DROPPED = 0.1, 0.1
"""How often; LAR-Gen drops both, and does not say how often."""
_HOLE_WEIGHT = 4.0
QUERIES, DEPTH = 16, 2
Replace = Callable[..., torch.Tensor]


def new_resampler(seed: int) -> Resampler:
    """A resampler with fresh weights, of ViT-H's kind and the world's sizes."""
    resampler = Resampler(
        features=VISION_CONFIG["hidden_size"],
        width=CONTEXT_DIM,
        output=CONTEXT_DIM,
        queries=QUERIES,
        depth=DEPTH,
        hidden=2 * CONTEXT_DIM,
        inner=CONTEXT_DIM,
    )
    initialise(resampler, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    # A UNet's layer of that name begins at zero; a norm follows on this one.
    for weight in (resampler.latents, resampler.proj_out.weight):
        nn.init.normal_(weight, std=CONTEXT_DIM**-0.5, generator=generator)
    return resampler


class SubjectUNet(nn.Module):
    """A UNet that reads a subject: itself, a resampler, and to_k_ip and to_v_ip of each cross-attention.

    The projections begin as the text's, as IP-Adapter's do.
    """

    def __init__(self, unet: UNetModel, seed: int) -> None:
        super().__init__()
        self.unet = unet
        self.resampler = new_resampler(seed)
        self.projections = nn.ModuleDict()
        for t in transformer_places(unet):
            pair = nn.ModuleDict({"k": _copied(t.cross.to_k), "v": _copied(t.cross.to_v)})
            self.projections[place_name(t.place)] = pair

    def forward(
        self,
        x: torch.Tensor,
        times: torch.Tensor,
        context: torch.Tensor,
        tokens: torch.Tensor,
        beta: float,
        stored: Mapping[Place, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The noise [B, 4, h, w] for an input [B, 9, h, w]; `tokens` [B, n, 192] are the resampler's.

        `stored` are a reference network's features, which the decoder's self-attentions read besides their own.
        """
        places = [t.place for t in transformer_places(self.unet)]
        options: dict[str, Any] = {
            "patches_replace": {"attn2": {place: self._replacement(place, tokens, beta) for place in places}},
            **attention_options(x.device),
        }
        if stored is not None:
            options["patches"] = {"attn1_patch": [_appending(stored)]}
        return self.unet(x, times, context, transformer_options=options)

    def _replacement(self, place: Place, tokens: torch.Tensor, beta: float) -> Replace:
        pair = self.projections[place_name(place)]
        assert isinstance(pair, nn.ModuleDict)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any], **_: Any) -> torch.Tensor:
            heads = extra["n_heads"]
            read = plain_attention(q, pair["k"](tokens), pair["v"](tokens), heads)
            return plain_attention(q, k, v, heads) + beta * read

        return attend


def _copied(layer: nn.Linear) -> nn.Linear:
    made = nn.Linear(layer.in_features, layer.out_features, bias=False)
    with torch.no_grad():
        made.weight.copy_(layer.weight)
    return made


def _appending(stored: Mapping[Place, torch.Tensor]) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    def append(
        n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, extra: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        more = stored.get((*extra["block"], extra["block_index"]))
        if more is None:
            return n, context, value
        both = torch.cat((context, more), dim=1)
        return n, both, both

    return append


_BLOCKS = {"input": "input_blocks.{}", "middle": "middle_block", "output": "output_blocks.{}"}


def block_name(name: str) -> str:
    """What the host's UNet calls the cross-attention of a place, as `place_name` has it."""
    kind, index, depth = name.split("_")
    return f"{_BLOCKS[kind].format(index)}.1.transformer_blocks.{depth}.attn2"


def place_name(place: Place) -> str:
    """A place as the name of a module."""
    return "_".join(map(str, place))


class Data(NamedTuple):
    """Encoded quadruples of the splits "train" and "dev", and what stays as it is.

    `nothing` [65, 160] is what CLIP's last but one layer says of an all-zero picture.
    """

    train: Encoded
    dev: Encoded
    nothing: torch.Tensor
    text: TextEncoder
    vocabulary: Vocabulary


class SubjectTask(Task):
    """A task over encoded quadruples."""

    beta: float

    def __init__(self, data: Data) -> None:
        self._train, self._dev, self._nothing = data.train, data.dev, data.nothing
        # Few prompts differ, and the text encoder stays as it is.
        prompts = sorted({"", *data.train.prompt.tolist(), *data.dev.prompt.tolist()})
        self._places = {prompt: place for place, prompt in enumerate(prompts)}
        with torch.no_grad():
            self._contexts = torch.cat([data.text(data.vocabulary.batch([of], unknown=True)) for of in prompts])

    def _batch(self, of: Encoded, indices: np.ndarray, text: np.ndarray, subject: np.ndarray) -> Batch:
        """`text` and `subject` [B] say whether these are dropped."""
        chosen = torch.from_numpy(indices)
        prompts = ["" if drop else of.prompt[index] for index, drop in zip(indices, text, strict=True)]
        own = torch.where(torch.from_numpy(subject)[:, None, None], self._nothing, of.own[chosen])
        return {
            "latents": of.clean[chosen].float(),
            "hole": of.hole[chosen].float(),
            "known": torch.cat([of.hole[chosen], of.masked[chosen]], dim=1).float(),
            "context": self._contexts[[self._places[prompt] for prompt in prompts]],
            "own": own.float(),
            "subject": of.subject[chosen].float(),
            "details": of.details[chosen].float(),
        }

    def batch(self, seed: int, step: int, size: int) -> Batch:
        rng = np.random.default_rng(step_seed(seed, step))
        indices = rng.integers(len(self._train.clean), size=size)
        dropped = (rng.random(size) < share for share in (TEXT_DROPPED, SUBJECT_DROPPED))
        return self._batch(self._train, indices, *dropped)

    def _noise_loss(
        self, batch: Batch, generator: torch.Generator, predict: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        weight = 1.0 + (_HOLE_WEIGHT - 1.0) * batch["hole"]
        return noise_loss(predict, batch["latents"], generator, weight)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The error over the quadruples of the development split: with its own subject, and with that of another one."""
        device = next(self.networks.parameters()).device
        indices = np.arange(len(self._dev.clean))
        nobody = np.zeros(len(indices), dtype=bool)
        batch = self._batch(self._dev, indices, nobody, nobody)
        others = {name: batch[name].roll(1, 0) for name in ("own", "subject", "details")}
        figures = {}
        for name, whole in (("dev_loss", batch), ("dev_loss_of_another_subject", {**batch, **others})):
            generator = torch.Generator().manual_seed(0)
            losses = []
            for first in range(0, len(indices), 32):
                part = {key: tensor[first : first + 32].to(device) for key, tensor in whole.items()}
                losses.append(float(self.losses(part, generator)["noise"]))
            figures[name] = float(np.mean(losses))
        return figures


class AssignTask(SubjectTask):
    """Trains the main UNet (`unet`, with 9 input channels), the resampler and the projections."""

    name = "subject-assign"

    def __init__(self, data: Data, unet: UNetModel, seed: int) -> None:
        super().__init__(data)
        self.main = SubjectUNet(unet, seed)
        self.networks = nn.ModuleDict({"main": self.main})

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        tokens = self.main.resampler(batch["own"])

        def predict(x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
            return self.main(torch.cat([x, batch["known"]], dim=1), times, batch["context"], tokens, BETA)

        noise = self._noise_loss(batch, generator, predict)
        return {"loss": noise, "noise": noise}
