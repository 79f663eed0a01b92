"""Models on the Hugging Face hub, from a server on loopback that speaks its protocol."""

import hashlib
import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
from safetensors.numpy import save
from small_models import make_trained

from vit_jax.weights import layouts
from vit_jax.weights.save import save_weights

ROOT = pathlib.Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHUNK = 10 * 2**20  # bytes that the client keeps of a connection that is lost
LOAD = """
import sys, numpy as np, vit_jax
from vit_jax.errors import run_command
weights = run_command(vit_jax.load_weights, sys.argv[1])
print(weights.kind, weights.num_classes, weights.class_names, weights.path)
np.save(sys.argv[2], weights.params["head"]["kernel"])
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves `server.models`, {name: {file: bytes}}; breaks off the download of a large file."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.requests.append((self.command, self.path, self.headers.get("Range")))
        if match := re.fullmatch(rf"/api/models/(\w+/\w+)/tree/{COMMIT}\?.*", self.path):
            files = self.server.models[match[1]].items()
            tree = [{"type": "file", "path": n, "size": len(b), "oid": COMMIT} for n, b in files]
            return self.reply(200, {"Content-Type": "application/json"}, json.dumps(tree).encode())
        if match := re.fullmatch(r"/api/models/(\w+/\w+)(/revision/([^?]+))?(\?.*)?", self.path):
            return self.send_info(self.server.models.get(match[1]), match[1], match[3])
        match = re.fullmatch(rf"/(\w+/\w+)/resolve/{COMMIT}/(.+)", self.path)
        content = match and self.server.models.get(match[1], {}).get(match[2])
        if content is None:
            return self.reply(404, {"X-Error-Code": "EntryNotFound"}, b"")
        start = int(re.findall(r"\d+", self.headers.get("Range", "bytes=0-"))[0])
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        drop = self.command == "GET" and not start and len(content) > 2 * CHUNK
        self.reply(206 if start else 200, headers, content[start:], drop=drop)

    def send_info(self, files, name, revision):
        if files is None or revision not in (None, "main", "v1", COMMIT):
            code = "RepoNotFound" if files is None else "RevisionNotFound"
            return self.reply(404, {"X-Error-Code": code}, b"")
        siblings = [{"rfilename": file} for file in files]
        info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": []}
        self.reply(200, {"Content-Type": "application/json"}, json.dumps(info).encode())

    def reply(self, code, headers, content, *, drop=False):
        self.send_response(code)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if drop else content)
        if drop:
            self.close_connection = True


@pytest.fixture
def hub(tmp_path):
    """The server; hub.load(name, **environment) loads a model in a process of its own."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests, server.models = [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"

    def load(name, **environment):
        env = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        env |= {"HF_ENDPOINT": address, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", LOAD, name, str(tmp_path / "head.npy")]
        return subprocess.run(
            command, env=env | environment, capture_output=True, text=True, cwd=ROOT
        )

    server.load = load
    yield server
    server.shutdown()


def test_model_is_downloaded_resumed_cached_and_used_offline(hub, tmp_path):
    trained = make_trained(layer_scale=0.0, norm_eps=1e-6, mlp_dim=60_000)
    save_weights(trained, tmp_path / "folder", "huggingface")
    files = {path.name: path.read_bytes() for path in (tmp_path / "folder").iterdir()}
    hub.models["owner/vit"] = files | {"pytorch_model.bin": b"never read", "README.md": b"#"}
    done = hub.load("hf:owner/vit@v1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("huggingface 5 ['a', 'b', 'c', 'd', 'e'] ")
    assert np.array_equal(np.load(tmp_path / "head.npy"), trained.params["head"]["kernel"])
    got = [(path.rpartition("/")[2], r) for method, path, r in hub.requests if method == "GET"]
    assert ("model.safetensors", None) in got and not {"pytorch_model.bin", "README.md"} & {
        name for name, _ in got
    }
    resumed = [r for name, r in got if name == "model.safetensors" and r]
    assert resumed == [f"bytes={CHUNK}-"]
    hub.requests.clear()
    assert hub.load("hf:owner/vit@v1").returncode == 0
    assert not [path for method, path, _ in hub.requests if method == "GET" and "resolve" in path]
    hub.requests.clear()
    offline = hub.load("hf:owner/vit@v1", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0 and hub.requests == []


def test_timm_model_is_read_and_other_formats_are_not(hub):
    trained = make_trained(width=192, norm_eps=1e-6)
    tensors = layouts.from_params(trained.params, layouts.TIMM)
    hub.models["timm/vit"] = {"model.safetensors": save(tensors), "config.json": b"{}"}
    done = hub.load("hf:timm/vit")
    assert done.stdout.startswith("timm 5 None "), done.stderr
    hub.models["timm/bin"] = {"pytorch_model.bin": b"\0"}
    done = hub.load("hf:timm/bin")
    assert done.returncode == 2
    assert "error: hf:timm/bin has no model.safetensors: only models in" in done.stderr


@pytest.mark.parametrize("name", ["hf:owner/absent", "hf:owner/vit@v2", "hf:not a name"])
def test_missing_model_is_reported_in_one_line(hub, name):
    hub.models["owner/vit"] = {"model.safetensors": b""}
    done = hub.load(name)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: cannot download {name} (")
