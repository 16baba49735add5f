"""A Hugging Face hub on this machine: it answers what HfApi asks while a folder is uploaded, and keeps what it got."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def hub(token: str = "hf_stub"):
    """Its address, and what it has: `repositories` with the request that made each, and `commits`, files by name."""
    kept = {"repositories": {}, "commits": []}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def answer(self, content, status=200):
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.do_POST()

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            if self.headers.get("Authorization") != f"Bearer {token}" and path != "/api/validate-yaml":
                return self.answer({"error": "Invalid username or password."}, 401)
            if path == "/api/repos/create":
                asked = json.loads(body)
                name = "/".join(filter(None, (asked.get("organization") or "me", asked["name"])))
                kept["repositories"][name] = asked
                return self.answer({"url": f"{address}/{name}", "name": name})
            if path == "/api/validate-yaml":
                kept["card"] = json.loads(body)["content"]
                return self.answer({"errors": [], "warnings": []})
            if "/preupload/" in path:
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                    for file in json.loads(body)["files"]
                ]
                return self.answer({"files": files})
            if "/commit/" in path:
                lines = [json.loads(line) for line in body.splitlines() if line.strip()]
                files = {
                    line["value"]["path"]: base64.b64decode(line["value"]["content"])
                    for line in lines
                    if line["key"] == "file"
                }
                name = path.partition("/models/")[2].partition("/commit/")[0]
                kept["commits"].append({"repository": name, **files})
                made = f"{address}/{name}/commit/{'0' * 40}"
                return self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": made})
            kept.setdefault("unknown", []).append(self.path)
            return self.answer({"error": f"nothing at {path}"}, 404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield address, kept
    finally:
        server.shutdown()
        server.server_close()
