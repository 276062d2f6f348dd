"""`thinwire serve` on one host, scanned from another: one that is not bound shows no port, one that is bound this port alone."""

import json
import sys
from pathlib import Path

import pytest
from small_cluster import build_cluster

from thinwire.lab.commands import FIRST_CARD, Process
from thinwire.lab.run import RESULTS, LabOptions, LabResult, launch

PORT = 29800
SERVE = f"""
set -e
serve="$1 -m thinwire serve"
wait_for() {{ while [ ! -e {RESULTS}/$1 ]; do sleep 0.05; done; }}
printf 'a secret of many letters' > {RESULTS}/secret
$serve > {RESULTS}/alone & alone=$!
while ! grep -q serving {RESULTS}/alone; do sleep 0.05; done
$serve --bind host0:{PORT} 2> {RESULTS}/refused && exit 9
$serve --bind host0:{PORT} --secret-file {RESULTS}/secret > {RESULTS}/bound & bound=$!
while ! grep -q serving {RESULTS}/bound; do sleep 0.05; done
touch {RESULTS}/serving
wait_for done
kill -TERM $alone $bound; wait $alone; wait $bound
"""
SCAN = f"""
import errno, json, select, socket, time
from pathlib import Path

results = Path("{RESULTS}")
host = socket.gethostbyname("host0")

def scan():
    "All TCP ports of the other host that do not refuse a connection."
    found = []
    for first in range(1, 65536, 500):
        open_, poll = {{}}, select.poll()
        for port in range(first, min(65536, first + 500)):
            sock = socket.socket()
            sock.setblocking(False)
            if sock.connect_ex((host, port)) == errno.EINPROGRESS:
                open_[sock.fileno()] = (sock, port)
                poll.register(sock, select.POLLOUT)
            else:
                sock.close()
        end = time.monotonic() + 20
        while open_ and time.monotonic() < end:
            for number, _ in poll.poll(1000):
                sock, port = open_.pop(number)
                poll.unregister(number)
                if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                    found.append(port)
                sock.close()
        found += [-port for _, port in open_.values()]  # neither refused nor taken
        for sock, _ in open_.values():
            sock.close()
    return found

def replica(secret_file):
    import torch
    import thinwire

    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with thinwire.AsyncDiLoCo(model, optimizer, every=1, store="host0:{PORT}", name="a", secret_file=secret_file) as replica:
        optimizer.step()
        return replica.client.versions

while not (results / "serving").exists():
    time.sleep(0.05)
seen = {{"open": scan()}}
stranger = socket.create_connection((host, {PORT}), timeout=20)
stranger.sendall(b"joins/worker/1 hello" * 10)
answer = b""
try:
    while more := stranger.recv(1000):
        answer += more
except ConnectionResetError:
    pass
seen["answer to a stranger"] = len(answer)
from thinwire.errors import UserError

try:
    replica(None)
except UserError as error:
    seen["without the secret"] = str(error)
seen["with the secret"] = replica(results / "secret")
(results / "seen").write_text(json.dumps(seen))
(results / "done").touch()
"""


def scanned(folder: Path) -> LabResult:
    script = folder / "scan.py"
    script.write_text(SCAN)
    cluster = build_cluster(("host0", "switch"), ("host1", "switch"))
    processes = [
        Process("host0", ("sh", "-c", SERVE, "serve", sys.executable), FIRST_CARD),
        Process("host1", (sys.executable, str(script)), FIRST_CARD),
    ]
    return launch(cluster, processes, LabOptions(notice_s=5))


@pytest.mark.lab
@pytest.mark.timeout(240)
@pytest.mark.long
def test_a_service_is_reachable_where_it_is_bound_and_nowhere_else(tmp_path: Path, warm: None) -> None:
    result = scanned(tmp_path)
    assert result.failure is None, result.failure
    seen = json.loads(result.results["seen"])
    assert "others reach that, so give a --secret-file" in result.results["refused"]
    assert seen["open"] == [PORT]
    assert seen["answer to a stranger"] < 100  # a challenge, and the end
    assert seen["without the secret"].endswith("it asks for a secret; give secret_file (thinwire serve --secret-file)")
    assert seen["with the secret"] == [1]
    bound = result.results["bound"].splitlines()
    assert bound[0].startswith("serving at ") and not bound[0].startswith(("serving at 127.", "serving at 0."))
    assert [line.split(" a on ")[1] for line in bound[1:]] == ["host1 joined", "host1 left"]
    assert result.results["alone"] == "serving at 127.0.0.1:29700\n"
