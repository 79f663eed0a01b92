"""A missing home directory is one line wherever a path is expanded."""

import pwd

import pytest

from vit_jax import config, data, main, weights
from vit_jax.data.source import user_cache
from vit_jax.errors import UserError


@pytest.mark.parametrize(
    "expand",
    [
        lambda: config.recipe_path("~/recipe.py"),
        lambda: weights.load_weights("~/weights.npz"),
        lambda: data.open_split("folder:~/images", "train"),
        lambda: data.open_split("shapes10", "train"),
        lambda: user_cache("tfds"),
        lambda: main.parse(["--config", "~/recipe.py"]),
    ],
)
def test_missing_home_directory_is_an_error(expand, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "TFDS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid):
        raise KeyError(uid)  # as for a user without an entry in the password database

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(UserError, match="this user has no home directory; set HOME"):
        expand()
