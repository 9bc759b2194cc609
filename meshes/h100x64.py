"""8 nodes of 8 H100 GPUs each, tensor parallelism inside a node."""

from llmjax.mesh import Cluster
from meshes.chips import H100

cluster = Cluster("h100x64", H100, chips=64, tensor=8)
