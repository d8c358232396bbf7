"""A client of a running ComfyUI: queue a graph, follow its progress, fetch its pictures."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

Graph = dict[str, Any]


class ServerGone(Exception):
    """ComfyUI does not answer (any more)."""


class GraphRejected(Exception):
    """ComfyUI refused the graph; `node_errors` is its answer per node id."""

    def __init__(self, message: str, node_errors: dict[str, Any]) -> None:
        super().__init__(message)
        self.node_errors = node_errors


class GraphFailed(Exception):
    """A node raised an exception while the graph ran."""

    def __init__(self, node_id: str, node_type: str, exception_type: str, message: str, traceback: str = "") -> None:
        super().__init__(f"Node {node_id} ({node_type}) failed with {exception_type}: {message.strip()}")
        self.node_id = node_id
        self.node_type = node_type
        self.exception_type = exception_type
        self.message = message
        self.traceback = traceback


class GraphInterrupted(Exception):
    """The run was stopped by an interrupt."""


@dataclass(frozen=True)
class Progress:
    """One step of one node; value 0 of 0 says that the node has started."""

    node_id: str
    node_type: str
    value: int = 0
    maximum: int = 0


@dataclass
class Result:
    """What a finished graph left: pictures per node id, and the server's messages as it sent them."""

    images: dict[str, list[bytes]]
    status: str
    seconds: float
    prompt_id: str
    outputs: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(default_factory=list)


def _describe_rejection(answer: dict[str, Any]) -> str:
    """One sentence from a /prompt answer with errors."""
    parts = []
    for node_id, node in answer.get("node_errors", {}).items():
        details = "; ".join(
            f"{error['message']} ({error['details']})" if error.get("details") else error["message"]
            for error in node["errors"]
        )
        parts.append(f"node {node_id} ({node['class_type']}): {details}")
    if not parts:
        error = answer.get("error", "unknown error")
        parts.append(error["message"] if isinstance(error, dict) else str(error))
    return f"ComfyUI rejected the graph: {', '.join(parts)}."


