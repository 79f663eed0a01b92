import pytest


@pytest.fixture
def small(tiny_config):
    c = tiny_config
    c.steps, c.log_every = 20, "1 step"
    c.model.mlp_dim = 256  # wide enough for fsdp to split it
    c.model.pool = "gap"  # the one block is computed for all tokens
    c.model.position_bias = "gaussian"
    c.model.token_shift = True
    c.optim.peak_lr = 1e-3
    c.augment.crop, c.augment.crop_padding, c.augment.flip = "pad", 2, "random"
    c.augment.mixup_alpha = 0.8
    c.tensorboard = False
    return c
