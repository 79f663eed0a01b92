"""Fuzzer: any input bytes give a value or a one-line error; no traceback, hang, or stray file.

    python tests/faults/fuzz.py --examples 5000                 hypothesis, every target
    python tests/faults/fuzz.py --atheris image --seconds 300   coverage-guided, with atheris

tests/faults/test_fuzz.py runs a few hundred hypothesis examples in CI.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import unittest.mock

import hypothesis
import numpy as np
from flax.traverse_util import flatten_dict
from hypothesis import strategies as st

if "--atheris" in sys.argv:
    import atheris

    watched = atheris.instrument_imports(include=["vit_jax", "PIL", "numpy.lib", "safetensors"])
else:
    watched = contextlib.nullcontext()
with watched:
    from PIL import Image

    from vit_jax import config, data, durations, main, weights
    from vit_jax.commands.report import figures, page, sections
    from vit_jax.commands.report.records import read_records
    from vit_jax.errors import UserError
    from vit_jax.inference import trained
    from vit_jax.model import init_params, make_model
    from vit_jax.weights import layouts
    from vit_jax.workdir import checkpoints, files, metrics

# The fields that load_weights reads from config.json and preprocessor_config.json.
HUGGING_FACE = {
    "model_type": "vit",
    "num_attention_heads": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 8,
    "id2label": {"0": "a", "1": "b"},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
RUN = {
    "command": "python -m vit_jax.main --config configs/cifar10_vit.py",
    "date": "2026-01-01T00:00:00+00:00",
    "commit": None,
    "versions": {"jax": "0.10.2"},
    "host": "a",
    "devices": ["cpu"],
    "processes": 1,
}
METRICS = {"step": 1, "val/accuracy": 0.5, "train/loss": 1.0, "train/lr": 0.1}
RESULT = {
    "train_loss": 1.0,
    "test_accuracy": 0.5,
    "test_loss": 1.0,
    "val_accuracy": 0.5,
    "seconds": 1.0,
    "images_per_second": None,
    "num_params": 10,
    "device": "1 x cpu",
}
# The targets that read one JSON object, and a valid one.
OBJECTS = {
    "huggingface": HUGGING_FACE,
    "report_run": RUN,
    "report_result": RESULT,
    "report_metrics": METRICS,
}
SECONDS = 20  # an input that takes longer counts as a hang


class Targets:
    """Each method takes bytes, and either returns or raises UserError; `seeds` are valid inputs.

    Everything is written under one folder; opening a file elsewhere to write is an error.
    """

    def __init__(self, folder):
        import jax

        self.folder = folder
        (folder / "in").mkdir()
        c = config.defaults()
        c.model.update({"width": 8, "depth": 1, "num_heads": 2, "mlp_dim": 8, "patch_size": 4})
        vit = make_model(c.model, num_classes=2)
        shapes = jax.eval_shape(lambda k: init_params(vit, k, (8, 8, 3)), jax.random.key(0))
        params = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), shapes)
        saved = {
            "config": c.to_dict(),
            "class_names": ["a", "b"],
            "image_shape": [8, 8, 3],
            "num_heads": 2,
            "preprocessing": {"divide_by": 255, "mean": [0.5] * 3, "std": [0.5] * 3},
        }
        self.workdir = folder / "in" / "workdir"
        writer = checkpoints.Checkpoints(self.workdir / "checkpoints", durations.Every(0))
        items = {"params": params, "ema_params": None, "opt_state": {"n": np.int32(0)}}
        writer.save(1, items, {"config": saved, "data": {}, "progress": {}}, None)
        writer.close()
        self.saved = self.workdir / "checkpoints" / "1" / "config" / "metadata"

        rng = np.random.default_rng(0)
        images = []
        for mode in ("RGB", "L", "P", "RGBA", "CMYK"):
            image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).convert(mode)
            for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"):
                file = io.BytesIO()
                try:
                    image.save(file, kind)
                except (OSError, KeyError, ValueError):  # not every format supports every mode
                    continue
                images.append(file.getvalue())
        flat = layouts.from_params(params, layouts.GOOGLE, num_heads=2)
        npz = io.BytesIO()
        np.savez(npz, **flat)
        from safetensors.numpy import save

        lines = "".join(json.dumps({**METRICS, "step": step}) + "\n" for step in (1, 2))
        fields = list(config.FIELDS)
        settings = [f"{n}={c[n]}".encode() for n in fields]
        (folder / "in" / "huggingface").mkdir()
        hugging = layouts.from_params(params, layouts.HUGGINGFACE, num_heads=2)
        (folder / "in" / "huggingface" / "model.safetensors").write_bytes(save(hugging))
        self.own = {**{k: v for k, v in saved.items() if k != "config"}, "model": dict(c.model)}
        self.own_tensors = flatten_dict(params, sep="/")
        self.seeds = {
            "override": settings,
            "recipe_json": [json.dumps(c.to_dict()).encode()],
            "image": images,
            "npz": [npz.getvalue()],
            "safetensors": [save(flat), self.own_file(self.own)],
            "huggingface": [json.dumps(HUGGING_FACE).encode()],
            "checkpoint": [self.saved.read_bytes()],
            "metrics": [lines.encode()],
            "report_run": [json.dumps(RUN).encode()],
            "report_result": [json.dumps(RESULT).encode()],
            "report_metrics": [lines.encode()],
        }
        self.report = folder / "in" / "report"
        self.report.mkdir()
        (self.report / "config.json").write_text(json.dumps(c.to_dict()))
        self._restore_report()

    def own_file(self, metadata):
        from safetensors.numpy import save

        return save(self.own_tensors, {"vit_jax": json.dumps(metadata)})

    def override(self, given):
        main.parse([f"--config.{given.decode(errors='replace')}"])

    def recipe_json(self, given):
        try:
            values = json.loads(given)
        except (ValueError, RecursionError):
            return
        config.validate(config.from_dict(values))

    def image(self, given):
        image = data.read_image(io.BytesIO(given), "an image")
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3

    def npz(self, given):
        path = self.folder / "in" / "weights.npz"
        path.write_bytes(given)
        weights.load_weights(path, num_heads=2)

    def safetensors(self, given):
        path = self.folder / "in" / "weights.safetensors"
        path.write_bytes(given)
        weights.load_weights(path, num_heads=2)

    def huggingface(self, given):
        folder = self.folder / "in" / "huggingface"
        for name in ("config.json", "preprocessor_config.json"):
            (folder / name).write_bytes(given)
        weights.load_weights(folder)

    def checkpoint(self, given):
        self.saved.write_bytes(given)
        folder = self.saved.parents[1]
        (folder / "SHA256SUMS").unlink()
        files.write_checksums(folder)  # as an attacker would
        trained.load(self.workdir)
        weights.load_weights(self.workdir)

    def metrics(self, given):
        path = self.workdir / "metrics.jsonl"
        path.write_bytes(given)
        try:
            trained._best_step(self.workdir, [1])
        finally:
            metrics.JsonLines(path, step=1).close()

    def report_run(self, given):
        self._report("run.json", given)

    def report_result(self, given):
        self._report("result.json", given)

    def report_metrics(self, given):
        self._report("metrics.jsonl", given)

    def _report(self, name, given):
        """Builds the parts of the page that come from the run's files, without drawing figures."""
        (self.report / name).write_bytes(given)
        try:
            records = read_records(self.report)
            with unittest.mock.patch.object(page, "plot", lambda _: ""), figures.style():
                parts = [
                    sections.notices(records, "a"),
                    sections.results([("a", records), ("b", records)]),
                    sections.curves([("a", records)]),
                    sections.provenance(records),
                ]
            page.render("a", parts)
        finally:
            self._restore_report()

    def _restore_report(self):
        (self.report / "run.json").write_text(json.dumps(RUN))
        (self.report / "result.json").write_text(json.dumps(RESULT))
        (self.report / "metrics.jsonl").write_bytes(self.seeds["metrics"][0])

    def run(self, name, given):
        """'value', or 'refused' for a UserError. Reraises other exceptions."""

        def hangs(*_):
            raise AssertionError(f"no end after {SECONDS} s")

        signal.signal(signal.SIGALRM, hangs)
        signal.alarm(SECONDS)
        _watched.append(self.folder)
        try:
            getattr(self, name)(given)
            return "value"
        except UserError as e:
            assert len(" ".join(str(e).split())) < 3000 + 8 * len(
                given
            )  # the message may quote the input
            return "refused"
        finally:
            _watched.pop()
            signal.alarm(0)


