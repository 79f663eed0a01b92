"""The order of examples in training and evaluation."""

import numpy as np

from vit_jax.data import epoch_order, eval_order


def test_epoch_order_is_a_fixed_shuffle_of_seed_and_epoch():
    order = epoch_order(10, 4, seed=0, epoch=0)
    assert order.dtype == np.int32 and order.shape == (3, 4)
    assert order.tolist() == [[0, 2, 9, 1], [8, 5, 4, 3], [6, 7, -1, -1]]
    assert sorted(order.ravel().tolist()) == [-1, -1, *range(10)]
    large = [epoch_order(999, 9, seed=s, epoch=e) for s, e in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for i, one in enumerate(large):
        assert one.min() == 0 and one.shape == (111, 9)
        assert all((one == other).mean() < 0.02 for other in large[:i])
    np.testing.assert_array_equal(large[1], epoch_order(999, 9, seed=0, epoch=1))


def test_batch_size_does_not_change_the_order():
    small, big = (epoch_order(50, b, seed=3, epoch=7).ravel() for b in (8, 32))
    np.testing.assert_array_equal(small[:50], big[:50])


def test_eval_order_is_sequential_and_padded_at_the_end():
    order = eval_order(5, 3)
    assert order.dtype == np.int32 and order.tolist() == [[0, 1, 2], [3, 4, -1]]
    assert eval_order(6, 3).tolist() == [[0, 1, 2], [3, 4, 5]]
