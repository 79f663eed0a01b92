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
for name in sys.argv[2:]:
    try:
        weights = run_command(vit_jax.load_weights, name)
        print(weights.kind, weights.num_classes, weights.class_names, weights.path)
        np.save(sys.argv[1], weights.params["head"]["kernel"])
    except SystemExit as e:
        print("exit code", e.code)
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
    """The server; hub.load(*names, **environment) loads models in one process of its own.

    The process prints one line per model, and one per error.
    """
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests, server.models = [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"

    def load(*names, **environment):
        env = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        env |= {"HF_ENDPOINT": address, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", LOAD, str(tmp_path / "head.npy"), *names]
        done = subprocess.run(
            command, env=env | environment, capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        return done.stdout.splitlines(), errors

    server.load = load
    yield server
    server.shutdown()


def test_model_is_downloaded_resumed_cached_and_used_offline(hub, tmp_path):
    trained = make_trained(layer_scale=0.0, norm_eps=1e-6, mlp_dim=60_000)
    save_weights(trained, tmp_path / "folder", "huggingface")
    files = {path.name: path.read_bytes() for path in (tmp_path / "folder").iterdir()}
    hub.models["owner/vit"] = files | {"pytorch_model.bin": b"never read", "README.md": b"#"}
    (first, second), errors = hub.load("hf:owner/vit@v1", "hf:owner/vit@v1")
    assert first.startswith("huggingface 5 ['a', 'b', 'c', 'd', 'e'] ")
    assert second == first and errors == []
    assert np.array_equal(np.load(tmp_path / "head.npy"), trained.params["head"]["kernel"])
    gets = [(path, r) for method, path, r in hub.requests if method == "GET"]
    got = [(path.rpartition("/")[2], r) for path, r in gets if "/resolve/" in path]
    assert len(got) == len(set(got))  # the second time, nothing is downloaded
    assert [r for name, r in got if name == "model.safetensors"] == [None, f"bytes={CHUNK}-"]
    assert not {"pytorch_model.bin", "README.md"} & {name for name, _ in got}
    hub.requests.clear()
    assert hub.load("hf:owner/vit@v1", HF_HUB_OFFLINE="1") == ([first], [])
    assert hub.requests == []


def test_timm_model_is_read_and_other_formats_and_missing_models_are_errors(hub):
    """Each error is one line, and the exit code is 2."""
    trained = make_trained(width=192, norm_eps=1e-6)
    tensors = layouts.from_params(trained.params, layouts.TIMM)
    hub.models["timm/vit"] = {"model.safetensors": save(tensors), "config.json": b"{}"}
    hub.models["timm/bin"] = {"pytorch_model.bin": b"\0"}
    hub.models["owner/vit"] = {"model.safetensors": b""}
    missing = ["hf:owner/absent", "hf:owner/vit@v2", "hf:not a name"]
    (timm, *others), errors = hub.load("hf:timm/vit", "hf:timm/bin", *missing)
    assert timm.startswith("timm 5 None ")
    assert others == ["exit code 2"] * 4
    says = ["error: hf:timm/bin has no model.safetensors: only models in"]
    says += [f"error: cannot download {name} (" for name in missing]
    for error, start in zip(errors, says, strict=True):
        assert error.startswith(start)
