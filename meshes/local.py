"""Whatever this machine, or this group of processes, has."""

from llmjax.mesh import Cluster
from meshes.chips import KNOWN

cluster = Cluster("local", known=KNOWN)
