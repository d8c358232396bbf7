"""HD-Painter (arXiv 2312.14091): PAIntA, RASG, and inpainting-specialised super-resolution."""
