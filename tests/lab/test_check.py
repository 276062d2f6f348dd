"""`thinwire lab check`, where a lab can be built and where the rights or the programs are missing."""

import json
import shutil
import subprocess
import sys

import pytest

from thinwire.lab.kernel import examine

pytestmark = pytest.mark.lab

CHECK = [sys.executable, "-c", "from thinwire.cli.lab import app; app()", "check", "--json"]
RUN = [sys.executable, "-c", "from thinwire.lab.kernel import examine; print(examine().reason)"]


def output(*before: str, argv: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*before, *argv], capture_output=True, text=True, timeout=30, check=False)


def test_a_lab_can_be_built_here() -> None:
    assert examine().reason is None


def test_check_lists_every_ability() -> None:
    done = output(argv=CHECK)
    content = json.loads(done.stdout)
    assert (done.returncode, content["reason"]) == (0, None)
    abilities = {row["name"]: row for row in content["abilities"]}
    assert {"ip", "tc", "namespaces", "netns", "veth", "bridge", "tbf", "htb", "netem", "cores"} <= set(abilities)
    assert all(row["available"] for row in abilities.values() if row["needed"])
    assert all(row["follows"] for row in abilities.values())


def test_without_rights_it_says_so_in_one_line() -> None:
    """Root in a user namespace that has given up every capability and allows no further namespaces."""
    drop = 'echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --bounding-set=-all --inh-caps=-all -- "$@"'
    done = output("unshare", "--user", "--map-root-user", "sh", "-c", drop, "sh", argv=RUN)
    assert done.stdout.startswith("no rights to make namespaces (unshare: ") and done.stdout.count("\n") == 1
    done = output("unshare", "--user", "--map-root-user", "sh", "-c", drop, "sh", argv=CHECK)
    assert done.returncode == 1 and json.loads(done.stdout)["reason"].startswith("no rights")


def test_without_tc_it_names_the_package() -> None:
    tc = shutil.which("tc") or "/usr/sbin/tc"
    hide = 'mount --bind /dev/null "$(realpath "$0")" && exec "$@"'
    done = output("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", hide, tc, argv=RUN)
    assert done.stdout == "the lab needs the program 'tc'; install the package iproute2\n"
