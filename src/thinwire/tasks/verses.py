"""The same verses in English and Spanish: the King James Bible and the Reina-Valera of 1909, both in the public domain, from
Debian's sword modules, read by pysword (extra `tasks`)."""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from thinwire.errors import UserError
from thinwire.tasks.text import cached, library

FOLDER = Path("/usr/share/sword")
ENGLISH, SPANISH = "engKJV2006eb", "spaRV1909eb"


def load_verses(cache: Path, folder: Path = FOLDER) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """(English, Spanish), in the order of the books, and what the record says of them. UserError if a package is not there."""
    files = [path for name in (ENGLISH, SPANISH) for path in sorted((folder / "modules/texts/ztext" / name).glob("*"))]
    if {path.parent.name for path in files} != {ENGLISH, SPANISH}:
        raise UserError(f"{folder} lacks the verses; apt-get install sword-text-kjv sword-text-sparv, or give task.source")
    sums = {f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    found = cached(cache, f"verses {sorted(sums.items())}", lambda: _read(folder))
    source = "King James Bible, Reina-Valera 1909 (Debian sword-text-kjv, sword-text-sparv)"
    size = sum(path.stat().st_size for path in files)
    about = {"source": source, "licence": "public domain", "files": len(files), "bytes": size, "file_sha256": sums}
    return [(english, spanish) for english, spanish in found], about


def _read(folder: Path) -> list[Any]:
    modules = library("pysword.modules").SwordModules(str(folder))
    modules.parse_modules()
    english, spanish = (modules.get_bible_from_module(name) for name in (ENGLISH, SPANISH))
    for one in (english, spanish):  # which unpacks a whole book for each of its verses
        one._decompressed_text = lru_cache(2)(one._decompressed_text)
    found = []
    for books in english.get_structure().get_books().values():
        for book in books:
            for chapter, count in enumerate(book.chapter_lengths, start=1):
                for verse in range(1, count + 1):
                    place = {"books": [book.name], "chapters": [chapter], "verses": [verse]}
                    pair = [_plain(one, place) for one in (english, spanish)]
                    if all(pair):
                        found.append(pair)
    return found


def _plain(bible: Any, place: dict[str, Any]) -> str:
    try:
        text = str(bible.get(**place, clean=True))
    except (ValueError, IndexError, KeyError):  # of a verse that one of them counts otherwise
        return ""
    return " ".join(text.replace("¶", " ").split())
