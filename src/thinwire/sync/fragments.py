"""Which parameters are synchronised together, and when: fragments of whole layers, taken in strides.

With n layers in a fragment there are P = ceil(layers / n) of them; fragment j holds the layers j, j + P, j + 2 P, .. (strided, as
Douillard et al. 2025, Streaming DiLoCo, section 2.1), and what belongs to no layer (embeddings, the last norm, the head) is one
more. In a period of H steps each is sent once, at even distances; the last one at the end of the period.
"""

import re
from collections.abc import Sequence

_LAYER = re.compile(r"^((?:[^.]+\.)*?\d+)\.")


def fragments(names: Sequence[str], layers_per_fragment: int) -> list[list[str]]:
    """Parameter names, in their order, by fragment; every name is in exactly one. 0 layers per fragment: one for all.

    A layer is what stands before the first number in a name, with the number: "blocks.3" of "blocks.3.mlp.up.weight", "0" of the
    "0.weight" of an nn.Sequential.
    """
    if not layers_per_fragment:
        return [list(names)]
    layer_of = {name: match.group(1) if (match := _LAYER.match(name)) else "" for name in names}
    layers = list(dict.fromkeys(layer for layer in layer_of.values() if layer))
    count = -(-len(layers) // layers_per_fragment)
    place = {layer: index % count for index, layer in enumerate(layers)}
    found: list[list[str]] = [[] for _ in range(count + 1)]
    for name in names:
        found[place.get(layer_of[name], count)].append(name)
    return [fragment for fragment in found if fragment]


def due(fragment: int, count: int, every: int, done: int) -> bool:
    """Whether fragment number `fragment` of `count` is sent after `done` steps, with a period of `every` steps."""
    return done % every == (fragment + 1) * every // count % every
