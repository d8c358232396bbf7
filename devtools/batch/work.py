"""One row on one server: what a worker does.

It may run on another machine, which needs nothing of the pack: this module and `client` are sent along.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import re
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ..client import Client, Graph, GraphRejected, ServerGone
from .inputs import Upload

SERVER = "TRUEFILL_SERVER"
"""A worker's variable with the address of its own ComfyUI."""
DEFAULT = "http://127.0.0.1:8188"
DEEPEST = 2
"""So many graphs may be in a server's queue, other people's too, when one more is not put in."""
_FIRST_LOOK, _LAST_LOOK = 0.05, 1.0
"""Seconds between two looks at whether a graph has ended: soon at first, then less often."""
_PATIENCE = 20.0
"""Seconds to wait for room in a queue before the row is handed back, so that another server may have it."""
_SOON = 2.0
"""Seconds in which a server has to say that it has canceled a graph."""
_NOT_ASCII = re.compile(r"[^A-Za-z0-9.-]+")


@dataclass(frozen=True)
class Limits:
    """Seconds. answer: in which a server has to answer a question; run: in which a graph has to end once it is queued."""

    answer: float = 30.0
    run: float = 3600.0


@dataclass(frozen=True)
class Job:
    """A row's graph, its pictures, the id under which it is queued, and the folder of all uploads of the batch."""

    graph: Graph
    uploads: list[Upload]
    prompt_id: str
    subfolder: str


@dataclass(frozen=True)
class Picture:
    """A file that a node has saved; number counts a node's."""

    node: str
    number: int
    suffix: str
    data: bytes


@dataclass(frozen=True)
class Outcome:
    """status: "done", "failed" where the graph is to blame, "gone" where the server is, "away" where it was gone before it had
    seen anything of the row, "busy" where its queue was full.

    error: a sentence where it isn't done.
    """

    status: str
    seconds: float
    error: str = ""
    pictures: list[Picture] = field(default_factory=list)


def new_id() -> str:
    """For a graph in a queue."""
    return str(uuid.uuid4())


def own_server() -> str:
    """The address of the ComfyUI that belongs to this worker."""
    return os.environ.get(SERVER, DEFAULT)


def ask_nodes(address: str, timeout: float) -> dict[str, Any]:
    """The descriptions of a server's nodes, by node id."""
    return Client(address).get_json("/object_info", timeout)


def do_job(address: str, job: Job, limits: Limits) -> Outcome:
    """Run a row's graph on a server, on one of Dask's workers, and fetch what it has saved. Raises nothing."""
    client, started, answers = Client(address), time.monotonic(), False

    def ended(status: str, error: str = "", pictures: list[Picture] | None = None) -> Outcome:
        return Outcome(status, time.monotonic() - started, error, pictures or [])

    try:
        client.waiting(limits.answer)
        answers = True
        graph = copy.deepcopy(job.graph)
        for upload in job.uploads:
            name = client.upload_image(upload.data, _unique(upload), job.subfolder, limits.answer)
            graph[upload.target.node]["inputs"][upload.target.input] = name
        with _door(address):
            while client.waiting(limits.answer) >= DEEPEST:
                if time.monotonic() - started > _PATIENCE:
                    return ended("busy", f"The queue of {address} is full of other people's graphs.")
                time.sleep(0.2)
            started = time.monotonic()
            client.queue(graph, job.prompt_id, limits.answer)
        history = _wait(client, job.prompt_id, limits)
        status = history["status"]["status_str"]
        if status != "success":
            return ended("failed", _reason(history))
        return ended("done", pictures=_fetch(client, history["outputs"], limits))
    except GraphRejected as error:
        return ended("failed", str(error))
    except TimeoutError as error:
        with contextlib.suppress(Exception):
            client.cancel(job.prompt_id, limits.answer)
        return ended("failed", str(error))
    except Exception as error:
        # Whatever a server says that is none, or none any more: it must not end the batch.
        status = "gone" if answers else "away"
        return ended(status, str(error) if isinstance(error, ServerGone) else f"{address}: {error!r}")


def _door(address: str) -> threading.Lock:
    """For one row at a time: two of a worker's that find room for one would both go in."""
    from distributed import get_worker

    doors: dict[str, threading.Lock] = vars(get_worker()).setdefault("truefill_doors", {})
    return doors.setdefault(address, threading.Lock())


def cancel_job(address: str, prompt_id: str) -> None:
    """Take a row's graph out of a server's queue or stop it. Raises ServerGone where nobody answers soon."""
    # A cluster's worker calls this where an event loop runs already.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(Client(address).cancel, prompt_id, _SOON).result()


def _unique(upload: Upload) -> str:
    """A name that no other picture has."""
    stem, _, suffix = _NOT_ASCII.sub("_", upload.name).rpartition(".")
    return f"{stem[:40]}-{hashlib.sha256(upload.data).hexdigest()[:16]}.{suffix}"


def _wait(client: Client, prompt_id: str, limits: Limits) -> dict[str, Any]:
    """What has come of a graph. Raises ServerGone where the server does not know it any more, and TimeoutError."""
    deadline, pause = time.monotonic() + limits.run, _FIRST_LOOK
    while time.monotonic() < deadline:
        if history := client.history(prompt_id, limits.answer):
            return history
        if not client.is_queued(prompt_id, limits.answer):
            # It may have ended between the two questions.
            if history := client.history(prompt_id, limits.answer):
                return history
            raise ServerGone(
                f"ComfyUI at {client.address} has lost the graph: it was restarted, or somebody canceled it."
            )
        time.sleep(pause)
        pause = min(pause * 1.3, _LAST_LOOK)
    raise TimeoutError(f"The graph did not finish within {limits.run:.0f} seconds.")


def _reason(history: dict[str, Any]) -> str:
    for kind, data in history["status"].get("messages", []):
        if kind == "execution_error":
            said = " ".join(str(data.get("exception_message", "")).split())
            return (
                f"Node {data.get('node_id')} ({data.get('node_type')}) failed with {data.get('exception_type')}: {said}"
            )
        if kind == "execution_interrupted":
            return "Somebody interrupted the graph on the server."
    return f"The server says {history['status']['status_str']!r}, and no reason."


def _fetch(client: Client, outputs: dict[str, Any], limits: Limits) -> list[Picture]:
    """What nodes have saved; where none has, the previews."""
    found = [
        (node, number, item)
        for node, output in outputs.items()
        for number, item in enumerate(output.get("images", []), 1)
        if isinstance(item, dict)
    ]
    saved = [entry for entry in found if entry[2].get("type") == "output"]
    return [
        Picture(node, number, _suffix(item["filename"]), client.view(**_place(item), timeout=limits.answer))
        for node, number, item in saved or found
    ]


def _place(item: dict[str, Any]) -> dict[str, str]:
    return {"filename": item["filename"], "subfolder": item.get("subfolder", ""), "kind": item.get("type", "output")}


def _suffix(filename: str) -> str:
    suffix = filename.rpartition(".")[2].lower()
    return f".{suffix}" if suffix.isalnum() and len(suffix) <= 5 else ".bin"
