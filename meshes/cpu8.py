"""Eight emulated CPU devices on this machine: to try any layout without an accelerator."""

from llmjax.mesh import Cluster
from meshes.chips import CPU

cluster = Cluster("cpu8", CPU, chips=8, tensor=2, emulated=True)