class Client:
    """Talks to the ComfyUI at `address` ("http://127.0.0.1:8188"). Calls may come from several threads.

    All raise ServerGone where nobody answers, and aiohttp's ClientResponseError for an answer that is an HTTP error.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except aiohttp.ClientResponseError:
            raise
        except (aiohttp.ClientError, ConnectionError) as error:
            raise ServerGone(f"ComfyUI at {self.address} does not answer: {error}") from error

    async def _ask(
        self, session: aiohttp.ClientSession, method: str, path: str, timeout: float = 60, **options: Any
    ) -> bytes:
        limit = aiohttp.ClientTimeout(total=timeout)
        with self._reached():
            try:
                async with session.request(
                    method, self.address + path, timeout=limit, allow_redirects=False, **options
                ) as response:
                    response.raise_for_status()
                    if response.status >= 300:
                        raise ServerGone(
                            f"{self.address} answers with a redirect to {response.headers.get('Location', 'somewhere')}, which "
                            "is not followed: name the address of ComfyUI itself."
                        )
                    return await response.read()
            except asyncio.TimeoutError:
                raise ServerGone(f"ComfyUI at {self.address} does not answer within {timeout:.0f} seconds.") from None

    def _ask_once(self, method: str, path: str, timeout: float = 60, **options: Any) -> bytes:
        async def ask() -> bytes:
            async with aiohttp.ClientSession() as session:
                return await self._ask(session, method, path, timeout, **options)

        return asyncio.run(ask())

    def get(self, path: str, timeout: float = 60) -> bytes:
        """GET a path and return the body."""
        return self._ask_once("GET", path, timeout)

    def get_json(self, path: str, timeout: float = 60) -> Any:
        """GET a path and decode the JSON in the answer."""
        return json.loads(self.get(path, timeout))

    def object_info(self) -> dict[str, Any]:
        """The descriptions of all nodes, by node id."""
        return self.get_json("/object_info")

    def interrupt(self) -> None:
        """Stop whatever runs."""
        self._ask_once("POST", "/interrupt", json={})

    def view(self, filename: str, subfolder: str = "", kind: str = "output", timeout: float = 60) -> bytes:
        """Fetch one file from the output, temp or input folder."""
        where = {"filename": filename, "subfolder": subfolder, "type": kind}
        return self._ask_once("GET", "/view", timeout, params=where)

    def upload_image(self, data: bytes, filename: str, subfolder: str = "", timeout: float = 60) -> str:
        """Put a picture into the input folder; returns the name for a LoadImage node."""
        form = aiohttp.FormData({"overwrite": "true", "subfolder": subfolder})
        form.add_field("image", data, filename=filename)
        answer = json.loads(self._ask_once("POST", "/upload/image", timeout, data=form))
        return f"{answer['subfolder']}/{answer['name']}" if answer.get("subfolder") else answer["name"]

    def waiting(self, timeout: float = 60) -> int:
        """How many graphs are in the server's queue, the running one included."""
        return self.get_json("/prompt", timeout)["exec_info"]["queue_remaining"]

    def queue(self, graph: Graph, prompt_id: str, timeout: float = 60) -> None:
        """Queue a graph in API format under an id, a UUID. Raises GraphRejected where any of its nodes is refused."""

        async def put() -> None:
            async with aiohttp.ClientSession() as session:
                await asyncio.wait_for(self._queue(session, graph, {"prompt_id": prompt_id}), timeout)

        try:
            with self._reached():
                asyncio.run(put())
        except asyncio.TimeoutError:
            raise ServerGone(f"ComfyUI at {self.address} does not answer within {timeout:.0f} seconds.") from None

    def is_queued(self, prompt_id: str, timeout: float = 60) -> bool:
        """Whether a graph waits or runs."""
        queues = self.get_json("/queue", timeout)
        return any(item[1] == prompt_id for name in ("queue_running", "queue_pending") for item in queues[name])

    def history(self, prompt_id: str, timeout: float = 60) -> dict[str, Any] | None:
        """What has come of a graph; None where it has not ended, or is not known."""
        return self.get_json(f"/history/{prompt_id}", timeout).get(prompt_id)

    def cancel(self, prompt_id: str, timeout: float = 60) -> None:
        """Take this graph, and no other, out of the queue or stop it."""
        self._ask_once("POST", "/queue", timeout, json={"delete": [prompt_id]})
        self._ask_once("POST", "/interrupt", timeout, json={"prompt_id": prompt_id})

    def run(
        self, graph: Graph, on_progress: Callable[[Progress], None] | None = None, timeout: float = 600.0
    ) -> Result:
        """Queue a graph in API format, wait for its end and fetch its pictures.

        Raises GraphRejected, GraphFailed, GraphInterrupted, and TimeoutError after `timeout` seconds (then the run is
        interrupted). `on_progress` must not call this client: another thread may.
        """
        begin = time.monotonic()
        client_id = uuid.uuid4().hex
        messages: list[dict[str, Any]] = []

        async def run() -> tuple[str, dict[str, Any]]:
            address = f"{self.address}/ws?clientId={client_id}"
            async with aiohttp.ClientSession() as session:
                with self._reached():
                    # Previews of pictures are messages too, of any size.
                    async with session.ws_connect(address, max_msg_size=0) as socket:
                        await socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
                        prompt_id = await self._queue(session, graph, {"client_id": client_id})
                        await self._follow(socket, graph, prompt_id, on_progress, messages)
                history = json.loads(await self._ask(session, "GET", f"/history/{prompt_id}"))
                return prompt_id, history[prompt_id]

        async def run_in_time() -> tuple[str, dict[str, Any]]:
            return await asyncio.wait_for(run(), timeout)

        try:
            prompt_id, history = asyncio.run(run_in_time())
        except asyncio.TimeoutError:
            self.interrupt()
            raise TimeoutError(f"The graph did not finish within {timeout:.0f} seconds and was interrupted.") from None
        images = {
            node_id: [self.view(item["filename"], item["subfolder"], item["type"]) for item in output["images"]]
            for node_id, output in history["outputs"].items()
            if output.get("images")
        }
        seconds = time.monotonic() - begin
        status = history["status"]["status_str"]
        return Result(images, status, seconds, prompt_id, history["outputs"], messages)

    async def _queue(self, session: aiohttp.ClientSession, graph: Graph, names: dict[str, str]) -> str:
        body = {"prompt": graph, **names}
        async with session.post(f"{self.address}/prompt", json=body, allow_redirects=False) as response:
            text = await response.text(errors="replace")
            try:
                answer = json.loads(text)
            except ValueError:
                raise GraphRejected(f"ComfyUI rejected the graph (HTTP {response.status}): {text[:300]}", {}) from None
        if response.ok and answer.get("node_errors"):
            # The host would run the valid branches alone and stay silent about the others.
            await self._ask(session, "POST", "/queue", json={"delete": [answer["prompt_id"]]})
            await self._ask(session, "POST", "/interrupt", json={"prompt_id": answer["prompt_id"]})
        if not response.ok or answer.get("node_errors"):
            raise GraphRejected(_describe_rejection(answer), answer.get("node_errors", {}))
        return answer["prompt_id"]

    async def _follow(
        self,
        socket: aiohttp.ClientWebSocketResponse[Any],
        graph: Graph,
        prompt_id: str,
        on_progress: Callable[[Progress], None] | None,
        messages: list[dict[str, Any]],
    ) -> None:
        """Read messages until this run has ended and is in the history."""

        def report(node_id: str, value: int = 0, maximum: int = 0) -> None:
            if on_progress is not None:
                on_progress(Progress(node_id, graph.get(node_id, {}).get("class_type", ""), value, maximum))

        async for received in socket:
            if received.type is not aiohttp.WSMsgType.TEXT:
                continue
            message = received.json()
            data = message.get("data", {})
            if data.get("prompt_id") != prompt_id:
                continue
            messages.append(message)
            kind = message["type"]
            if kind == "execution_error":
                raise GraphFailed(
                    data["node_id"],
                    data["node_type"],
                    data["exception_type"],
                    data["exception_message"],
                    "".join(data.get("traceback", [])),
                )
            if kind == "execution_interrupted":
                raise GraphInterrupted("The run was interrupted.")
            if kind == "progress":
                report(data["node"], data["value"], data["max"])
            elif kind == "executing":
                if data["node"] is None:
                    # Sent after the history is written, unlike execution_success.
                    return
                report(data["node"])
        raise ServerGone(f"ComfyUI at {self.address} closed the connection.")
