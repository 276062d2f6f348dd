"""A cluster in a box: each host of a cluster file as a network namespace, each link as a shaped veth pair.

kernel    what this machine can do, and the reason where it cannot
wiring    Cluster -> the `ip` and `tc` lines that build it (plain data, nothing is run)
stalls    links that fall silent for a while
commands  a command line -> the processes of each host
enter     a command on another host of the lab, as through ssh
run       start a lab, wait for it, count the cards: the one to call
inside    process 1 of the lab: builds, starts, watches (never imported by the others)
"""