_watched = []  # the folder under which files may be written, during a run


def _audit(event, args):
    if not _watched or event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.symlink"):
        return
    path = args[0] if event != "os.rename" else args[1]
    if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    if isinstance(path, (str, bytes)):
        path = os.fsdecode(path)
        inside = os.path.realpath(path).startswith(os.path.realpath(_watched[-1]))
        if not inside and path != os.devnull and "__pycache__" not in path:
            raise AssertionError(f"{event} {path} outside the workdir")


sys.addaudithook(_audit)


def mutated(seeds):
    """A strategy: one of the valid inputs, with a few bytes changed, removed, or inserted."""
    edits = st.lists(
        st.tuples(
            st.floats(0, 1), st.sampled_from(["set", "cut", "insert"]), st.binary(max_size=8)
        ),
        max_size=6,
    )

    def apply(seed, edits):
        value = bytearray(seed)
        for place, what, new in edits:
            i = int(place * len(value))
            value[i : i + (0 if what == "insert" else max(len(new), 1))] = (
                b"" if what == "cut" else new
            )
        return bytes(value)

    return st.builds(apply, st.sampled_from(seeds), edits)


def texts_of(names):
    """A strategy for overrides: a field, possibly misspelled, and a value of any type."""
    values = st.one_of(
        st.integers().map(str),
        st.floats().map(str),
        st.text(max_size=30),
        st.sampled_from(["true", "()", "(1,)", "[0.5, 0.5, 0.5]", "(" * 5000, "9" * 5000, "1e999"]),
        st.recursive(st.integers() | st.text(max_size=3), st.lists, max_leaves=5).map(repr),
    )
    names = st.one_of(st.sampled_from(names), st.text(max_size=20))
    return st.tuples(names, values).map(lambda t: "=".join(t).encode(errors="replace"))


