"""Fine-tunes a pretrained ViT-B/16 on CIFAR-10.

    ./launch.sh python -m vit_jax.main --config configs/cifar10_finetune_b16.py \\
        --config.init_from=ViT-B_16.npz

Not measured. The recipe is published by google-research/vision_transformer: 98.6% test accuracy
after these 500 steps, 99.0% after 10,000 (--config.steps=10000), from ImageNet-21k weights. Images
are cropped and flipped at 32x32 and then resized to 384x384; the published recipe resizes first.
Published learning rates range from 0.001 to 0.03, chosen on validation accuracy. The attention maps
of one step take 45 GB across all devices (11 blocks, 12 heads, 577x577 bfloat16, 512 images): use
several GPUs, or reduce the batch size and scale the learning rate with it.

The model fields match Google's .npz files. Hugging Face weights need --config.model.gelu=exact
--config.model.norm_eps=1e-12, timm weights exact and 1e-6; without them, loading raises an error
that lists the fields to set.
"""

from vit_jax.config import defaults


def get_config():
    config = defaults()
    config.init_from = "ViT-B_16.npz"
    config.batch_size = 512
    config.eval_batch_size = 200
    config.steps = 500
    config.save_every = "250 steps"
    config.log_every = "10 steps"

    config.model.size = "B"
    config.model.patch_size = 16
    config.model.image_size = 384  # resized on the device, from 32 pixels
    config.model.gelu = "tanh"
    config.model.norm_eps = 1e-6
    config.model.dtype = "bfloat16"
    config.model.matmul_precision = "tf32"

    config.augment.crop = "pad"
    config.augment.flip = "random"

    config.optim.name = "sgd"
    config.optim.momentum = 0.9
    config.optim.weight_decay = 0.0
    config.optim.peak_lr = 0.01
    config.optim.schedule = "cosine"
    config.optim.warmup = "50 steps"
    config.optim.grad_clip_norm = 1.0
    return config
