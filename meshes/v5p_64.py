"""A TPU v5p slice of 64 chips, 4x4x4 (Google counts cores and calls it v5p-128)."""

from llmjax.mesh import Cluster
from meshes.chips import TPU_V5P

cluster = Cluster("v5p_64", TPU_V5P, chips=64, topology="4x4x4", tensor=4)
