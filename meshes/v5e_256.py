"""A full TPU v5e pod: 256 chips, 16x16."""

from llmjax.mesh import Cluster
from meshes.chips import TPU_V5E

cluster = Cluster("v5e_256", TPU_V5E, chips=256, topology="16x16", tensor=4)
