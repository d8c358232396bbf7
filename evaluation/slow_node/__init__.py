"""A pack for tests and benchmarks: a node that takes its time and no processor."""

import time


class Slow:
    """Hands a picture on after so many seconds; another seed is another picture to the host."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "wait", "testing"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",), "seconds": ("FLOAT",), "seed": ("INT",)}}

    def wait(self, image, seconds, seed):
        time.sleep(seconds)
        return (image,)


NODE_CLASS_MAPPINGS = {"TestingSlow": Slow}
