"""How much memory something takes."""

from __future__ import annotations

import ctypes
import platform
import threading

import torch


class PeakMemory:
    """Growth of memory during a `with` block: of the CUDA allocator, or of this process's resident memory (polled)."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        import psutil

        if platform.system() == "Linux":
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.bytes = max(self.bytes, self._process.memory_info().rss - self._before)

    def __exit__(self, *exception: object) -> None:
        if self._cuda:
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self._before
        else:
            self._done.set()
            self._watcher.join()
