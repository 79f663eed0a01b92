"""ViT-S/16 on ImageNet-1k, 90 epochs.

    srun ./launch.sh python -m vit_jax.main --config configs/imagenet_vit_s16.py

Not measured. The recipe is published (arXiv 2205.01580, big_vision, 8 TPU v3), with an accuracy of
76.5% on the validation split. Prepare TFDS's imagenet2012 first (its archives are downloaded
manually), or use an image folder with train/ and validation/: --config.data.name=folder:/path. All
splits are streamed. Differences from big_vision: no tanh layer before the head (model.pre_logits),
exact GELU, a LayerNorm epsilon of 1e-5, other initial weights, and validation images that are
center-cropped to their full shorter side instead of to 0.875 of it.
"""

from vit_jax.config import defaults


def get_config():
    config = defaults()
    config.batch_size = 1024
    config.epochs = 90
    config.eval_every = "5 epochs"

    config.data.name = "imagenet2012"
    config.data.train_split = "train[:99%]"
    config.data.val_split = "train[99%:]"  # to choose by; "validation" is the test split
    config.data.test_split = "validation"
    config.data.image_size = 224
    config.data.streaming = True
    config.data.streaming_threads = 64

    config.model.size = "S"
    config.model.patch_size = 16
    config.model.pool = "gap"
    config.model.posemb = "sincos2d"
    config.model.dtype = "bfloat16"
    config.model.matmul_precision = "tf32"

    config.augment.crop = "resized"
    config.augment.crop_scale = (0.05, 1.0)
    config.augment.flip = "random"
    config.augment.policy = "randaugment"
    config.augment.randaugment_num_ops = 2
    config.augment.randaugment_magnitude = 10.0
    config.augment.mixup_alpha = 0.2

    config.optim.peak_lr = 1e-3
    config.optim.warmup = "10000 steps"
    config.optim.weight_decay = 0.1  # big_vision: 1e-4, not multiplied by peak_lr
    config.optim.grad_clip_norm = 1.0
    return config
