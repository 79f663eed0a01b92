"""Models on the Hugging Face hub, by name: hf:OWNER/NAME or hf:OWNER/NAME@REVISION.

huggingface_hub caches the files (HF_HOME), resumes an interrupted download, and with
HF_HUB_OFFLINE=1 uses only the cache.
"""

import pathlib

from vit_jax.errors import UserError

_FILES = ("model.safetensors", "config.json", "preprocessor_config.json")


def download(name):
    """Returns the folder of a model's files, downloaded if they are not cached.

    Raises UserError if the model does not exist, has no model.safetensors, or cannot be downloaded.
    """
    try:
        import huggingface_hub
    except ImportError as e:
        raise UserError(f"{name} needs huggingface_hub: pip install 'vit-jax[hf]'") from e
    repository, _, revision = name.removeprefix("hf:").partition("@")
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=_FILES
        )
    except Exception as e:  # it raises many types, some of its HTTP library
        reason = " ".join(str(e).split())[:200]
        raise UserError(f"cannot download {name} ({type(e).__name__}: {reason})") from e
    if not (pathlib.Path(folder) / _FILES[0]).exists():
        raise UserError(f"{name} has no {_FILES[0]}: only models in this format are read")
    return pathlib.Path(folder)
