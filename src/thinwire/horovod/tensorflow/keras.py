"""`import thinwire.horovod.tensorflow.keras as hvd`: the same as `thinwire.horovod.keras`."""

from thinwire.horovod.keras import *  # noqa: F403 - all of it
