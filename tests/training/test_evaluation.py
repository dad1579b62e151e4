"""Evaluation: what it returns, and that it can be stopped between any two batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from revnet_jax.errors import UserError
from revnet_jax.training.evaluation import evaluate
from revnet_jax.training.sharding import make_mesh


@jax.jit
def sums(variables, batch):
    return {"count": jnp.sum(batch["weight"]), "loss": jnp.sum(variables * batch["weight"])}


class Batches:
    """An iterator of 5 batches that knows how far it was read, and whether it was closed."""

    def __init__(self):
        self.read, self.closed = 0, False

    def __iter__(self):
        for i in range(1, 6):
            self.read = i
            yield {"weight": np.full(4, i, np.float32)}

    def close(self):
        self.closed = True


@pytest.mark.parametrize("batches_before_stop", [0, 1, 4])
def test_it_stops_before_the_next_batch(batches_before_stop):
    mesh, batches = make_mesh(jax.devices(), data=1, fsdp=-1), Batches()
    answers = iter([False] * batches_before_stop + [True])
    assert evaluate(sums, jnp.float32(3), batches, mesh, answers.__next__) is None
    assert batches.closed
    assert batches.read == batches_before_stop + 1


def test_means_of_all_batches():
    mesh, batches = make_mesh(jax.devices(), data=1, fsdp=-1), Batches()
    assert evaluate(sums, jnp.float32(3), batches, mesh) == {"loss": 3.0}
    assert batches.closed
    assert batches.read == 5


def test_examples_without_weight_have_no_mean():
    class Padding(Batches):
        def __iter__(self):
            yield {"weight": np.zeros(4, np.float32)}

    mesh = make_mesh(jax.devices(), data=1, fsdp=-1)
    with pytest.raises(UserError, match="weights are all 0, expected one example at least"):
        evaluate(sums, jnp.float32(3), Padding(), mesh)
