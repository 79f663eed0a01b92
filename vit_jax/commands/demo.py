"""Serve a local page to try a model."""

import argparse
import base64
import contextlib
import io
import json
import pathlib
import re
import sys

import cv2
import numpy as np

from vit_jax import data
from vit_jax.data.source import printable
from vit_jax.errors import UserError, expand_home
from vit_jax.inference import attention
from vit_jax.inference.classify import load_examples, make_classify, prepare
from vit_jax.inference.scores import log_softmax, top
from vit_jax.inference.trained import load
from vit_jax.model import patch_grid
from vit_jax.parallel import backend

try:
    import flask
    from werkzeug.serving import make_server
except ImportError as e:
    raise UserError("the demo needs Flask: pip install 'vit-jax[demo]'") from e

MAX_BYTES = 10 * 2**20
_PAGE = pathlib.Path(__file__).with_name("demo.html")
_NUM_CLASSES = 5  # shown per image
_NUM_EXAMPLES = 12
_HEADERS = {
    # The page is one file: it loads nothing and talks only to its own server.
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


def main(argv=None):
    """Runs the command with the arguments in `argv` (default: sys.argv)."""
    parser = argparse.ArgumentParser(
        prog="vit-jax demo",
        description="Serve a page that shows the classes of an image and where each attention head "
        "looks. Uploads are read in memory and never written.",
    )
    parser.add_argument("--workdir", required=True, help="the run's directory")
    parser.add_argument("--step", default="last", help="a saved step, best, or last (default)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="0: any free port")
    args = parser.parse_args(argv)
    if not 0 <= args.port < 2**16:
        raise UserError(f"--port {args.port}: use 0 to 65535")
    backend.start_backend()
    trained = load(args.workdir, args.step)
    app = make_app(trained, args.host, greet(trained, args.workdir))
    name = url_host(args.host)
    try:
        server = make_server(args.host, args.port, app, threaded=True)
    except (OSError, SystemExit) as e:
        raise UserError(f"cannot listen on {name}:{args.port}: choose another --port") from e
    print(f"http://{name}:{server.port}  (Ctrl-C stops it)", flush=True)
    server.serve_forever()


def url_host(host):
    """Returns a host as browsers write it in a URL: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host.lower()


def greet(trained, workdir):
    """Returns the values that the page shows before the first upload.

    {"name" of the run, "accuracy" on its test split or None, "classes", "split", "examples" of it:
    [{"class", "image": a PNG as a data URL}]}. Without the run's data there are no examples.
    """
    workdir, accuracy = expand_home(workdir), None
    with contextlib.suppress(OSError, LookupError, TypeError, ValueError):  # no result, or no split
        result = json.loads((workdir / "result.json").read_text())
        if result["steps"] == trained.step:
            accuracy = f"{result['test_accuracy']:.2%}"
    split, examples = None, []
    try:
        source, split = load_examples(trained)
        rows = np.linspace(0, source.num_examples - 1, min(_NUM_EXAMPLES, source.num_examples))
        for image, label in zip(*source.examples(rows.astype(int)), strict=True):
            examples.append({"class": source.class_names[label], "image": _data_url(image)})
    except UserError as e:
        print(f"The page shows no images of the run's data: {e}", file=sys.stderr)
    return {
        "name": printable(workdir.resolve().name),
        "accuracy": accuracy,
        "classes": trained.class_names,
        "split": split,
        "examples": examples,
    }


def make_app(trained, host, greeting):
    """Returns the Flask app for a TrainedModel, to listen on `host`.

    GET / returns the page, with the values of `greet`. POST /classify takes an image file as its
    body and returns JSON: {"classes": [{"class", "probability"}], "image", "rollout": a PNG as a
    data URL, "heads": [[PNG]], one list per layer}, or {"error"} with status 400, 403, or 413.
    """
    app = flask.Flask(__name__, static_folder=None)
    _restrict(app, host)
    classify = make_classify(trained, batch_size=1, attention=True)
    grid = patch_grid(trained.model, trained.image_shape)
    classify(np.zeros((1, *trained.image_shape), np.uint8))  # compile before the first request

    @app.get("/")
    def page():
        text = _PAGE.read_text(encoding="utf-8")
        return flask.render_template_string(text, max_bytes=MAX_BYTES, **greeting)

    @app.post("/classify")
    def answer():
        try:
            upload = data.read_image(io.BytesIO(flask.request.get_data()), "upload")
            image = prepare(upload, trained.image_shape)
        except UserError:
            formats = "a complete JPEG, PNG, BMP, GIF, WebP, TIFF, or PPM image"
            limit = f"at most {data.MAX_PIXELS // 10**6} million pixels"
            return {"error": f"cannot read this file: upload {formats} of {limit}"}, 400
        logits, maps = classify(image[None])
        classes = top(log_softmax(logits)[0], trained.class_names, _NUM_CLASSES)
        return {"classes": classes, **_pictures(image, maps[0], grid)}

    return app


def _restrict(app, host):
    """Rejects requests from pages of other sites and uploads over MAX_BYTES; sets _HEADERS."""
    app.config["MAX_CONTENT_LENGTH"] = MAX_BYTES

    @app.before_request
    def check_origin():
        # Another name that resolves to this address is another site (DNS rebinding). Flask's own
        # TRUSTED_HOSTS does not support IPv6 addresses. If the demo listens on all addresses, its
        # names are unknown, so any is accepted.
        name = re.sub(r":\d*$", "", flask.request.headers.get("Host", "")).lower()
        if host not in ("", "0.0.0.0", "::") and name not in (url_host(host), "localhost"):
            return {"error": "unknown host name: use the address that the demo printed"}, 400
        site = flask.request.headers.get("Sec-Fetch-Site", "same-origin")
        if flask.request.method == "POST" and site != "same-origin":
            return {"error": "requests from pages of other sites are not accepted"}, 403

    @app.after_request
    def add_headers(response):
        response.headers.update(_HEADERS)
        return response

    @app.errorhandler(413)
    def too_large(_):
        return {"error": f"this file is larger than {MAX_BYTES // 2**20} MB"}, 413


def _pictures(image, maps, grid):
    """Returns the page's images of float[L, h, N, N] attention maps: PNGs as data URLs."""

    def overlay(weights):
        return _data_url(attention.overlay(image, weights, attention.TILE))

    layers = attention.attention_received(maps, grid)
    return {
        "image": _data_url(attention.thumbnail(image, attention.TILE)),
        "rollout": overlay(attention.attention_received(attention.rollout(maps), grid)),
        "heads": [[overlay(head) for head in layer] for layer in layers],
    }


def _data_url(pixels):
    encoded = cv2.imencode(".png", pixels[..., ::-1])[1]
    return f"data:image/png;base64,{base64.b64encode(encoded).decode()}"
