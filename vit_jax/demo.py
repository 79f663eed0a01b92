"""A page to try a model: python -m vit_jax.demo --workdir D, then open the address it prints.

Drop an image on the page and see its classes, and where each head of each layer looks. It listens
on this machine alone unless --host says otherwise; an upload is read in memory, never written.
"""

import argparse
import base64
import io
import pathlib

import cv2
import numpy as np
from PIL import Image

from vit_jax import attention, data, mesh
from vit_jax.classify import make_classify, patch_grid, prepare
from vit_jax.errors import UserError, run_command
from vit_jax.loading import load
from vit_jax.scores import log_softmax, top

MAX_BYTES, MAX_PIXELS = 10 * 2**20, 40_000_000
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
    too_many = f"this image has more than {MAX_PIXELS:,} pixels: make it smaller"
    try:
        with Image.open(io.BytesIO(content)) as image:  # reads the header alone
            width, height = image.size
    except Image.DecompressionBombError as e:
        raise UserError(too_many) from e
    except Exception as e:  # Pillow raises many kinds
        raise UserError("this is no image file that can be read") from e
    if width * height > MAX_PIXELS:
        raise UserError(too_many)
    try:
        return prepare(data.read_image(io.BytesIO(content)), image_shape)
    except UserError as e:
        raise UserError("this image file is damaged") from e


def make_app(loaded, hosts):
    """The Flask app of what `vit_jax.load` gave; it answers to these host names alone, None: any.

    GET / is the page; POST /classify takes an image file as its body and answers JSON:
    {"classes": [{"class", "probability"}], "image", "rollout": a PNG as data URL,
    "heads": [[PNG]]}, a list for each layer; or {"error"} with status 400, 403 or 413.
    """
    import flask

    app = flask.Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BYTES
    # A page of another name that resolves to this address is not this page (DNS rebinding).
    app.config["TRUSTED_HOSTS"] = hosts
    classify, grid = make_classify(loaded, batch_size=1, attention=True), patch_grid(loaded)
    classify(
        np.zeros((1, *loaded.image_shape), np.uint8)
    )  # compiles now: the first answer is quick

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
    anywhere = args.host in ("0.0.0.0", "::")  # then it has names that only others know
    hosts = None if anywhere else [args.host, "localhost"]
    app = make_app(load(args.workdir, args.step), hosts)
    try:
        server = make_server(args.host, args.port, app, threaded=True)
    except (OSError, SystemExit) as e:
        raise UserError(f"cannot listen on {args.host}:{args.port}: choose another --port") from e
    print(f"http://{args.host}:{server.port}  (Ctrl-C ends it)", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    run_command(main)
