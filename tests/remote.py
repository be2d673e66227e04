"""A real server on loopback that speaks OpenAI's /v1/completions for a decoder, and fails as a test tells it to."""

import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool


class Served:
    """`asked`: the body of every request, with the second it came and its headers. `faults`: what befalls the next requests,
    one each: `status`, `headers`, `body` (text or JSON) or `delay` (seconds, then the proper answer); None: nothing.
    `spoils` is given every proper answer. Without `scores` it ignores `echo` and `logprobs`, as transformers' own does."""

    def __init__(self, model: Any, tokenizer: Any, scores: bool = True):
        self.model, self.tokenizer, self.scores = model, tokenizer, scores
        self.asked: list[tuple[dict[str, Any], float, Mapping[str, str]]] = []
        self.faults: list[dict[str, Any] | None] = []
        self.spoils = lambda answer: answer
        self.lock = threading.Lock()
        self.url = ""

    @property
    def texts(self) -> list[str]:
        """What was asked about, whatever the requests it came in."""
        prompts = [body["prompt"] if "prompt" in body else body["messages"][0]["content"] for body, _, _ in self.asked]
        return [text for prompt in prompts for text in (prompt if isinstance(prompt, list) else [prompt])]

    def answer(self, body: dict[str, Any], headers: Mapping[str, str]) -> Response:
        with self.lock:
            self.asked.append((body, time.monotonic(), headers))
            fault = self.faults.pop(0) if self.faults else None
        fault = fault or {}
        time.sleep(fault.get("delay", 0.0))
        if "body" in fault or "status" in fault:
            said = fault.get("body", "no")
            text = said if isinstance(said, str) else json.dumps(said)
            return Response(text, fault.get("status", 200), fault.get("headers"), "application/json")
        if "messages" in body:
            written = self.choice(body["messages"][-1]["content"], body)["text"]
            return Response(json.dumps({"choices": [{"message": {"role": "assistant", "content": written}}]}))
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        choices = [{"index": place, **self.choice(text, body)} for place, text in enumerate(prompts)]
        return Response(json.dumps(self.spoils({"choices": choices[::-1]})), media_type="application/json")

    @torch.no_grad()
    def choice(self, text: str, body: Mapping[str, Any]) -> dict[str, Any]:
        told = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = told["input_ids"], [begin for begin, _ in told["offset_mapping"]]
        number = len(ids)
        for _ in range(body["max_tokens"]):
            ids = [*ids, int(self.model(torch.tensor([ids])).logits[0, -1].argmax())]
        written = self.tokenizer.decode(ids[number:])
        if not (self.scores and body.get("echo") and body.get("logprobs")):
            return {"text": written}
        likely = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        values = [None, *(float(likely[place, token]) for place, token in enumerate(ids[1:]))]
        offsets += [len(text)] * (len(ids) - number)
        tokens = [self.tokenizer.decode([token]) for token in ids]
        return {"text": text + written,
                "logprobs": {"tokens": tokens, "token_logprobs": values, "text_offset": offsets}}  # fmt: skip


@contextmanager
def serving(served: Served) -> Iterator[Served]:
    app = FastAPI()

    @app.post("/v1/chat/completions")
    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body, headers = await request.json(), dict(request.headers)
        return await run_in_threadpool(served.answer, body, headers)

    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", ws="none"))
    served.url = f"http://127.0.0.1:{sock.getsockname()[1]}/v1"
    with running(server, sock):
        yield served


@contextmanager
def running(server: uvicorn.Server, sock: socket.socket) -> Iterator[None]:
    """A server on its socket, in a thread."""
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    while thread.is_alive() and not server.started:
        time.sleep(0.01)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(20)
        sock.close()
