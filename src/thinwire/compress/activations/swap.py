"""An all-to-all of activations, each row in codes: of p ranks, rank i gives rank s

    D C(x_i[s])     C a codec, D its decoder, rows padded to whole blocks        and keeps x_i[i] as it is

so that |result - x| <= the codec's error bound. Without a codec rows travel as they are, in their own dtype. There is no error
feedback, and what is not finite is treated as at a boundary (`boundary`).
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from thinwire.collectives.ledger import Ledger
from thinwire.collectives.metered_calls import all_to_all
from thinwire.compress.activations.boundary import encode_finite, flat_float32
from thinwire.compress.base import Codec, padded
from thinwire.traffic import Transfer


def swap_transfer(values: tuple[int, torch.dtype], codec: Codec | None, axis: str, world_size: int, label: str) -> Transfer:
    """What one sends, exactly. values: number and dtype of those of a row. Coding time is the caller's to add (`work_s`)."""
    numel, dtype = values
    size, item = numel * dtype.itemsize, dtype.itemsize
    if codec is not None:
        size, item = codec.payload_bytes(padded(numel, codec.block)), 1
    return Transfer(label=label, axis=axis, op="all_to_all", message_bytes=world_size * size, item_bytes=item)


def swapped(rows: Tensor, group: dist.ProcessGroup, codec: Codec | None, ledger: Ledger, label: str) -> Tensor:
    """[p, ..] -> [p, ..], the rows that the ranks of `group` have for this one; without autograd. Collective. UserError on a CPU
    for what is not finite."""
    rows = rows.detach().contiguous()
    if codec is None:
        received = torch.empty_like(rows)
        all_to_all(received, rows, group, ledger, label).wait()
        return received
    own, (p, *shape) = group.rank(), rows.shape
    flat = pad(flat_float32(rows, label).view(p, -1), (0, -rows[0].numel() % codec.block))
    codes = flat.new_zeros(p, codec.payload_bytes(flat.shape[1]), dtype=torch.uint8)
    for row in range(p):
        if row != own:
            codes[row] = encode_finite(codec, flat[row], label)
    arrived = torch.empty_like(codes)
    all_to_all(arrived, codes, group, ledger, label).wait()
    codec.decode_rows(arrived, flat)
    decoded = flat[:, : rows[0].numel()].reshape(p, *shape).to(rows.dtype)
    decoded[own] = rows[own]
    return decoded
