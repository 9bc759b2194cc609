"""Thirty-two emulated CPU devices on this machine: enough for five axes at once."""

from llmjax.mesh import Cluster
from meshes.chips import CPU

cluster = Cluster("cpu32", CPU, chips=32, tensor=2, emulated=True)
