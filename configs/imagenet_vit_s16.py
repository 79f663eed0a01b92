"""ViT-S/16 on ImageNet-1k, 90 epochs: the plain recipe of Beyer et al. (arXiv 2205.01580).

    srun ./launch.sh python -m vit_jax.main --config configs/imagenet_vit_s16.py

Expected: 76.5% on the validation split in the paper (big_vision, 8 TPU v3). Not yet measured here.
TFDS's imagenet2012 must be prepared before (its archives are downloaded by hand); a folder of class
folders does too: --config.data.name=folder:/path, with train/ and validation/ in it. All splits are
streamed. What differs from the paper: the validation images are cut to their whole central square,
not to .875 of it.
"""

from vit_jax.config import defaults


def get_config():
    config = defaults()
    config.batch_size = 1024
    config.epochs = 90
    config.eval_every = "5 epochs"

    config.data.name = "imagenet2012"
    config.data.train_split = "train[:99%]"
    config.data.val_split = "train[99%:]"  # for choices; the "validation" split is the test
    config.data.test_split = "validation"
    config.data.image_size = 224
    config.data.streaming = True
    config.data.streaming_threads = 64

    config.model.size = "S"
    config.model.patch_size = 16
    config.model.pool = "gap"
    config.model.posemb = "sincos2d"
    config.model.dtype = "bfloat16"

    config.augment.crop = "decoded"
    config.augment.crop_scale = (0.05, 1.0)
    config.augment.flip = "random"
    config.augment.policy = "randaugment"
    config.augment.randaugment_num_ops = 2
    config.augment.randaugment_magnitude = 10.0
    config.augment.mixup_alpha = 0.2

    config.optim.peak_lr = 1e-3
    config.optim.warmup = "10000 steps"
    config.optim.weight_decay = 0.1  # big_vision's 1e-4 is not multiplied by the peak rate, ours is
    config.optim.grad_clip_norm = 1.0
    return config
