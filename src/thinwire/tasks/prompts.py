"""Words and short phrases of a closed vocabulary, spoken: the data of `speech`.

Training recordings are synthetic: one to three of 35 words, drawn from a fixed seed, said by 69 voices of eSpeak NG in eight
accents, each recording at a speed and pitch of its own, and varied as `recordings.Varied` says. Held out are whole speakers:

    10 other voices of eSpeak NG, not varied, with phrases of their own
    Allison Smith, each word once, from asterisk-core-sounds-en-wav (8 kHz, CC-BY-SA-3.0): a person, nothing of whom is trained on

Spoken through the C interface of libespeak-ng (speak_lib.h), once, in half a minute, and kept in the cache folder (100 MB).
"""

import ctypes
import hashlib
import io
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from thinwire.errors import UserError
from thinwire.tasks.recordings import Varied, log_mel, read_wav
from thinwire.tasks.text import write_cache

FOLDER = Path("/usr/share/asterisk/sounds/en_US_f_Allison/digits")
LIBRARY = "libespeak-ng.so.1"
PACKAGES = "espeak-ng asterisk-core-sounds-en-wav"
SPOKEN, HELD_OUT, MOST_WORDS = 12000, 400, (1, 1, 2, 3)
COUNTED = {
    "": "zero one two three four five six seven eight nine",
    "day-": "sunday monday tuesday wednesday thursday friday saturday",
    "mon-": "january february march april may june july august september october november december",
}
OTHERS = "today tomorrow yesterday hundred thousand minus"
FILES = {word: f"{before}{number}" for before, words in COUNTED.items() for number, word in enumerate(words.split())}
FILES |= {word: word for word in OTHERS.split()}
"""Of each word its file in FOLDER, without .wav."""
ACCENTS = "en en-US en-GB-scotland en-GB-x-rp en-GB-x-gbclan en-GB-x-gbcwmd en-029 en-US-nyc"
VOICES = (
    "Alex Alicia Andrea Andy Annie Denis Diogo Gene Gene2 Henrique Hugo Jacky Lee Marco Mario Michael Mike Nguyen adam anika "
    "announcer antonio aunty belinda benjamin boris caleb david ed edward edward2 f1 f2 f3 f4 f5 grandma grandpa gustave iven "
    "iven2 iven3 iven4 john kaukovalta klatt klatt2 klatt3 klatt4 klatt5 klatt6 linda m1 m2 m3 m4 m5 m6 m7 m8 marcelo max michel "
    "miguel norbert pablo paul pedro quincy rob robert sandro shelby steph steph2 steph3 travis victor zac"
)
HELD_VOICES = VOICES.split()[3::8]
HIGHER = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2, 1.25)
Spoken = dict[str, list[Any]]  # by part


def load_prompts(cache_folder: Path) -> tuple[Spoken, Spoken, dict[str, Any]]:
    """What a model sees, float16 [steps, BANDS] each; the texts; what record.json says. UserError for what is not there."""
    files = {word: FOLDER / f"{name}.wav" for word, name in FILES.items()}
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        library = None
    if library is None or not all(path.is_file() for path in files.values()):
        lacking = LIBRARY if library is None else FOLDER
        raise UserError(f"{lacking} is not there; apt-get install {PACKAGES}, or give a folder of your own as task.source")
    made_by = b"".join(Path(__file__).with_name(name).read_bytes() for name in ("prompts.py", "recordings.py"))
    path = cache_folder / f"prompts-{hashlib.sha256(made_by).hexdigest()[:16]}.pt"
    if not path.is_file():
        print(f"thinwire: {SPOKEN:,} recordings are spoken into {path}, once; about half a minute", file=sys.stderr, flush=True)
        torch.save(_made(library, files), content := io.BytesIO())
        write_cache(path, content.getvalue())
    found = torch.load(path, weights_only=True)
    return found["seen"], found["texts"], found["about"]


def _made(library: Any, files: dict[str, Path]) -> dict[str, Any]:
    digest = hashlib.sha256()
    seen, texts = Spoken(train=[], held_out=[]), Spoken(train=[], held_out=[])

    def add(part: str, text: str, samples: NDArray[np.float32], rate: int, varied: Varied) -> None:
        digest.update(f"{part}\t{text}\n".encode() + samples.tobytes())
        seen[part].append(log_mel(samples, rate, varied))
        texts[part].append(text)

    trained = [one for one in VOICES.split() if one not in HELD_VOICES]
    for part, voices, count in (("train", trained, SPOKEN), ("held_out", HELD_VOICES, HELD_OUT)):
        drawn = random.Random(part)
        for text, samples, rate in _spoken(library, voices, count, drawn):
            varied = Varied(higher=drawn.choice(HIGHER), tilt=drawn.uniform(-0.5, 0.5), noise=10.0 ** drawn.uniform(-6.0, -3.0))
            add(part, text, samples, rate, varied if part == "train" else Varied())
    for word, path in files.items():
        add("held_out", word, *read_wav(path), Varied())
    about = {
        "source": f"synthetic (eSpeak NG), and {len(files)} held-out words by Allison Smith (Debian {PACKAGES})",
        "licence": "CC-BY-SA-3.0 (Allison Smith)",
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files.values()),
        "documents": sum(map(len, texts.values())),
        "sha256": digest.hexdigest(),
    }
    return {"seen": seen, "texts": texts, "about": about}


def _spoken(library: Any, voices: list[str], count: int, drawn: random.Random) -> Iterator[tuple[str, NDArray[np.float32], int]]:
    """Texts, samples, samples a second. The library is not ended: a second espeak_Terminate (of 1.51) waits forever."""
    parts: list[bytes] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    def heard(samples: int | None, number: int, _: int | None) -> int:
        parts.append(ctypes.string_at(samples or 0, 2 * number))
        return 0

    retrieval, words_a_minute, pitch, utf8 = 2, 1, 3, 1
    rate = int(library.espeak_Initialize(retrieval, 0, None, 0))
    library.espeak_SetSynthCallback(heard)
    for number in range(count):
        voice = f"gmw/{drawn.choice(ACCENTS.split())}+{voices[number % len(voices)]}"
        text = " ".join(drawn.choices(list(FILES), k=drawn.choice(MOST_WORDS)))
        if rate <= 0 or library.espeak_SetVoiceByName(voice.encode()):
            raise UserError(f"{LIBRARY} has no voice {voice}; apt-get install --reinstall {PACKAGES}")
        library.espeak_SetParameter(words_a_minute, drawn.randint(90, 200), 0)
        library.espeak_SetParameter(pitch, drawn.randint(20, 80), 0)
        parts.clear()
        library.espeak_Synth(text.encode(), len(text) + 1, 0, 1, 0, utf8, None, None)
        yield text, np.frombuffer(b"".join(parts), np.int16).astype(np.float32) / 2.0**15, rate
