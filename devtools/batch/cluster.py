"""Dask, as far as a batch needs it: threads in this process, or a cluster that is there and knows nothing of this checkout."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .. import client as client_module
from ..paths import UserError
from . import checkout, inputs, work


class Cluster:
    """Runs functions of `work` and `checkout` on workers."""

    def __init__(self, client: Any, elsewhere: bool) -> None:
        self._client, self._elsewhere = client, elsewhere

    def submit(self, function: Callable[..., Any], *arguments: Any, worker: str | None = None) -> Any:
        """A future of the function's result, on this worker or on any."""
        call = self._sent(function, *arguments)
        return self._client.submit(*call, pure=False, workers=None if worker is None else [worker])

    def of_each(self, function: Callable[[], Any]) -> dict[str, Any]:
        """The function's result by worker."""
        return self._client.run(*self._sent(function))

    def workers(self) -> set[str]:
        """Those that are there."""
        return set(self._client.nthreads())

    def threads(self) -> int:
        """How many calls its workers can do at once, as far as they have come."""
        return sum(self._client.nthreads().values())

    def call(self, function: Callable[..., Any], *arguments: Any, worker: str | None = None) -> Any:
        """The function's result, without waiting for what the worker has to do besides; from here, where that is None."""
        if worker is None:
            return function(*arguments)
        return self._client.run(*self._sent(function, *arguments), workers=[worker])[worker]

    def result(self, future: Any, seconds: float) -> Any:
        """What a call that has ended gave; None where that can't be had in time."""
        # Which is not the built-in one before Python 3.11.
        with contextlib.suppress(asyncio.TimeoutError):
            return future.result(timeout=seconds)
        return None

    def wait(self, futures: Iterable[Any], seconds: float) -> None:
        """Until one has ended, or so long."""
        from distributed import wait

        with contextlib.suppress(asyncio.TimeoutError):
            wait(list(futures), timeout=seconds, return_when="FIRST_COMPLETED")

    def _sent(self, function: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
        if not self._elsewhere:
            return (function, *arguments)
        import cloudpickle

        # By name the worker would not find it. A lambda goes by value, and what is in the bytes is not looked at on the way.
        packed = cloudpickle.dumps(functools.partial(function, *arguments))
        return (lambda sent: __import__("cloudpickle").loads(sent)(), packed)


@contextlib.contextmanager
def open_cluster(scheduler: str | None, threads: int, timeout: float) -> Iterator[Cluster]:
    """Workers: of the scheduler at an address, or so many threads. Raises UserError without Dask, or a scheduler there."""
    try:
        import cloudpickle
        import distributed
    except ImportError:
        raise UserError('A batch needs Dask, which is not installed: pip install "distributed".') from None
    logging.getLogger("distributed").setLevel(logging.ERROR)
    # An interrupt while Dask waits makes it stumble there, and nothing comes of it.
    logging.getLogger("tornado.application").setLevel(logging.CRITICAL)
    with contextlib.ExitStack() as stack:
        if scheduler is None:
            # Its pages can't be left out; else they would be open to the network.
            pages: dict[str, Any] = {"dashboard_address": "127.0.0.1:0", "worker_dashboard_address": "127.0.0.1:0"}
            own = distributed.LocalCluster(processes=False, n_workers=1, threads_per_worker=threads, **pages)
            client = distributed.Client(stack.enter_context(own))
        else:
            for module in (work, client_module, inputs, checkout):
                cloudpickle.register_pickle_by_value(module)
                stack.callback(cloudpickle.unregister_pickle_by_value, module)
            try:
                client = distributed.Client(scheduler, timeout=timeout)
            except (OSError, TimeoutError, ValueError) as error:
                raise UserError(f"There is no Dask scheduler at {scheduler}: {error}.") from error
        yield Cluster(stack.enter_context(client), elsewhere=scheduler is not None)
