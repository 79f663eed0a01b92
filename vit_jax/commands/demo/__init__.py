"""Serve a local page to try a model."""

import argparse

from vit_jax.errors import UserError
from vit_jax.inference.trained import load
from vit_jax.parallel import backend


def main(argv=None):
    """Runs the command with the arguments in `argv` (default: sys.argv)."""
    parser = argparse.ArgumentParser(
        prog="vit-jax demo",
        description="Serve a page that shows the classes of an image and where each attention head "
        "looks. Uploads are read in memory and never written.",
    )
    parser.add_argument("--workdir", required=True, help="the run's directory")
    parser.add_argument("--step", default="last", help="a saved step, best, or last (default)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0: any free port")
    args = parser.parse_args(argv)
    try:
        from vit_jax.commands.demo.server import serve
    except ImportError as e:
        raise UserError("the demo needs Flask: pip install 'vit-jax[demo]'") from e
    backend.enable_compilation_cache()
    backend.check_backend()
    serve(load(args.workdir, args.step), args.host, args.port)