def values_in(names):
    """A strategy for JSON values of any type; objects use these names and others."""
    scalar = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    scalar |= st.sampled_from(['"', "--config '", "\ud800", 10**400])
    return st.recursive(
        scalar, lambda v: st.lists(v, max_size=4) | st.dictionaries(names, v, max_size=4)
    )


def changed(valid):
    """A strategy for a dict with up to three fields changed to any JSON value, and one missing."""
    values = values_in(st.sampled_from(list(valid)) | st.integers().map(str))
    changes = st.dictionaries(st.sampled_from(list(valid)), values, max_size=3)
    missing = st.none() | st.sampled_from(list(valid))

    def apply(changes, missing):
        return {name: value for name, value in (valid | changes).items() if name != missing}

    return st.builds(apply, changes, missing)


def jsons():
    """A strategy for a config's JSON: fields with values of any type, and any other JSON."""
    names = st.sampled_from(list(config.FIELDS)) | st.text(max_size=9)
    value = values_in(names)

    def nested(flat):
        tree = {}
        for name, leaf in flat.items():
            *groups, last = name.split(".")
            place = tree
            for group in groups:
                place = place.setdefault(group, {}) if isinstance(place, dict) else {}
            if isinstance(place, dict):
                place[last] = leaf
        return tree

    config_like = st.dictionaries(names, value, max_size=6).map(nested)
    return (config_like | value).map(lambda v: json.dumps(v).encode())


def strategy(targets, name):
    given = st.binary(max_size=200) | mutated(targets.seeds[name])
    if name == "override":
        given |= texts_of(list(config.FIELDS))
    if name == "recipe_json":
        given |= jsons()
    if name in OBJECTS:
        given = changed(OBJECTS[name]).map(lambda fields: json.dumps(fields).encode()) | given
    if name == "safetensors":
        models = changed(targets.own["model"]).map(lambda model: targets.own | {"model": model})
        given |= (changed(targets.own) | models).map(targets.own_file)
    return given


def check(targets, name, examples):
    """Runs a target on `examples` inputs; returns a count of each outcome."""
    ends = collections.Counter()

    @hypothesis.settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(strategy(targets, name))
    def each(given):
        ends[targets.run(name, given)] += 1

    each()
    return ends


def with_atheris(targets, name, seconds, corpus):
    """Coverage-guided, starting from the valid inputs; ends the process."""
    for i, seed in enumerate(targets.seeds[name]):
        (corpus / f"seed{i}").write_bytes(seed)
    ends = collections.Counter()
    began = time.monotonic()

    def one(given):
        ends[targets.run(name, given)] += 1
        if time.monotonic() - began > seconds:
            print(f"{name}: {sum(ends.values()):,} inputs, {dict(ends)}", flush=True)
            os._exit(0)

    atheris.Setup([sys.argv[0], "-max_len=8192", "-verbosity=0", str(corpus)], one)
    atheris.Fuzz()


def run():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=5000)
    parser.add_argument("--atheris", help="a target")
    parser.add_argument("--seconds", type=int, default=300)
    args = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp())
    os.chdir(folder)
    targets = Targets(folder)
    if args.atheris:
        (folder / "corpus").mkdir()
        with_atheris(targets, args.atheris, args.seconds, folder / "corpus")
    for name in targets.seeds:
        began = time.monotonic()
        ends = check(targets, name, args.examples)
        seconds = time.monotonic() - began
        print(f"{name}: {sum(ends.values()):,} inputs, {dict(ends)}, {seconds:.0f} s", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    random.seed(0)
    run()
