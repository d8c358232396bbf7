"""Joins the demo's input, mask and result into one picture and compares the known pixels.

    python picture.py INPUT MASK RESULT OUT

Runs inside the environment. Ends with code 3 where a pixel outside of the mask, and not next to it, has changed.
"""

import sys

import numpy as np
from PIL import Image, ImageFilter

GAP = 8


def main(input_path: str, mask_path: str, result_path: str, out_path: str) -> int:
    """Write the picture; returns the exit code."""
    image, mask, result = (np.asarray(Image.open(path).convert("RGB")) for path in (input_path, mask_path, result_path))
    if not image.shape == mask.shape == result.shape:
        print(f"The sizes differ: input {image.shape}, mask {mask.shape}, result {result.shape}.")
        return 3
    gap = np.full((image.shape[0], GAP, 3), 255, np.uint8)
    Image.fromarray(np.concatenate([image, gap, mask, gap, result], axis=1)).save(out_path)
    # A scaled mask fades out over a cell; in 8 bits the last of it is 0 although it counts.
    touched = Image.fromarray(mask.max(axis=2)).filter(ImageFilter.MaxFilter(3))
    known = np.asarray(touched) == 0
    changed = int((known & (image != result).any(axis=2)).sum())
    if changed:
        print(f"{changed} of {int(known.sum())} known pixels (mask 0) have changed.")
        return 3
    print(f"All {int(known.sum())} known pixels (mask 0) came back bit-identical.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
