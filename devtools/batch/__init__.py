"""Many rows of pictures, masks and prompts through one graph, on one or many ComfyUI servers: `python dev.py batch`."""
