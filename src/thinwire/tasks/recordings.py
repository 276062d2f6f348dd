"""Recordings of speech: WAV files, what a model sees of them, and a user's own folder of them with a transcript.

A model sees, of each 10 ms, how loud 40 bands are (log-mel; Davis and Mermelstein 1980): the power spectrum of 32 ms under a Hann
window, summed under triangles that are evenly wide in mel = 2595 log10(1 + f / 700) from 100 to 3,700 Hz. Bands are in Hz, so
that recordings of any rate from 8 kHz on look alike and none is resampled; what is above the highest band is not heard. Power is
taken relative to the loudest 10 ms, and quiet before the first and after the last sound is cut off. Of each band its mean over
the recording is taken away, and with it what a microphone, a room or a throat does to all of it (Atal 1974).

A folder has WAV files (PCM of 8 to 32 bits; channels are averaged) and transcript.csv, .tsv or .jsonl with `file` and `text`.
"""

import wave
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thinwire.errors import UserError
from thinwire.tasks.own import columns_of

BANDS, FIRST_HZ, LAST_HZ, LEAST_RATE_HZ = 40, 100.0, 3700.0, 8000
STEP_S, WINDOW_S = 0.010, 0.032
SILENCE, FLOOR, AROUND = 1e-3, 1e-5, 5
"""Of the loudest power: what is taken for silence, what is added to each band. Steps of 10 ms that are kept around sound."""
TRANSCRIPTS = ("transcript.csv", "transcript.tsv", "transcript.jsonl")


@dataclass(frozen=True, kw_only=True)
class Varied:
    """How a recording is made to look like that of another throat and room. higher: its frequencies, as much; tilt: louder by
    exp(2 tilt u) in band u from -1 to 1; noise: of the loudest power, in all bands."""

    higher: float = 1.0
    tilt: float = 0.0
    noise: float = 0.0


def read_wav(path: Path) -> tuple[NDArray[np.float32], int]:
    """Samples [count] from -1 to 1, and how many there are a second. UserError for what is no such file."""
    try:
        with wave.open(str(path)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            content = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        reason = getattr(error, "strerror", None) or f"{error}; it has to be a WAV file of PCM"
        raise UserError(f"recording {path} cannot be read: {reason}") from None
    if rate < LEAST_RATE_HZ:
        raise UserError(f"recording {path} has {rate} samples a second; give one with {LEAST_RATE_HZ} or more")
    content = content[: len(content) // (width * channels) * width * channels]
    raw = np.frombuffer(content, np.uint8).reshape(-1, width)
    whole = np.zeros((len(raw), 4), np.uint8)
    whole[:, 4 - width :] = raw ^ 128 if width == 1 else raw  # one byte is unsigned, more are signed
    samples = (whole.view("<i4")[:, 0] / 2.0**31).reshape(-1, channels).mean(1).astype(np.float32)
    if not samples.any():
        raise UserError(f"recording {path} is silent, {len(samples) / rate:.2f} s; give one with speech in it")
    return samples, rate


def log_mel(samples: NDArray[np.float32], rate: int, varied: Varied | None = None) -> Tensor:
    """What a model sees: float16 [steps, BANDS], of each band around 0. samples: [count], not all 0."""
    bands = loudness(samples, rate, varied or Varied())
    return ((bands - bands.mean(0)) / 3.0).half()


def loudness(samples: NDArray[np.float32], rate: int, varied: Varied) -> Tensor:
    """float32 [steps, BANDS]: the logarithm of the power of each band, relative to the loudest step."""
    length, hop = round(rate * WINDOW_S), round(rate * STEP_S)
    given = torch.from_numpy(np.pad(samples, (0, max(0, length - len(samples)))))
    windows = given.unfold(0, length, hop) * torch.hann_window(length)
    size = 1 << (length - 1).bit_length()
    power = torch.fft.rfft(windows, size).abs().square() @ _triangles(rate, size, varied.higher)
    power = power / power.sum(1).max().clamp(min=1e-30)
    power = power * torch.exp(2.0 * varied.tilt * torch.linspace(-1.0, 1.0, BANDS)) + varied.noise / BANDS
    power = power / power.sum(1).max().clamp(min=1e-30)
    loud = torch.nonzero(power.sum(1) >= SILENCE).flatten()
    sound = power[max(0, int(loud[0]) - AROUND) : int(loud[-1]) + AROUND + 1] if len(loud) else power
    return (sound + FLOOR).log()


@cache
def _triangles(rate: int, size: int, higher: float) -> Tensor:
    """float32 [size / 2 + 1, BANDS]: of each frequency, by how much it counts in each band."""
    lowest, highest = (2595.0 * np.log10(1.0 + hz / 700.0) for hz in (FIRST_HZ, LAST_HZ))
    mel = np.linspace(lowest, highest, BANDS + 2)
    edge = 700.0 * (10.0 ** (mel / 2595.0) - 1.0) / higher
    hz = np.arange(size // 2 + 1)[:, None] * rate / size
    rising, falling = ((hz - edge[:-2]) / np.diff(edge)[:-1]), ((edge[2:] - hz) / np.diff(edge)[1:])
    return torch.from_numpy(np.minimum(rising, falling).clip(0).astype(np.float32))


def recordings_of(folder: Path) -> tuple[list[tuple[Path, str]], dict[str, Any]]:
    """Files and texts of a user's folder, in the transcript's order, and what record.json says. UserError, one line."""
    there = [folder / name for name in TRANSCRIPTS if (folder / name).is_file()]
    if len(there) != 1:
        what = f"{len(there)} of {', '.join(TRANSCRIPTS)}"
        raise UserError(f"task.source {str(folder)!r} has {what}; give a folder with WAV files and one of these")
    named = [(folder / name, text) for name, text in columns_of(there[0], ("file", "text"))[0]]
    if lacking := next((path for path, _ in named if not path.is_file()), None):
        raise UserError(f"{there[0]} names {lacking.name}, which is not in {str(folder)!r}; there are {len(named)} lines")
    size = sum(path.stat().st_size for path, _ in named)
    return named, {"source": str(folder), "files": len(named), "bytes": size}
