"""One node of 8 H100 GPUs."""

from llmjax.mesh import Cluster
from meshes.chips import H100

cluster = Cluster("h100x8", H100, chips=8, tensor=4)
