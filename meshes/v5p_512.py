"""A TPU v5p slice of 512 chips, 8x8x8 (Google counts cores and calls it v5p-1024)."""

from llmjax.mesh import Cluster
from meshes.chips import TPU_V5P

cluster = Cluster("v5p_512", TPU_V5P, chips=512, topology="8x8x8", tensor=8)
