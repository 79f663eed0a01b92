"""The train command: python -m vit_jax.main --config configs/X.py [--config.field=value]."""

import argparse
import os
import pathlib
import shlex
import sys
import traceback

from vit_jax.errors import UserError, run_command

_PACKAGE = pathlib.Path(__file__).parent


def parse(argv):
    """(config, arguments) of a command line: config, workdir (never None), dry_run and debug_nans.

    Raises UserError for a wrong one.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.main",
        description="Trains a Vision Transformer by a recipe and writes the run to a workdir; "
        "started again, it continues from the newest checkpoint there.",
        epilog="--config.FIELD=VALUE changes a field of the recipe, as --config.batch_size=128 or "
        "--config.model.depth=4; vit_jax/config.py explains every field.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        type=pathlib.Path,
        metavar="RECIPE",
        help="a shipped recipe's name, such as cifar10_vit, or the path of a recipe file "
        "(default: a small ViT on drawn images)",
    )
    parser.add_argument("--workdir", type=pathlib.Path, help="default: workdirs/NAME_OF_RECIPE")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="explain the run and stop: parameters, FLOP, steps, memory and communication, from "
        "the compiled program; reads the data, writes no workdir",
    )
    parser.add_argument(
        "--debug_nans",
        action="store_true",
        help="end at the first operation that makes a NaN, and name it; slow",
    )
    args, rest = parser.parse_known_args(argv)

    from vit_jax import config as config_lib  # imports jax: after --help and a bad command line

    args.config = args.config or pathlib.Path(config_lib.DEFAULT_RECIPE)
    config = config_lib.from_file(args.config)
    config_lib.override(config, rest, "--config, --workdir, --dry_run, --debug_nans")
    args.workdir = args.workdir or pathlib.Path("workdirs") / args.config.stem
    return config, args


def compared(config):
    """{name: value} of all that the processes of a run must share before they read data."""
    import jax

    from vit_jax.config import flat

    # The data directory may differ between hosts.
    fields = {f"config.{name}": v for name, v in flat(config).items() if name != "data.dir"}
    numbers = {"NUM_PROCESSES": os.environ.get("NUM_PROCESSES"), "jax version": jax.__version__}
    return numbers | fields


def main():
    """The console script `vit-jax`, and `python -m vit_jax.main`."""
    run_command(_main)


def _main():
    config, args = parse(sys.argv[1:])
    import jax

    from vit_jax import distributed, mesh
    from vit_jax.config import DEFAULT_RECIPE

    mesh.keep_compiled()
    jax.config.update("jax_debug_nans", args.debug_nans or jax.config.jax_debug_nans)
    with distributed.joined():
        mesh.check_backend()
        distributed.check_same(compared(config))
        _run(config, args)
        first = jax.process_index() == 0
    if args.config.stem == DEFAULT_RECIPE and first:
        print(f"Next, CIFAR-10: {_python()} -m vit_jax.main --config cifar10_vit")


def _python():
    """The words that run Python in this environment, whatever the shell's PATH."""
    launcher = os.environ.get("VIT_JAX_LAUNCHER")  # set by launch.sh
    return f"{shlex.quote(launcher)} python" if launcher else shlex.quote(sys.executable)


def _run(config, args):
    import jax

    if args.dry_run:
        from vit_jax.explain import explain
        from vit_jax.run import setup

        lines = explain(setup(config), args.workdir)
        if jax.process_index() == 0:
            print(*lines, sep="\n")
        return
    from vit_jax.train import train

    command = shlex.join(["python", "-m", "vit_jax.main", *sys.argv[1:]])
    try:
        train(config, args.workdir, command=command)
    except FloatingPointError as e:  # of --debug_nans: the last of our own lines is the place
        ours = [f for f in traceback.extract_tb(e.__traceback__) if str(_PACKAGE) in f.filename]
        place = f"{pathlib.Path(ours[-1].filename).name}, line {ours[-1].lineno}: {ours[-1].line}"
        raise UserError(f"{e}, under {place}") from e


if __name__ == "__main__":
    main()
