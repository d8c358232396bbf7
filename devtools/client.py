"""A client of a running ComfyUI: queue a graph, follow its progress, fetch its pictures."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .websocket import ConnectionLost, WebSocket

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
    """Talks to the ComfyUI at `address` ("http://127.0.0.1:8188"). Calls may come from several threads."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")

    def _open(self, path: str, data: bytes | None = None, headers: dict[str, str] | None = None, timeout: float = 60):
        request = urllib.request.Request(self.address + path, data=data, headers=headers or {})
        # A proxy that the user has set for the internet must not see calls to this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        return opener.open(request, timeout=timeout)

    def get(self, path: str, timeout: float = 60) -> bytes:
        """GET a path and return the body; raises ServerGone where nobody answers."""
        try:
            with self._open(path, timeout=timeout) as response:
                return response.read()
        except urllib.error.HTTPError:
            raise
        except OSError as error:
            raise ServerGone(f"ComfyUI at {self.address} does not answer: {error}") from error

    def get_json(self, path: str, timeout: float = 60) -> Any:
        """GET a path and decode the JSON in the answer."""
        return json.loads(self.get(path, timeout))

    def post_json(self, path: str, body: Any) -> Any:
        """POST JSON; returns the decoded answer, or None for an empty one."""
        try:
            with self._open(path, json.dumps(body).encode(), {"Content-Type": "application/json"}) as response:
                text = response.read()
        except urllib.error.HTTPError:
            raise
        except OSError as error:
            raise ServerGone(f"ComfyUI at {self.address} does not answer: {error}") from error
        return json.loads(text) if text.strip() else None

    def object_info(self) -> dict[str, Any]:
        """The descriptions of all nodes, by node id."""
        return self.get_json("/object_info")

    def interrupt(self) -> None:
        """Stop whatever runs."""
        self.post_json("/interrupt", {})

    def view(self, filename: str, subfolder: str = "", kind: str = "output") -> bytes:
        """Fetch one file from the output, temp or input folder."""
        query = urllib.parse.urlencode({"filename": filename, "subfolder": subfolder, "type": kind})
        return self.get(f"/view?{query}")

    def upload_image(self, data: bytes, filename: str) -> str:
        """Put a picture into the input folder; returns the name for a LoadImage node."""
        boundary = uuid.uuid4().hex
        body = b"".join(
            [
                f"--{boundary}\r\nContent-Disposition: form-data; ".encode(),
                f'name="image"; filename="{filename}"\r\nContent-Type: application/octet-stream\r\n\r\n'.encode(),
                data,
                f'\r\n--{boundary}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n'.encode(),
                f"--{boundary}--\r\n".encode(),
            ]
        )
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        with self._open("/upload/image", body, headers) as response:
            answer = json.loads(response.read())
        return f"{answer['subfolder']}/{answer['name']}" if answer.get("subfolder") else answer["name"]

    def _queue(self, graph: Graph, client_id: str) -> str:
        try:
            answer = self.post_json("/prompt", {"prompt": graph, "client_id": client_id})
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            try:
                answer = json.loads(text)
            except ValueError:
                raise GraphRejected(f"ComfyUI rejected the graph (HTTP {error.code}): {text[:300]}", {}) from None
            raise GraphRejected(_describe_rejection(answer), answer.get("node_errors", {})) from None
        if answer.get("node_errors"):
            # The host would run the valid branches alone and stay silent about the others.
            self.post_json("/queue", {"delete": [answer["prompt_id"]]})
            self.post_json("/interrupt", {"prompt_id": answer["prompt_id"]})
            raise GraphRejected(_describe_rejection(answer), answer["node_errors"])
        return answer["prompt_id"]

    def run(
        self, graph: Graph, on_progress: Callable[[Progress], None] | None = None, timeout: float = 600.0
    ) -> Result:
        """Queue a graph in API format, wait for its end and fetch its pictures.

        Raises GraphRejected, GraphFailed, GraphInterrupted, ServerGone, and TimeoutError after `timeout` seconds
        (then the run is interrupted).
        """
        begin = time.monotonic()
        client_id = uuid.uuid4().hex
        url = urllib.parse.urlsplit(self.address)
        messages: list[dict[str, Any]] = []
        try:
            with WebSocket(url.hostname or "127.0.0.1", url.port or 80, f"/ws?clientId={client_id}") as socket:
                flags = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
                socket.send(json.dumps(flags))
                prompt_id = self._queue(graph, client_id)
                self._follow(socket, graph, prompt_id, on_progress, messages, begin + timeout)
        except TimeoutError:
            self.interrupt()
            raise TimeoutError(f"The graph did not finish within {timeout:.0f} seconds and was interrupted.") from None
        except (ConnectionLost, ConnectionError) as error:
            raise ServerGone(f"ComfyUI at {self.address} does not answer: {error}") from error
        history = self.get_json(f"/history/{prompt_id}")[prompt_id]
        images = {
            node_id: [self.view(item["filename"], item["subfolder"], item["type"]) for item in output["images"]]
            for node_id, output in history["outputs"].items()
            if output.get("images")
        }
        seconds = time.monotonic() - begin
        status = history["status"]["status_str"]
        return Result(images, status, seconds, prompt_id, history["outputs"], messages)

    def _follow(
        self,
        socket: WebSocket,
        graph: Graph,
        prompt_id: str,
        on_progress: Callable[[Progress], None] | None,
        messages: list[dict[str, Any]],
        deadline: float,
    ) -> None:
        """Read messages until this run has ended and is in the history."""

        def report(node_id: str, value: int = 0, maximum: int = 0) -> None:
            if on_progress is not None:
                on_progress(Progress(node_id, graph.get(node_id, {}).get("class_type", ""), value, maximum))

        while True:
            text = socket.receive(deadline)
            if text is None:
                continue
            message = json.loads(text)
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
