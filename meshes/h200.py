"""One H200 GPU."""

from llmjax.mesh import Cluster
from meshes.chips import H200

cluster = Cluster("h200", H200, chips=1)
