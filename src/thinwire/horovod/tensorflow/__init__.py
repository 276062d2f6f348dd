"""Horovod's API for TensorFlow 2: `import thinwire.horovod.tensorflow as hvd`. docs/horovod.md says what there is."""

from thinwire.horovod.common import *  # noqa: F403 - all of it
from thinwire.horovod.keras.optimizer import DistributedOptimizer as DistributedOptimizer
from thinwire.horovod.tensorflow.functions import DistributedGradientTape as DistributedGradientTape
from thinwire.horovod.tensorflow.functions import broadcast_variables as broadcast_variables
from thinwire.horovod.tensorflow.mpi_ops import *  # noqa: F403 - all of it
