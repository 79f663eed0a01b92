"""Write an HTML report of a run."""

import argparse
import importlib.util

from vit_jax.errors import UserError
from vit_jax.parallel import backend


def main(argv=None):
    """Runs the command with the arguments in `argv` (default: sys.argv)."""
    parser = argparse.ArgumentParser(
        prog="vit-jax report",
        description="Write curves, results, evaluation, attention, and weights of a run to one "
        "page, WORKDIR/report/index.html.",
    )
    parser.add_argument("--workdir", required=True, help="the run's directory")
    parser.add_argument(
        "--compare", nargs="+", action="extend", default=[], metavar="DIR", help="other runs"
    )
    parser.add_argument("--step", default="last", help="a saved step, best, or last (default)")
    parser.add_argument("--data", help="image folder or TFDS name (default: the run's)")
    parser.add_argument("--split", help="TFDS split (default: the test or validation split)")
    args = vars(parser.parse_args(argv))
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the report needs matplotlib: pip install 'vit-jax[report]'")
    from vit_jax.commands.report.build import write_report

    backend.start_backend()
    print(write_report(**args))
