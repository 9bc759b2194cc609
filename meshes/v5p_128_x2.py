"""Two TPU v5p slices of 128 chips, 4x4x8 each (Google: two of v5p-256); data parallel between them."""

from llmjax.mesh import Cluster
from meshes.chips import TPU_V5P

cluster = Cluster("v5p_128_x2", TPU_V5P, chips=256, slices=2, topology="4x4x8", tensor=4)
