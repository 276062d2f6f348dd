"""A user's own loop as a replica of asynchronous DiLoCo. Start the servers first, then it twice:

    thinwire serve --service first_workers=2 --service total_tokens=4000
    python examples/async_diloco.py 127.0.0.1:29700 a
    python examples/async_diloco.py 127.0.0.1:29700 b

For workers on other machines, serve with --bind HOST:PORT --secret-file FILE, and give AsyncDiLoCo the same secret_file. Kill one
and start it again: the other loses no step, and the one that comes back goes on from the newest weights. Both end when
4000 steps of either are merged.
"""

import sys

import torch

import thinwire

store, name = sys.argv[1:]
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

with thinwire.AsyncDiLoCo(model, optimizer, every=20, store=store, name=name) as replica:
    torch.manual_seed(ord(name[0]))
    for step in replica.remaining_steps():
        inputs = torch.randn(32, 8)
        loss = (model(inputs) - inputs[:, :1].sin()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"{name}: step {step}, loss {loss.item():.4f}")
