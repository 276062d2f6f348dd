"""A cluster in a line, for those who have no file: 4x8xa100-80gb@1Gbit/s.

    HOSTS x DEVICES x KIND @ LINK                     equal hosts on one switch; LINK is the rate of a host's card
    SITES x HOSTS x DEVICES x KIND @ LINK @ UPLINK    so many hosts at each of several sites, and the rate of a site's uplink
    KIND:RATE                                         what a device achieves in training, cpu:10Gflop/s; without it by data sheet

`~5ms` behind a rate is the latency of that link, one way; else 50 us, 5 us from 25 Gbit/s on, and 10 ms between sites.
"""

import re

from thinwire.cluster.model import Cluster
from thinwire.cluster.spec import ClusterSpec, expand
from thinwire.errors import UserError
from thinwire.tomlfile import validate
from thinwire.units import parse

FORM = re.compile(r"(?:(\d+)x)?(\d+)x(\d+)x([\w.+-]+)(?::([^@]+))?@([^@~]+)(?:~([^@]+))?(?:@([^@~]+)(?:~([^@]+))?)?", re.ASCII)


def described(text: str) -> Cluster:
    """The cluster that such a line stands for. UserError in one line."""
    found = FORM.fullmatch(text.replace(" ", ""))
    if found is None or bool(found[1]) != bool(found[8]):
        raise UserError(f"cluster {text!r}: write HOSTSxDEVICESxKIND@LINK, as 4x8xa100-80gb@1Gbit/s, or SITESx..@LINK@UPLINK")
    sites, hosts, devices, kind, rate, link, latency, uplink, far = found.groups()
    device = {"kind": kind, "name": "cpu{j}" if kind == "cpu" else "gpu{j}", "count": int(devices)}
    host = {
        "name": "host{i}",
        "count": int(hosts),
        "device": device | ({"flops_per_s": rate} if rate else {}),
        "card": {"bandwidth_bps": link, "latency_s": latency or ("50 us" if parse(link, "bit/s") < 25e9 else "5 us")},
    }
    content = {"name": text, "host": [host]}
    if sites:
        names = [f"site{number}" for number in range(int(sites))]
        content["host"] = [host | {"name": f"{name}-host{{i}}", "rack": name} for name in names]
        content["rack"] = [{"name": name, "uplink": {"bandwidth_bps": uplink, "latency_s": far or "10 ms"}} for name in names]
    return expand(validate(ClusterSpec, content, f"cluster {text!r}"))
