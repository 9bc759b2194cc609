"""A TPU 7x (Ironwood) slice of 64 chips, 4x4x4: 128 JAX devices, two to a chip."""

from llmjax.mesh import Cluster
from meshes.chips import TPU_7X

cluster = Cluster("tpu7x_64", TPU_7X, chips=128, topology="4x4x4", tensor=8)
