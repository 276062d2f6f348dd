"""Horovod's API: `import thinwire.horovod.torch as hvd` in place of `import horovod.torch as hvd`."""
