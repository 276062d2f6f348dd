"""A command of a host that is killed: `python -c KILLER CHECKPOINTS COMMAND ...` ends all processes of the host with kill -9
when there are two checkpoints."""

KILLER = """
import os, subprocess, sys, time
from pathlib import Path
folder, *command = sys.argv[1:]
started = subprocess.Popen(command)
while len(list(Path(folder).glob("step-*"))) < 2 and started.poll() is None:
    time.sleep(0.02)
here = os.readlink("/proc/self/ns/net")
for pid in [int(one) for one in os.listdir("/proc") if one.isdigit()]:
    if pid != os.getpid() and os.readlink(f"/proc/{pid}/ns/net") == here:
        os.kill(pid, 9)
sys.exit(started.wait() and 137)
"""
