"""Every field of a config: default, allowed values, and meaning.

A recipe in configs/ overrides some of `defaults()`.
"""

import ast
import dataclasses
import difflib
import itertools
import operator
import pathlib
import re
import runpy
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vit_jax import durations
from vit_jax.errors import UserError, expand_home

_PACKAGE = pathlib.Path(__file__).parent
# The shipped recipes are inside the package in a wheel, and next to it in a checkout.
CONFIGS = _PACKAGE / "configs"
if not CONFIGS.is_dir():
    CONFIGS = _PACKAGE.parent / "configs"
DEFAULT_RECIPE = "shapes10_vit"
# width, depth, num_heads, mlp_dim. Ti and S: DeiT (arXiv 2012.12877); B and L: ViT (arXiv
# 2010.11929), table 1.
MODEL_SIZES = {
    "notebook": (256, 6, 8, 1024),
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
}
_KINDS = {
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    tuple: "a tuple of numbers, such as (0.5, 0.5)",
}
_BOUNDS = {
    "at least": operator.ge,
    "above": operator.gt,
    "at most": operator.le,
    "below": operator.lt,
}


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a config; its type is the default's.

    `allowed` completes "config.NAME must be ..." for a value that `is_allowed` rejects, and `kind`
    completes "config.NAME takes ..." for one of another type.
    """

    default: Any
    doc: str
    allowed: str = ""
    is_allowed: Callable[[Any], bool] = lambda value: True
    choices: tuple[str, ...] = ()
    kind: str = ""

    def convert(self, value: Any) -> Any:
        """Converts a recipe's value or a command-line string to the field's type."""
        kind = type(self.default)
        if kind is str:
            if not isinstance(value, str):
                raise TypeError
            return durations.canonical(value) if self.kind == durations.KIND else value
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[str(value).lower()]
        if kind is tuple:
            value = ast.literal_eval(value) if isinstance(value, str) else value
            values = value if isinstance(value, (tuple, list)) else (value,)
            if not values or not all(isinstance(v, (int, float)) for v in values):
                raise ValueError
            return tuple(map(float, values))
        if isinstance(value, bool) or (kind is int and isinstance(value, float)):
            raise TypeError
        return kind(value)


def duration(default: str, doc: str) -> Field:
    """Defines a field that takes a duration string (see `durations`); empty means never."""
    return Field(default, doc, kind=durations.KIND)


def choice(default: str, *others: str, doc: str) -> Field:
    """Defines a field that takes one of a fixed set of strings."""
    choices = (default, *others)
    return Field(default, doc, f"one of {', '.join(choices)}", choices.__contains__, choices)


def number(default: int | float, doc: str, **bounds: float) -> Field:
    """Defines a numeric field of the default's type.

    The bounds are `at_least` and `at_most` (inclusive), `above` and `below` (exclusive). Without an
    upper bound, integers must fit in int32 and floats must be finite.
    """
    if not bounds.keys() & {"at_most", "below"}:
        bounds["below"] = 2**31 if isinstance(default, int) else float("inf")
    limits = {name.replace("_", " "): limit for name, limit in bounds.items()}

    def is_allowed(value):
        return all(_BOUNDS[words](value, limit) for words, limit in limits.items())

    allowed = " and ".join(f"{words} {limit}" for words, limit in limits.items())
    return Field(default, doc, allowed, is_allowed)


FIELDS: dict[str, Field] = {
    "seed": number(0, "seed of all randomness and of the data order", at_least=0, below=2**31),
    "num_seeds": number(1, "seeds trained in one program: seed, seed + 1, ...", at_least=1),
    "batch_size": number(64, "global batch size, over all devices and hosts", at_least=1),
    "accumulate_steps": number(1, "microbatches per batch, to save memory", at_least=1),
    "eval_batch_size": number(500, "global batch size of evaluation", at_least=1),
    "epochs": number(20.0, "length of the run in epochs", above=0, below=2**31),
    "steps": number(0, "length of the run in steps; overrides epochs (0: use epochs)", at_least=0),
    "init_from": Field("", "initial weights: a source for vit_jax.load_weights (empty: random)"),
    "tensorboard": Field(True, "write TensorBoard events"),
    "wandb": Field("", "Weights & Biases project to log to (empty: none)"),
    "log_every": duration("50 steps", "interval between logged training metrics"),
    "eval_every": duration("1 epoch", "interval between evaluations on data.val_split"),
    "stop_after": duration("", "end the run this long after its best validation accuracy"),
    "save_every": duration("1 epoch", "checkpoint interval; the newest two and the best are kept"),
    "keep_every": duration("", "interval of checkpoints that are kept permanently"),
    "on_bad_loss": choice("stop", "skip", doc="on a non-finite loss or gradient (skip: no update)"),
    "deterministic": Field(False, "bit-identical reruns on a GPU too; may be slower"),
    # The data.
    "data.name": Field(
        "cifar10", "TFDS dataset, shapes10, folder:PATH with a folder per class, or hf:OWNER/NAME"
    ),
    "data.dir": Field("", "TFDS directory (empty: TFDS_DATA_DIR, else ~/tensorflow_datasets)"),
    "data.train_split": Field("train", "split to train on, in TFDS syntax"),
    "data.val_split": Field("", "split to validate on (empty: none)"),
    "data.test_split": Field("test", "split evaluated once, after the last step (empty: none)"),
    "data.image_size": number(0, "side to crop and resize to (0: as stored)", at_least=0),
    "data.streaming": Field(False, "decode images while training; for data larger than memory"),
    "data.streaming_threads": number(16, "decoding threads per process", at_least=1),
    "data.mean": Field((0.5,) * 3, "mean per channel of pixels in [0, 1]"),
    "data.std": Field(
        (0.5,) * 3, "standard deviation per channel", "above 0", lambda std: all(s > 0 for s in std)
    ),
    # The model.
    "model.size": choice(*MODEL_SIZES, doc="sets each of the next four fields that is 0"),
    "model.width": number(0, "width of a token", at_least=0),
    "model.depth": number(0, "number of blocks", at_least=0),
    "model.num_heads": number(0, "attention heads", at_least=0),
    "model.mlp_dim": number(0, "width of the MLP's hidden layer", at_least=0),
    "model.patch_size": number(4, "side of a patch, in pixels", at_least=1),
    "model.pool": choice(
        *("cls", "gap", "map"), doc="class token, global average, or attention with an MLP"
    ),
    "model.posemb": choice("learned", "sincos2d", doc="position embeddings"),
    "model.position_bias": choice(
        *("none", "gaussian"), doc="gaussian: heads attend to a learned window, local at first"
    ),
    "model.token_shift": Field(
        False, "shift a third of the channels by one patch before each attention and MLP"
    ),
    "model.stem": choice("patch", "conv", doc="patch embedding"),
    "model.weight_init": choice("trunc_normal", "pytorch", doc="initialization"),
    "model.norm_eps": number(1e-5, "epsilon of LayerNorm", above=0),
    "model.qk_norm": Field(False, "normalize queries and keys"),
    "model.layer_scale": number(0.0, "initial value of LayerScale (0: off)", at_least=0),
    "model.dropout": number(0.0, "dropout probability", at_least=0, below=1),
    "model.drop_path": number(0.0, "drop-path rate of the last block", at_least=0, below=1),
    "model.gelu": choice("exact", "tanh", doc="tanh: the approximation in Google's weights"),
    "model.pre_logits": number(0, "width of a tanh layer before the head (0: none)", at_least=0),
    "model.image_size": number(0, "side to resize to on the device (0: unchanged)", at_least=0),
    "model.remat": Field(False, "recompute activations in the backward pass, to save memory"),
    "model.dtype": choice("float32", "bfloat16", doc="dtype of activations; weights are float32"),
    "model.matmul_precision": choice(
        "float32", "tf32", doc="precision of the float32 matrix products on a GPU"
    ),
    "model.attention": choice(
        *("xla", "cudnn"), doc="cudnn: fused in training, for long sequences in bfloat16 on a GPU"
    ),
    # Augmentation.
    "augment.crop": choice(
        *("none", "pad", "resized"),
        doc="random crop; resized: from the stored image to data.image_size; needs data.streaming",
    ),
    "augment.crop_padding": number(4, "padding of crop=pad, in pixels", at_least=1),
    "augment.crop_padding_mode": choice("zero", "reflect", doc="padding of crop=pad"),
    "augment.crop_scale": Field(
        (0.08, 1.0),
        "area of a resized crop, as a share of the image",
        "(smallest, largest), both between 0 and 1",
        lambda pair: len(pair) == 2 and 0 <= pair[0] <= pair[1] <= 1,
    ),
    "augment.flip": choice("none", "random", "alternating", doc="horizontal flip"),
    "augment.policy": choice("none", "randaugment", doc="augmentation policy"),
    "augment.randaugment_num_ops": number(2, "operations per image", at_least=1),
    "augment.randaugment_magnitude": number(9.0, "magnitude out of 10", at_least=0, at_most=10),
    "augment.randaugment_magnitude_std": number(
        0.0, "standard deviation of the magnitude", at_least=0
    ),
    "augment.erasing_prob": number(0.0, "probability of random erasing", at_least=0, at_most=1),
    "augment.mixup_alpha": number(0.0, "Beta parameter of mixup (0: off)", at_least=0),
    "augment.cutmix_alpha": number(0.0, "Beta parameter of CutMix (0: off)", at_least=0),
    "augment.mix_prob": number(1.0, "probability of mixing", at_least=0, at_most=1),
    "augment.mix_off_last": duration("", "last part of the run, without mixup and CutMix"),
    # The optimizer.
    "optim.name": choice("adamw", "sgd", "muon", doc="optimizer"),
    "optim.peak_lr": number(1e-3, "peak learning rate", at_least=0),
    "optim.end_lr": number(0.0, "final learning rate, unless schedule is constant", at_least=0),
    "optim.schedule": choice("cosine", "constant", "linear", doc="schedule after the warmup"),
    "optim.schedule_per": choice("step", "epoch", doc="when the learning rate changes"),
    "optim.warmup": duration("", "linear warmup, at most the whole run"),
    "optim.weight_decay": number(0.05, "weight decay; decoupled, except in sgd", at_least=0),
    "optim.decay": choice("kernels", "all", doc="parameters that weight decay applies to"),
    "optim.b1": number(0.9, "decay of the first moment", at_least=0, below=1),
    "optim.b2": number(0.999, "decay of the second moment", at_least=0, below=1),
    "optim.eps": number(1e-8, "epsilon of AdamW", above=0),
    "optim.momentum": number(0.9, "momentum of SGD", at_least=0, below=1),
    "optim.muon_lr": number(0.02, "peak_lr of the blocks' matrices if name is muon", at_least=0),
    "optim.grad_clip_norm": number(0.0, "maximum norm of the gradient (0: off)", at_least=0),
    "optim.label_smoothing": number(0.0, "label smoothing", at_least=0, below=1),
    "optim.ema_decay": number(0.0, "decay of the evaluated EMA (0: off)", at_least=0, below=1),
    # The devices.
    "mesh.data": number(0, "size of the data axis (0: all devices divided by fsdp)", at_least=0),
    "mesh.fsdp": number(1, "size of the fsdp axis: shards of weights and optimizer", at_least=1),
}


def defaults() -> ConfigDict:
    """Returns the default of every field, as a locked ConfigDict."""
    config = ConfigDict()
    for name, field in FIELDS.items():
        group, _, leaf = name.rpartition(".")
        if group and group not in config:
            config[group] = ConfigDict()
        (config[group] if group else config)[leaf] = field.default
    return config.lock()


def field_help() -> Iterator[str]:
    """Yields a help line per field, under its group: default, meaning, and choices."""
    for group, names in itertools.groupby(FIELDS, lambda name: name.rpartition(".")[0]):
        yield f"\n{group or 'run'}:"
        for name in names:
            field = FIELDS[name]
            default = f'"{field.default}"' if isinstance(field.default, str) else field.default
            choices = f" [{', '.join(field.choices)}]" if field.choices else ""
            yield f"  --config.{name}={default}  {field.doc}{choices}"


def model_shape(model: Mapping[str, Any]) -> dict[str, int]:
    """Returns the width, depth, num_heads, and mlp_dim of a `model` group; its size replaces 0."""
    names = ("width", "depth", "num_heads", "mlp_dim")
    sizes = zip(names, MODEL_SIZES[model["size"]], strict=True)
    return {name: model[name] or size for name, size in sizes}


def validate(config: ConfigDict) -> None:
    """Raises a one-line UserError for an invalid value or combination of values."""
    for name, field in FIELDS.items():
        value = _converted(name, config[name])
        if not field.is_allowed(value):
            hint = nearest(str(value), field.choices)
            raise UserError(f"config.{name} must be {field.allowed}; got {value!r}{hint}")
    problems = itertools.chain(_problems(config, config.augment), _model_problems(config.model))
    for problem in problems:
        raise UserError(problem)


def _problems(c, a):
    """Yields an error message for each invalid combination of fields in a config."""
    if c.batch_size < c.accumulate_steps:
        yield (
            f"config.batch_size must be at least config.accumulate_steps={c.accumulate_steps}; "
            f"got {c.batch_size}"
        )
    if not c.data.train_split or not (c.data.val_split or c.data.test_split):
        yield "config.data needs a train_split, and a test_split or a val_split"
    if c.stop_after and not c.data.val_split:
        yield "config.stop_after needs a config.data.val_split"
    if len(c.data.mean) != len(c.data.std):
        yield f"config.data.mean={c.data.mean} and std={c.data.std} must have one value per channel"
    if c.seed + c.num_seeds > 2**31:
        yield f"config.seed={c.seed} plus config.num_seeds={c.num_seeds} must be at most {2**31}"
    if c.data.streaming and c.num_seeds > 1:
        yield "config.data.streaming supports one seed only: set config.num_seeds=1"
    if a.crop == "resized" and not (c.data.streaming and c.data.image_size):
        yield "config.augment.crop=resized needs config.data.streaming=true and data.image_size"
    if a.crop == "resized" and a.flip == "alternating":
        yield (
            "config.augment.flip=alternating identifies an image by its stored pixels, which "
            "config.augment.crop=resized replaces: use flip=random"
        )
    if (a.mixup_alpha or a.cutmix_alpha) and c.batch_size < 2:
        yield (
            "config.augment mixes pairs of images, but config.batch_size is 1: raise it, or set "
            "mixup_alpha and cutmix_alpha to 0"
        )


def _model_problems(m):
    width, num_heads = (model_shape(m)[name] for name in ("width", "num_heads"))
    if width % num_heads:
        yield (
            f"config.model.num_heads={num_heads} does not divide config.model.width={width}: set "
            "num_heads to a divisor of the width"
        )
    head = width // num_heads
    if m.attention == "cudnn" and (m.dtype != "bfloat16" or m.dropout or head % 8 or head > 128):
        yield (
            "config.model.attention=cudnn needs model.dtype=bfloat16, model.dropout=0, and "
            "width / num_heads a multiple of 8 up to 128; got "
            f"{m.dtype}, {m.dropout:g}, and {head}"
        )
    if m.token_shift and m.pool == "cls":
        yield (
            "config.model.token_shift=True needs a model.pool without a class token (gap or map); "
            "got cls"
        )
    if m.position_bias == "gaussian" and (m.pool == "cls" or m.attention == "cudnn"):
        yield (
            "config.model.position_bias=gaussian needs a model.pool without a class token (gap "
            f"or map) and model.attention=xla; got {m.pool} and {m.attention}"
        )
    if m.posemb == "sincos2d" and (width % 4 or width < 8):
        yield (
            "config.model.posemb=sincos2d needs a width that is a multiple of 4 and at least 8; "
            f"got {width}"
        )
    if m.stem == "conv" and (m.patch_size & (m.patch_size - 1) or m.patch_size < 2):
        yield f"config.model.stem=conv needs a patch_size that is a power of 2; got {m.patch_size}"


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns ' (did you mean X?)', or '' if no name is close."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def recipe_path(name: str | pathlib.Path) -> pathlib.Path:
    """Returns the path of a recipe, by path or shipped name. Raises UserError if neither exists."""
    path = expand_home(name)
    shipped = {p.stem: p for p in sorted(CONFIGS.glob("*.py"))}
    if str(name) in shipped and not path.is_file():
        return shipped[str(name)]
    if path.exists() and not path.is_dir():
        return path
    problem = "is a directory" if path.is_dir() else "does not exist"
    raise UserError(
        f"the config file {name} {problem}{nearest(path.stem, shipped)}: pass the path of a "
        f"Python file, or one of {', '.join(shipped)}"
    )


def from_file(path: str | pathlib.Path) -> ConfigDict:
    """Returns the config that `get_config()` in a recipe's Python file returns; see `recipe_path`.

    Executes the file. Raises UserError if that fails, or if the result is not a ConfigDict of known
    fields with values of their types. Call `validate` to check the values.
    """
    path = recipe_path(path)
    try:
        config = runpy.run_path(str(path))["get_config"]()
    except UserError:
        raise
    except Exception as e:  # a recipe can raise anything
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == str(path)]
        place = f"{path}, line {lines[-1]}," if lines else path
        problem = f"{type(e).__name__}: {e}"
        if isinstance(e, (KeyError, AttributeError)):  # get_config, or a field of the locked config
            words = re.findall(r"\w+", str(e).removeprefix("'Key \""))
            name = getattr(e, "name", None) or [*words, repr(e)][0]
            problem = f"no field or function {name}{_renamed(name, 'N')}"
        raise UserError(f"the config file {place} fails: {problem}") from e
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config() of {path} must return a ConfigDict, not {type(config)}")
    return from_dict(config.to_dict())


def from_dict(values: dict) -> ConfigDict:
    """Returns the config of `config.to_dict()` or its JSON, in which tuples are lists.

    Raises UserError for an unknown field or a value of the wrong type.
    """
    if not isinstance(values, dict):
        raise UserError(f"a config must be an object of fields; got {type(values).__name__}")
    config = defaults()

    def update(values, prefix=""):
        for name, value in values.items():
            if isinstance(value, dict):
                update(value, f"{prefix}{name}.")
            else:
                set_field(config, prefix + name, value)

    update(values)
    return config


def set_field(config: ConfigDict, name: str, value: Any) -> None:
    """Sets a field, by dotted name, to a value or a command-line string.

    Raises UserError for an unknown field, a group, or a value of the wrong type.
    """
    if name not in FIELDS:
        raise UserError(f"unknown config field {name}{_renamed(name, value)}")
    config.update_from_flattened_dict({name: _converted(name, value)})


def _converted(name: str, value: Any) -> Any:
    field = FIELDS[name]
    try:
        return field.convert(value)
    except Exception:  # ast.literal_eval raises many types
        kind = field.kind or _KINDS[type(field.default)]
        shown = repr(value) if len(repr(value)) < 100 else f"{repr(value)[:100]}..."
        raise UserError(f"config.{name} takes {kind}; got {shown}") from None


def _renamed(name: str, value: Any) -> str:
    """Returns a hint for an unknown name: a field's current or usual name, or the nearest field."""
    if name.split(".")[-1] in ("lr", "learning_rate", "base_lr"):
        return " (did you mean optim.peak_lr?)"
    if match := re.fullmatch(r"(?:.*\.)?(\w+?)_(steps|epochs|examples|percent)", name):
        old, unit = match[1].replace("checkpoint_every", "save_every"), match[2]
        amount = f"{value}%" if unit == "percent" else f"{value} {unit}"
        for field in FIELDS:
            if field.split(".")[-1] == old:
                return f": write --config.{field}={amount!r}"
    return nearest(name, FIELDS)


