"""LAR-Gen (arXiv 2403.19534): inpainting by text and by the picture of a subject."""
