"""Joins the demo's pictures into one and compares the known pixels.

    python picture.py OUT SCENE MASK RESULT [RESULT ...]

Runs inside the environment. Ends with code 3 where a pixel outside of the mask, and not next to it, differs from the scene's.
"""

import sys

import numpy as np
from PIL import Image, ImageFilter

GAP = 8


def main(out_path: str, *paths: str) -> int:
    """Write the picture; returns the exit code."""
    scene, mask, *results = pictures = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    if any(picture.shape != scene.shape for picture in pictures):
        print(f"The sizes differ: {', '.join(str(picture.shape) for picture in pictures)}.")
        return 3
    gap = np.full((scene.shape[0], GAP, 3), 255, np.uint8)
    Image.fromarray(np.concatenate([part for picture in pictures for part in (picture, gap)][:-1], axis=1)).save(
        out_path
    )
    # A scaled mask fades out over a cell; in 8 bits the last of it is 0 although it counts.
    touched = Image.fromarray(mask.max(axis=2)).filter(ImageFilter.MaxFilter(3))
    known = np.asarray(touched) == 0
    changed = max(int((known & (scene != result).any(axis=2)).sum()) for result in results)
    if changed:
        print(f"{changed} of {int(known.sum())} known pixels (mask 0) have changed.")
        return 3
    print(f"All {int(known.sum())} known pixels (mask 0) came back bit-identical.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
