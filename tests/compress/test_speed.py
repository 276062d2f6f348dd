"""Codes are timed where they will run: on tensors of that device, and until it is through."""

from collections.abc import Iterator

import pytest
import torch

from thinwire.collectives.ledger import Ledger
from thinwire.compress.exchange import make_averagers, make_memory
from thinwire.compress.speed import seconds_of_stages, seconds_of_tensor
from thinwire.config.compress import Coded
from thinwire.workload import Parameter

META = torch.device("meta")


def test_every_stage_lasts_until_the_device_is_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on when somebody waits for the device, which then has 3 s of work for each stage that was launched."""
    now, launched = [0.0], [0]

    def wait(device: torch.device) -> None:
        assert device == META
        now[0] += 3.0 * launched[0]
        launched[0] = 0

    def run() -> Iterator[None]:
        for _ in range(2):
            launched[0] += 1
            yield

    monkeypatch.setattr(torch.accelerator, "synchronize", wait)
    monkeypatch.setattr("thinwire.compress.speed.time.perf_counter", lambda: now[0])
    assert seconds_of_stages(run, META) == (3.0, 3.0)
    assert seconds_of_stages(run) == (0.0, 0.0)


@pytest.mark.parametrize("kind", ["int8", "powersgd", "randomk"])
def test_an_averager_times_its_codes_on_its_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def stages(run: object, device: torch.device) -> tuple[float, float]:
        seen.append(device.type)
        return 1e-6, 1e-6

    for module in ("speed", "powersgd", "randomk"):
        monkeypatch.setattr(f"thinwire.compress.{module}.seconds_of_stages", stages)
    seconds_of_tensor.cache_clear()
    config = Coded(kind=kind, exclude=())  # type: ignore[arg-type]
    for averager in make_averagers(config, make_memory(config), Ledger()):
        for device in ("cpu", "meta"):
            averager.attach(None, None, torch.device(device))  # type: ignore[arg-type]
            seen.clear()
            averager.transfers("bucket", [Parameter("weight", (17, 96 if device == "cpu" else 97))], [], "data", 4)
            assert set(seen) <= {device}
        assert kind == "int8" or seen == ["meta"]


def test_a_codec_gets_tensors_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    class Watched:
        def encode(self, values: torch.Tensor) -> torch.Tensor:
            seen.add(values.device)
            return values

        def decode(self, payload: torch.Tensor, shape: object) -> torch.Tensor:
            return payload

    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    seconds_of_tensor(Watched(), (8, 8), META)  # type: ignore[arg-type]
    assert seen == {META}
