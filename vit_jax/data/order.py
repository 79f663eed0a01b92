"""The order in which training and evaluation visit a split."""

import numpy as np


def epoch_order(num_examples: int, batch_size: int, *, seed: int, epoch: int) -> np.ndarray:
    """Returns the training order of an epoch, shuffled by (seed, epoch).

    int32[steps, batch_size] with every index once, padded with -1.
    """
    # Unlike the output of `Generator.permutation`, raw words are the same in every NumPy version.
    words = np.random.Philox(key=[seed, epoch]).random_raw(num_examples)
    return _in_batches(np.argsort(words, kind="stable"), batch_size)


def eval_order(num_examples: int, batch_size: int) -> np.ndarray:
    """Returns int32[steps, batch_size]: every index once, in order, padded with -1."""
    return _in_batches(np.arange(num_examples), batch_size)


def _in_batches(order: np.ndarray, batch_size: int) -> np.ndarray:
    padded = np.pad(order, (0, -len(order) % batch_size), constant_values=-1)
    return padded.astype(np.int32).reshape(-1, batch_size)
