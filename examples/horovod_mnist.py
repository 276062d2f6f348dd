"""Training with Horovod's API, as its documentation shows it; of the lines that speak of Horovod only the import is another one.

    torchrun --nproc-per-node 2 examples/horovod_mnist.py
    thinwire horovodrun -np 4 python examples/horovod_mnist.py --compression int4

The images are scikit-learn's digits where it is installed, else ten random patterns in noise.
"""

import argparse

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import thinwire.horovod.torch as hvd  # import horovod.torch as hvd


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, padding=1)
        self.fc1 = nn.Linear(32 * 4, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def images() -> tuple[TensorDataset, TensorDataset]:
    """[n, 1, 8, 8], normalised, and their labels: for training, and for the test."""
    try:
        from sklearn.datasets import load_digits

        digits = load_digits()
        x, y = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    except ImportError:
        draw = torch.Generator().manual_seed(0)
        y = torch.randint(10, (1797,), generator=draw)
        x = (torch.rand(10, 8, 8, generator=draw)[y] + 0.3 * torch.randn(1797, 8, 8, generator=draw)).clamp(0, 1)
    x = (x[:, None] - 0.5) / 0.3
    return TensorDataset(x[:1440], y[:1440]), TensorDataset(x[1440:], y[1440:])


def metric_average(value: float, name: str) -> float:
    return hvd.allreduce(torch.tensor(value), name=name).item()


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--compression", default="none", help="none, fp16, int8, int4, ...")
    parser.add_argument("--use-adasum", action="store_true")
    args = parser.parse_args(arguments)

    hvd.init()
    torch.manual_seed(42)
    torch.set_num_threads(1)
    train_dataset, test_dataset = images()
    train_sampler = DistributedSampler(train_dataset, num_replicas=hvd.size(), rank=hvd.rank())
    train_loader = DataLoader(train_dataset, batch_size=32, sampler=train_sampler)
    test_sampler = DistributedSampler(test_dataset, num_replicas=hvd.size(), rank=hvd.rank())
    test_loader = DataLoader(test_dataset, batch_size=500, sampler=test_sampler)

    model = Net()
    lr_scaler = hvd.size() if not args.use_adasum else 1
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr * lr_scaler, momentum=0.5)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        compression=getattr(hvd.Compression, args.compression),
        op=hvd.Adasum if args.use_adasum else hvd.Average,
    )

    accuracy = 0.0
    for epoch in range(1, args.epochs + 1):
        model.train()
        train_sampler.set_epoch(epoch)
        for data, target in train_loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data), target)
            loss.backward()
            optimizer.step()
        model.eval()
        right = [(model(data).argmax(1) == target).float().mean().item() for data, target in test_loader]
        accuracy = metric_average(sum(right) / len(right), "avg_accuracy")
        if hvd.rank() == 0:
            print(f"epoch {epoch}: loss {loss.item():.3f}, accuracy on the test set {100 * accuracy:.1f} %")
    return accuracy


if __name__ == "__main__":
    main()
