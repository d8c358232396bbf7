"""PILOT (arXiv 2407.08019): inpainting by optimising the latent, and its semantic boundary control."""
