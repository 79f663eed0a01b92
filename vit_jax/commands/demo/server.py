"""The demo's web server."""

import base64
import io
import ipaddress
import pathlib
import re

import cv2
import flask
import numpy as np
from werkzeug.serving import make_server

from vit_jax import data
from vit_jax.errors import UserError
from vit_jax.inference import attention
from vit_jax.inference.classify import make_classify, prepare
from vit_jax.inference.scores import log_softmax, top
from vit_jax.model import patch_grid

MAX_BYTES = 10 * 2**20
_PAGE = pathlib.Path(__file__).with_name("page.html")
_NUM_CLASSES = 5  # shown per image
_HEADERS = {
    # The page is one file: it loads nothing and talks only to its own server.
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def serve(trained, host, port):
    """Serves a TrainedModel on an address until interrupted.

    Raises UserError if the address cannot be used.
    """
    app = make_app(trained, trusted_hosts(host))
    try:
        server = make_server(host, port, app, threaded=True)
    except (OSError, SystemExit) as e:
        raise UserError(f"cannot listen on {url_host(host)}:{port}: choose another --port") from e
    print(f"http://{url_host(host)}:{server.port}  (Ctrl-C stops it)", flush=True)
    server.serve_forever()


def url_host(host):
    """Returns a host as browsers write it in a URL: IPv6 addresses are shortened, in brackets."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower()
    return f"[{address}]" if address.version == 6 else str(address)


def trusted_hosts(host):
    """Returns the host names accepted in requests when listening on `host`; None accepts any."""
    if host in ("", "0.0.0.0", "::"):  # all addresses: their names are unknown here
        return None
    return {url_host(host), "localhost"}


def make_app(trained, hosts):
    """Returns the Flask app for a TrainedModel.

    GET / returns the page. POST /classify takes an image file as its body and returns JSON:
    {"classes": [{"class", "probability"}], "image", "rollout": a PNG as a data URL,
    "heads": [[PNG]], one list per layer}, or {"error"} with status 400, 403, or 413.

    Args:
      trained: a TrainedModel.
      hosts: accepted host names, as from `trusted_hosts`.
    """
    app = flask.Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BYTES
    _restrict(app, hosts)
    answer = _make_answer(trained)

    @app.get("/")
    def page():
        return _PAGE.read_text(encoding="utf-8").replace("MAX_BYTES", str(MAX_BYTES))

    @app.post("/classify")
    def classify():
        try:
            return answer(_read_upload(flask.request.get_data(), trained.image_shape))
        except UserError as e:
            return {"error": str(e)}, 400

    return app


def _restrict(app, hosts):
    """Rejects requests from pages of other sites and uploads over MAX_BYTES; sets _HEADERS."""

    @app.before_request
    def check_origin():
        # Another name that resolves to this address is another site (DNS rebinding). Flask's own
        # TRUSTED_HOSTS does not support IPv6 addresses.
        host = re.sub(r":\d*$", "", flask.request.headers.get("Host", "")).lower()
        if hosts is not None and host not in hosts:
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


def _read_upload(content, image_shape):
    """Decodes an uploaded image file to the model's pixels."""
    try:
        return prepare(data.read_image(io.BytesIO(content), "upload"), image_shape)
    except UserError as e:
        raise UserError(
            "cannot read this file: upload a complete JPEG, PNG, BMP, GIF, WebP, TIFF, or PPM "
            f"image of at most {data.MAX_PIXELS // 10**6} million pixels"
        ) from e


def _make_answer(trained):
    """Returns a function from an image, uint8[H, W, C], to the JSON that the page shows."""
    classify = make_classify(trained, batch_size=1, attention=True)
    grid = patch_grid(trained.model, trained.image_shape)
    classify(np.zeros((1, *trained.image_shape), np.uint8))  # compile before the first request

    def answer(image):
        def overlay(weights):
            return _data_url(attention.overlay(image, weights, attention.TILE))

        logits, maps = classify(image[None])
        rollout = attention.attention_received(attention.rollout(maps[0]), grid)
        heads = attention.attention_received(maps[0], grid)
        return {
            "classes": top(log_softmax(logits)[0], trained.class_names, _NUM_CLASSES),
            "image": _data_url(attention.thumbnail(image, attention.TILE)),
            "rollout": overlay(rollout),
            "heads": [[overlay(head) for head in layer] for layer in heads],
        }

    return answer


def _data_url(pixels):
    encoded = cv2.imencode(".png", pixels[..., ::-1])[1]
    return f"data:image/png;base64,{base64.b64encode(encoded).decode()}"
