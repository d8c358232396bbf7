"""A picture becomes what the tuning reads: its size, its masks, and what an inpainting model may see."""

from __future__ import annotations

import pytest
import torch

from devtools.pack import load_pack, pack_module

load_pack()
examples = pack_module("training.subject_lora.examples")

pytestmark = pytest.mark.quick


class FirstColor:
    """A VAE whose latent is the mean of the red of each cell of 8 pixels."""

    def encode(self, picture: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(picture[None, ..., 0], 8).movedim(1, 0)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((512, 512), (512, 512)), ((1000, 2000), (384, 704)), ((90, 60), (640, 448)), ((8, 900), (64, 5440))],
)
def test_about_the_native_area_in_the_pictures_shape(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert examples.training_size(*size, 512) == expected


@pytest.mark.parametrize("inpainting", [True, False])
def test_a_picture_with_its_masks(inpainting: bool) -> None:
    picture = torch.rand(256, 192, 4, generator=torch.Generator().manual_seed(1))
    subject = torch.zeros(64, 48)
    subject[16:40, 10:30] = 1.0
    prompts = [object()]
    made = examples.encode_example(picture, subject, prompts, FirstColor(), 256, 3, 5, inpainting)
    height, width = examples.training_size(256, 192, 256)
    assert made.latent.shape == (1, 1, height // 8, width // 8) and made.prompts is prompts
    assert made.masks.shape == (3, 1, height // 8, width // 8)
    assert 0.0 <= float(made.masks.min()) and float(made.masks.max()) == 1.0
    # The subject's middle is in all of them, a corner in none.
    middle = (int(28 / 64 * height / 8), int(20 / 48 * width / 8))
    assert bool((made.masks[:, 0, middle[0], middle[1]] == 1).all())
    assert not made.masks[:, 0, 0, 0].any()
    assert len(made.concat) == (3 if inpainting else 0)
    for own, coarse in zip(made.concat, made.masks, strict=False):
        mask, seen = own["concat_mask"], own["concat_latent_image"]
        assert mask.shape == (1, height, width) and set(mask.unique().tolist()) == {0.0, 1.0}
        hidden, known = coarse[0] == 1, coarse[0] == 0
        # Nothing of what is in the mask is seen, and all that is not.
        assert torch.allclose(seen[0, 0][hidden], torch.tensor(0.5))
        assert torch.equal(seen[0, 0][known], made.latent[0, 0][known])
    again = examples.encode_example(picture, subject, prompts, FirstColor(), 256, 3, 5, inpainting)
    other = examples.encode_example(picture, subject, prompts, FirstColor(), 256, 3, 6, inpainting)
    assert torch.equal(again.masks, made.masks) and not torch.equal(other.masks, made.masks)


def test_a_black_mask_gets_one_sentence() -> None:
    with pytest.raises(ValueError, match="subject") as failed:
        examples.encode_example(torch.rand(64, 64, 3), torch.zeros(64, 64), [], FirstColor(), 64, 1, 0, False)
    assert "\n" not in str(failed.value)
