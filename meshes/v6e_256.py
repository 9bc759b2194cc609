"""A full TPU v6e pod: 256 chips, 16x16."""

from llmjax.mesh import Cluster
from meshes.chips import TPU_V6E

cluster = Cluster("v6e_256", TPU_V6E, chips=256, topology="16x16", tensor=4)
