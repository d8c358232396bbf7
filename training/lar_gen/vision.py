"""The world's CLIP vision model: says which pictures show the same subject, and what shape it has.

LAR-Gen takes CLIP as it is. Nobody has trained one on this world, so it is trained here before, as CLIP is, by contrast: two
views of a subject belong together, and those of all others in the batch do not. Some of these have the same tones and the same
shape, or tones alone would tell all apart. The shape is also asked for, since a text would say it.
"""

from __future__ import annotations

import comfy.ops
import numpy as np
import torch
import torch.nn.functional as F
from comfy.clip_model import CLIPLayer, CLIPVisionModelProjection
from torch import nn

from ...imaging.subject import cut_out, for_clip
from ...weights.demo_subject import VISION_CONFIG
from ..demo.latents import as_pixels
from ..demo.networks import initialise, plain_attention
from ..loop import Batch, Task, step_seed
from ..world.attributes import SHAPES
from ..world.subjects import make_portrait
from .contrast import SUBJECTS, alike_looks, contrast_loss, share_found

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_DEV_SUBJECTS = 512


class Vision(nn.Module):
    """The host's CLIP vision model with fresh weights, in float32 on the CPU."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        operations = comfy.ops.disable_weight_init
        self.model = CLIPVisionModelProjection(VISION_CONFIG, torch.float32, "cpu", operations)
        initialise(self, seed)
        # Where a patch is has to be heard beside what it shows.
        generator = torch.Generator().manual_seed(seed + 1)
        embeddings = self.model.vision_model.embeddings
        for table in (embeddings.class_embedding, embeddings.position_embedding.weight):
            assert isinstance(table, torch.Tensor)
            nn.init.normal_(table, std=0.3, generator=generator)
        self.requires_grad_(True)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `states`, for pixels [B, 3, 224, 224] in [0, 1]."""
        return self.states(normalized(pixels))

    def states(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The last but one layer's states [B, 65, 160], the last one's before the norm, and the projection [B, 128].

        `pixels` are [B, 3, 224, 224], normalized. The host's own forward adds in place, which autograd does not allow.
        """
        inner = self.model.vision_model
        x = own = inner.pre_layrnorm(inner.embeddings(pixels))
        for layer in inner.encoder.layers:
            assert isinstance(layer, CLIPLayer)
            own = x
            x = x + layer.self_attn(layer.layer_norm1(x), None, plain_attention)
            x = x + layer.mlp(layer.layer_norm2(x))
        return own, x, self.model.visual_projection(inner.post_layernorm(x[:, 0]))


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [B, 3, H, W] in [0, 1] as CLIP wants them, and as the host's class of it makes them."""
    mean, std = (pixels.new_tensor(of)[:, None, None] for of in (_MEAN, _STD))
    return (pixels - mean) / std


def subject_of(picture: np.ndarray, mask: np.ndarray) -> torch.Tensor:
    """A picture's subject on white, as Encode Subject cuts it out: [h, w, 3] in [0, 1].

    `picture` is uint8 [H, W, 3], `mask` bool [H, W].
    """
    (subject,) = cut_out(as_pixels(picture[None]).movedim(1, -1), torch.from_numpy(mask).float()[None])
    return subject


def clip_pixels(picture: np.ndarray, mask: np.ndarray) -> torch.Tensor:
    """The same as CLIP sees it: [3, 224, 224] in [0, 1], in steps of 1 / 255 as the host makes them."""
    return ((255.0 * for_clip(subject_of(picture, mask))).round() / 255.0).movedim(-1, 0)


class VisionTask(Task):
    """Trains a Vision on pairs of portraits; `batch` is the number of pairs."""

    name = "subject-vision"

    def __init__(self, seed: int) -> None:
        self.vision = Vision(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 2)
            self._shape = nn.Linear(VISION_CONFIG["projection_dim"], len(SHAPES))
        self.networks = nn.ModuleDict({"vision": self.vision, "shape": self._shape})

    def batch(self, seed: int, step: int, size: int) -> Batch:
        rng = np.random.default_rng(step_seed(seed, step))
        return pairs("train", rng.choice(SUBJECTS, size, replace=False), rng)

    def losses(self, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        *_, seen = self.vision(batch["pixels"].flatten(0, 1))
        contrast = contrast_loss(seen.unflatten(0, (2, -1)))
        shape = F.cross_entropy(self._shape(seen).float(), batch["shape"].repeat(2))
        return {"loss": contrast + shape, "contrast": contrast, "shape": shape}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """How often a view's other view is the likest of 512, and how often the shape is right, on the split "dev"."""
        device = next(self.networks.parameters()).device
        batch = pairs("dev", np.arange(_DEV_SUBJECTS), np.random.default_rng(0))
        *_, seen = self.vision(batch["pixels"].flatten(0, 1).to(device))
        right = self._shape(seen).argmax(dim=1).cpu() == batch["shape"].repeat(2)
        return {"found": share_found(seen.unflatten(0, (2, -1))), "shape": float(right.float().mean())}


def pairs(split: str, numbers: np.ndarray, rng: np.random.Generator) -> Batch:
    """Two views of each subject: pixels [2, B, 3, 224, 224], and the index of its shape [B]."""
    looks = alike_looks(split, numbers)
    views = [torch.stack([clip_pixels(*make_portrait(look, rng)) for look in looks]) for _ in range(2)]
    return {"pixels": torch.stack(views), "shape": torch.tensor([SHAPES.index(look.shape) for look in looks])}
