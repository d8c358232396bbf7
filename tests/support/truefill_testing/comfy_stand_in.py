"""A stand-in for a ComfyUI server: its routes, a queue, and the ways in which one goes wrong."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
import uuid
from collections import Counter
from typing import Any

from aiohttp import web
from PIL import Image

NODES = {
    "LoadImage": {"input": {"required": {"image": [["a.png"], {"image_upload": True}]}}},
    "TrueFillExamplePhoto": {"input": {"required": {"photo": [["toy scene"]]}}},
    "TrueFillEncodePrompt": {"input": {"required": {"prompt": ["STRING", {}], "strength": ["FLOAT", {}]}}},
    "CLIPTextEncode": {"input": {"required": {"text": ["STRING", {}]}}},
    "KSampler": {"input": {"required": {"seed": ["INT", {}], "steps": ["INT", {}], "on": ["BOOLEAN", {}]}}},
    "SaveImage": {"input": {"required": {"images": ["IMAGE"]}}},
}


def graph() -> dict[str, Any]:
    """Two prompts, a picture, a sampler, and what saves."""
    return {
        "1": {
            "class_type": "TrueFillExamplePhoto",
            "inputs": {"photo": "toy scene"},
            "_meta": {"title": "Example Photo"},
        },
        "2": {"class_type": "TrueFillEncodePrompt", "inputs": {"prompt": "a moon", "strength": 1.0}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": ""}, "_meta": {"title": "Negative Prompt"}},
        "4": {
            "class_type": "KSampler",
            "inputs": {"seed": 1, "steps": 2, "on": True, "positive": ["2", 0], "negative": ["3", 0], "x": ["1", 0]},
        },
        "5": {"class_type": "SaveImage", "inputs": {"images": ["4", 0]}, "_meta": {"title": "Result"}},
    }


class StandIn:
    """Answers as ComfyUI does; a context manager.

    A graph ends after `seconds`; its picture has the prompt as its "prompt" chunk. `fails` maps prompts to a node's error.
    `depths` is how long the queue was with each that was sent, `ran` counts prompts that ended, and `uploads` has what was put
    into the input folder.
    """

    def __init__(self, seconds: float = 0.0, fails: dict[str, str] | None = None) -> None:
        self.seconds, self.fails = seconds, fails or {}
        self.hangs = self.redirects = False
        self.upload_seconds = 0.0
        self.depths: list[int] = []
        self.ran: Counter[str] = Counter()
        self.uploads: dict[str, bytes] = {}
        self.canceled: list[str] = []
        self._queue: dict[str, dict[str, Any]] = {}
        self._history: dict[str, dict[str, Any]] = {}
        self._files: dict[str, bytes] = {}
        self._number = 0
        self.port = 0
        self._started = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> StandIn:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen, again on the same port after `stop`; what was queued is forgotten."""
        self._queue.clear()
        self._history.clear()
        self._started.clear()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._started.wait(10)

    def stop(self) -> None:
        """Go away, in the middle of whatever it does."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join(10)

    def _serve(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(middlewares=[self._misbehave], client_max_size=2**26)
        app.add_routes(
            [
                web.get("/object_info", self._nodes),
                web.get("/prompt", self._length),
                web.post("/prompt", self._put),
                web.get("/queue", self._queues),
                web.post("/queue", self._delete),
                web.post("/interrupt", self._interrupt),
                web.get("/history/{id}", self._get_history),
                web.post("/upload/image", self._upload),
                web.get("/view", self._view),
            ]
        )
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]
        worker = asyncio.create_task(self._work())
        self._started.set()
        await self._end.wait()
        worker.cancel()
        await runner.cleanup()

    @web.middleware
    async def _misbehave(self, request: web.Request, handler: Any) -> web.StreamResponse:
        while self.hangs:
            await asyncio.sleep(0.05)
        if self.redirects:
            return web.Response(status=302, headers={"Location": "http://127.0.0.1:9/"})
        return await handler(request)

    async def _nodes(self, request: web.Request) -> web.Response:
        return web.json_response(NODES)

    async def _length(self, request: web.Request) -> web.Response:
        return web.json_response({"exec_info": {"queue_remaining": len(self._queue)}})

    async def _put(self, request: web.Request) -> web.Response:
        body = await request.json()
        prompt_id = body.get("prompt_id") or str(uuid.uuid4())
        if unknown := [node for node in body["prompt"].values() if node["class_type"] not in NODES]:
            error = {"type": "x", "message": f"Node '{unknown[0]['class_type']}' not found.", "details": ""}
            return web.json_response({"error": error, "node_errors": {}}, status=400)
        self.put(prompt_id, body["prompt"])
        self.depths.append(len(self._queue))
        return web.json_response({"prompt_id": prompt_id, "number": 0, "node_errors": {}})

    def put(self, prompt_id: str, nodes: dict[str, Any]) -> None:
        """Queue a graph, as somebody else would."""
        self._queue[prompt_id] = nodes

    async def _work(self) -> None:
        while True:
            if not self._queue or self.hangs:
                await asyncio.sleep(0.005)
                continue
            prompt_id, nodes = next(iter(self._queue.items()))
            until = time.monotonic() + self.seconds
            while prompt_id in self._queue and time.monotonic() < until:
                await asyncio.sleep(0.005)
            if self._queue.pop(prompt_id, None) is not None:
                self._history[prompt_id] = self._finish(nodes)

    def _finish(self, nodes: dict[str, Any]) -> dict[str, Any]:
        prompt = nodes["2"]["inputs"]["prompt"]
        self.ran[prompt] += 1
        if error := self.fails.get(prompt):
            data = {"node_id": "4", "node_type": "KSampler", "exception_type": error, "exception_message": "no\n room"}
            return {"status": {"status_str": "error", "messages": [["execution_error", data]]}, "outputs": {}}
        self._number += 1
        name = f"ComfyUI_{self._number:05d}_.png"
        self._files[name] = self._picture(nodes)
        item = {"filename": name, "subfolder": "", "type": "output"}
        return {"status": {"status_str": "success", "messages": []}, "outputs": {"5": {"images": [item]}}}

    def _picture(self, nodes: dict[str, Any]) -> bytes:
        from PIL.PngImagePlugin import PngInfo

        loaded = self.uploads.get(nodes["1"]["inputs"].get("image", ""))
        picture = Image.open(io.BytesIO(loaded)) if loaded else Image.new("RGB", (8, 8))
        said, written = PngInfo(), io.BytesIO()
        said.add_text("prompt", json.dumps(nodes))
        picture.save(written, "PNG", pnginfo=said)
        return written.getvalue()

    async def _queues(self, request: web.Request) -> web.Response:
        entries = [[0, prompt_id, nodes, {}, []] for prompt_id, nodes in self._queue.items()]
        return web.json_response({"queue_running": entries[:1], "queue_pending": entries[1:]})

    async def _delete(self, request: web.Request) -> web.Response:
        for prompt_id in (await request.json()).get("delete", []):
            self.canceled.append(prompt_id)
            # The first is at work and goes on.
            if prompt_id in list(self._queue)[1:]:
                del self._queue[prompt_id]
        return web.Response()

    async def _interrupt(self, request: web.Request) -> web.Response:
        prompt_id = (await request.json())["prompt_id"]
        if prompt_id in self._queue:
            data = [["execution_interrupted", {}]]
            self._history[prompt_id] = {"status": {"status_str": "error", "messages": data}, "outputs": {}}
            del self._queue[prompt_id]
        return web.Response()

    async def _get_history(self, request: web.Request) -> web.Response:
        prompt_id = request.match_info["id"]
        return web.json_response({prompt_id: self._history[prompt_id]} if prompt_id in self._history else {})

    async def _upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        file, subfolder = form["image"], form.get("subfolder", "")
        assert isinstance(file, web.FileField)
        await asyncio.sleep(self.upload_seconds)
        self.uploads[f"{subfolder}/{file.filename}"] = file.file.read()
        return web.json_response({"name": file.filename, "subfolder": subfolder, "type": "input"})

    async def _view(self, request: web.Request) -> web.Response:
        return web.Response(body=self._files[request.query["filename"]])