# Fields that a field on the command line replaces, if the recipe sets them.
_REPLACED = {
    "epochs": ("steps",),
    "model.size": ("model.width", "model.depth", "model.num_heads", "model.mlp_dim"),
}


def override(config: ConfigDict, arguments: Sequence[str], flags: str) -> None:
    """Applies --config.FIELD=VALUE or --config.FIELD VALUE arguments, and validates the config.

    Unless they are also given, `epochs` replaces the recipe's `steps`, and `model.size` its width,
    depth, heads, and MLP. Raises UserError for other arguments, naming the command's own `flags`.
    """
    arguments, given = list(arguments), set()
    while arguments:
        name, equals, value = arguments.pop(0).partition("=")
        if not name.startswith("--config."):
            raise UserError(f"unknown argument {name}: use {flags} or --config.FIELD=VALUE")
        if not equals:
            if not arguments:
                raise UserError(f"{name} needs a value: {name}=VALUE")
            value = arguments.pop(0)
        set_field(config, name := name.removeprefix("--config."), value)
        given.add(name)
    for name, others in _REPLACED.items():
        if name in given:
            config.update_from_flattened_dict(dict.fromkeys(set(others) - given, 0))
    validate(config)


def difference(config: ConfigDict, other: ConfigDict, *, ignore: Sequence[str] = ()) -> list[str]:
    """Returns 'field: a, was b' for every field in which `config` differs from `other`."""
    new, old = flat(config), flat(other)
    changed = [name for name in FIELDS if new[name] != old[name] and name not in ignore]
    return [f"{name}: {new[name]!r}, was {old[name]!r}" for name in changed]


def flat(config: ConfigDict) -> dict[str, Any]:
    """Returns {dotted name: value} of every field."""
    return {name: config[name] for name in FIELDS}
