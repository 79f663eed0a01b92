"""A page to try a model: python -m vit_jax.demo --workdir D, then open the address it prints.

Drop an image on the page and see its classes, and where each head of each layer looks. It listens
on this machine alone unless --host says otherwise; an upload is read in memory, never written.
"""

import argparse
import base64
import io
import ipaddress
import pathlib
import re

import cv2
import numpy as np

from vit_jax import attention, data, mesh
from vit_jax.classify import make_classify, patch_grid, prepare
from vit_jax.errors import UserError, run_command
from vit_jax.loading import load
from vit_jax.scores import log_softmax, top

MAX_BYTES = 10 * 2**20
PAGE = pathlib.Path(__file__).with_name("demo.html")
HEADERS = {
    # The page is one file: it may load nothing, and only talk to the server that it came from.
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def read_upload(content, image_shape):
    """The bytes of an image file as pixels for the model. Raises UserError for anything else."""
    try:
        return prepare(data.read_image(io.BytesIO(content), "upload"), image_shape)
    except UserError as e:
        raise UserError(
            "cannot read this file: upload a complete JPEG, PNG, BMP, GIF, WebP, TIFF, or PPM "
            f"image of at most {data.MAX_PIXELS // 10**6} million pixels"
        ) from e


def url_host(host):
    """The host of a URL as browsers write it: an IPv6 address is shortened and in brackets."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower()
    return f"[{address}]" if address.version == 6 else str(address)


def trusted_hosts(host):
    """The names in URLs that the demo answers to when it listens on `host`; None for any name."""
    if host in ("", "0.0.0.0", "::"):  # every address, whose names only others know
        return None
    return {url_host(host), "localhost"}


def make_app(loaded, hosts):
    """The Flask app of what `vit_jax.load` gave; it answers to these host names alone, None: any.

    GET / is the page; POST /classify takes an image file as its body and answers JSON:
    {"classes": [{"class", "probability"}], "image", "rollout": a PNG as data URL,
    "heads": [[PNG]]}, a list for each layer; or {"error"} with status 400, 403 or 413.
    """
    import flask

    app = flask.Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BYTES
    classify, grid = make_classify(loaded, batch_size=1, attention=True), patch_grid(loaded)
    classify(
        np.zeros((1, *loaded.image_shape), np.uint8)
    )  # compiles now: the first answer is quick

    @app.before_request
    def check_host():
        # A page of another name that resolves to this address is not this page (DNS rebinding).
        # Flask's own TRUSTED_HOSTS cannot name an IPv6 address.
        host = re.sub(r":\d*$", "", flask.request.headers.get("Host", "")).lower()
        if hosts is not None and host not in hosts:
            return {"error": "this demo does not answer to that host name"}, 400

    @app.after_request
    def add_headers(response):
        response.headers.update(HEADERS)
        return response

    @app.errorhandler(413)
    def too_large(_):
        return {"error": f"this file is larger than {MAX_BYTES // 2**20} MB"}, 413

    @app.get("/")
    def page():
        return PAGE.read_text().replace("MAX_BYTES", str(MAX_BYTES))

    @app.post("/classify")
    def answer():
        if flask.request.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
            return {"error": "another site's page may not ask"}, 403
        try:
            image = read_upload(flask.request.get_data(), loaded.image_shape)
        except UserError as e:
            return {"error": str(e)}, 400
        logits, maps = classify(image[None])
        flow = attention.looked_at(attention.rollout(maps[0]), grid)
        looks = attention.looked_at(maps[0], grid)
        side = attention.TILE
        return {
            "classes": top(log_softmax(logits)[0], loaded.class_names, 5),
            "image": _png(attention.plain(image, side)),
            "rollout": _png(attention.overlay(image, flow, side)),
            "heads": [[_png(attention.overlay(image, w, side)) for w in layer] for layer in looks],
        }

    return app


def _png(pixels):
    encoded = cv2.imencode(".png", pixels[..., ::-1])[1]
    return f"data:image/png;base64,{base64.b64encode(encoded).decode()}"


def main():
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", required=True, help="the run's directory")
    parser.add_argument("--step", default="last", help="a saved step, best or last (default)")
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    args = parser.parse_args()
    try:
        from werkzeug.serving import make_server
    except ImportError as e:
        raise UserError("the demo needs Flask: pip install 'vit-jax[demo]'") from e
    mesh.keep_compiled()
    mesh.check_backend()
    app = make_app(load(args.workdir, args.step), trusted_hosts(args.host))
    try:
        server = make_server(args.host, args.port, app, threaded=True)
    except (OSError, SystemExit) as e:
        raise UserError(f"cannot listen on {args.host}:{args.port}: choose another --port") from e
    print(f"http://{url_host(args.host)}:{server.port}  (Ctrl-C ends it)", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    run_command(main)
