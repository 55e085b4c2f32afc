"""A W&B server on 127.0.0.1 that knows the few GraphQL queries with which wandb's client reads runs."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ANSWERS = json.loads((Path(__file__).parent / "wandb_api" / "answers.json").read_text())
PROJECT = ("team", "anonfw")
VIEWER = {"id": "VXNlcg", "entity": "team", "username": "somebody", "email": "", "flags": "{}", "teams": {"edges": []}}


def data_of(operation: str, variables: dict[str, Any]) -> dict[str, Any]:
    """The field `data` of the answer to one query."""
    if operation in ("Viewer", "GetDefaultEntity"):
        return {"viewer": VIEWER}
    if (variables["entity"], variables["project"]) != PROJECT:
        return {"project": None}
    if operation == "Runs":
        runs = [run for run in ANSWERS["runs"] if matches(run, json.loads(variables["filters"]))]
        edges = [{"node": run, "cursor": run["id"]} for run in runs]
        page = {"endCursor": None, "hasNextPage": False}
        return {"project": {"internalId": "7", "runCount": len(runs), "runs": {"edges": edges, "pageInfo": page}}}
    name = variables.get("name") or variables.get("runName") or variables["run"]
    (run,) = (run for run in ANSWERS["runs"] if run["name"] == name)
    rows = ANSWERS["history"][name]
    if operation == "RunHistoryKeys":
        found: dict[str, Any] = {"historyKeys": run["historyKeys"]}
    elif operation == "RunParquetHistory":
        found = {"parquetHistory": {"parquetUrls": [], "liveData": [{"_step": row["_step"]} for row in rows]}}
    elif operation == "HistoryPage":
        inside = [row for row in rows if variables["minStep"] <= row["_step"] < variables["maxStep"]]
        found = {"history": [json.dumps(row) for row in inside]}
    else:
        raise ValueError(f"the client asks for something new: {operation}")
    return {"project": {"run": found}}


def matches(run: dict[str, Any], filters: dict[str, Any]) -> bool:
    """W&B's filter language as far as `anonfw compare` speaks it."""
    names = {"name": "name", "display_name": "displayName", "group": "group"}
    return any(run[names[key]] == value for choice in filters["$or"] for key, value in choice.items())


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path != "/graphql":  # the client's telemetry
            self._send(404, {})
            return
        asked = json.loads(asked)
        operation = re.search(r"query\s+(\w+)", asked["query"])[1]
        self._send(200, {"data": data_of(operation, asked.get("variables") or {})})

    def _send(self, status: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Tests are quiet."""


@contextmanager
def server() -> Iterator[str]:
    """Its address, on a free port."""
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}"
    finally:
        running.shutdown()
        running.server_close()
        thread.join()
