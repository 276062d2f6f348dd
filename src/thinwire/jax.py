"""JAX: gradients of a loop of optax reduced over the ranks, in what `jax.jit` compiles too.

    thinwire.jax.init()
    params = thinwire.jax.broadcast(params)
    optimizer = optax.chain(thinwire.jax.average_gradients("int4"), optax.adam(1e-3))

One ordered callback a step hands them to the host (`adapters.jax`), where they travel as those of `thinwire.horovod` do, by their
places in the tree. What codes have left out stays with the rank, not in the optimizer's state. One device a rank.
"""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from thinwire.adapters.horovod.context import CONTEXT
from thinwire.adapters.jax import on_host
from thinwire.horovod.gradients import Reduction
from thinwire.horovod.torch.compression import Code
from thinwire.horovod.torch.functions import broadcast_object

init, shutdown, rank, size, ledger = CONTEXT.init, CONTEXT.shutdown, CONTEXT.rank, CONTEXT.size, CONTEXT.ledger


def average_gradients(compress: str | Mapping[str, Any] = "none") -> optax.GradientTransformation:
    """A transformation whose `update` is collective: its results are the same on all ranks, to the bit. Make it after `init`.

    compress: a kind of [compress], or a table of one and its options. UserError for one that does not exist.
    """
    coding = Code("{}")(**({"kind": compress} if isinstance(compress, str) else compress))
    reduction = Reduction(name=f"optimizer {next(CONTEXT.engine.owners)}", compression=coding)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        leaves, tree = jax.tree_util.tree_flatten_with_path(updates)
        names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
        return tree.unflatten(reduction.of(names, [leaf for _, leaf in leaves], on_host)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def broadcast(tree: Any, root_rank: int = 0) -> Any:
    """The arrays of rank `root_rank`. Collective."""
    return jax.tree_util.tree_map(jax.numpy.asarray, broadcast_object(jax.device_get(tree), root_rank))
