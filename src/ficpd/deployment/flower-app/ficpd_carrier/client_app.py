"""Passes bytes to the site's process and back, without reading them.

Flower starts a new process for every message, so the imports are light. No record or model is in this process.
"""

import json
import os

import httpx
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

CONNECT_SECONDS = 5.0
"""The maximum time for the socket to accept. An answer may take until the message expires."""

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    return carried(message, context, "train")


@app.query()
def query(message: Message, context: Context) -> Message:
    return carried(message, context, "query")


def carried(message: Message, context: Context, what: str) -> Message:
    """Returns the site's status and body unchanged, or 503 and the reason if the site cannot be reached."""
    body = message.content.config_records["call"]["body"]
    assert isinstance(body, bytes), "the server's half sends bytes"
    status, answer = posted(socket_of(context), what, body)
    return Message(RecordDict({"answer": ConfigRecord({"status": status, "body": answer})}), reply_to=message)


def socket_of(context: Context) -> str | None:
    """Returns the socket that this machine's owner set for the SuperNode. The server cannot change it.

    A simulation has no SuperNodes: there `$FICPD_SOCKETS` is a folder of sockets, named by partition.
    """
    given = context.node_config
    if "socket" in given:
        return str(given["socket"])
    folder = given.get("sockets-folder") or os.environ.get("FICPD_SOCKETS")
    return f"{folder}/{given['partition-id']}.sock" if folder and "partition-id" in given else None


def posted(socket: str | None, what: str, body: bytes) -> tuple[int, bytes]:
    if socket is None:
        return _absent("the SuperNode was started without --node-config 'socket=\"/run/ficpd/NAME.sock\"'")
    timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
    transport = httpx.HTTPTransport(uds=socket, verify=False)  # plain HTTP on a Unix socket: has no certificate
    try:
        # trust_env: a machine's HTTP_PROXY would redirect the call
        with httpx.Client(transport=transport, timeout=timeout, trust_env=False) as client:
            answer = client.post(f"http://site/{what}", content=body)
    except httpx.TransportError as error:
        return _absent(f"no answer at {socket} ({error}); is ficpd-site running, and may this user open the socket?")
    return answer.status_code, answer.content


def _absent(why: str) -> tuple[int, bytes]:
    return 503, json.dumps({"error": why}).encode()
