"""Run a command on a host of the lab from another one, as ssh does: `python -m thinwire.lab.enter [-OPTION] HOST WORD...`

Process 1 of the lab holds every host's namespaces open and has written down which descriptors they are. As with ssh the words
are joined and given to a shell; input, output and exit code are those of the command, the environment is the caller's.
"""

import json
import os
import sys
from pathlib import Path

from thinwire.lab.spaces import Space

SPACES = "spaces.json"


def write_spaces(folder: Path, spaces: dict[str, Space]) -> None:
    """Note the namespaces of all hosts, which this process holds open; and make `enter`, a program that gets there."""
    (folder / SPACES).write_text(json.dumps(spaces), encoding="utf-8")
    program = folder / "enter"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {__name__} "{folder}" "$@"\n', encoding="utf-8")
    program.chmod(0o755)


def main() -> None:
    """See the top of the file."""
    folder, *words = sys.argv[1:]
    while words and words[0].startswith("-"):
        words.pop(0)
    if len(words) < 2:
        sys.exit("usage: enter [-OPTION] HOST COMMAND...")
    host, *command = words
    known = json.loads((Path(folder) / SPACES).read_text(encoding="utf-8"))
    if host not in known:
        sys.exit(f"the lab has no host {host!r}; known: {', '.join(known)}")
    cwd = os.getcwd()
    Space(*(os.open(f"/proc/1/fd/{number}", os.O_RDONLY | os.O_CLOEXEC) for number in known[host])).enter()
    os.chdir(cwd)
    os.execvp("sh", ["sh", "-c", " ".join(command)])


if __name__ == "__main__":
    main()
