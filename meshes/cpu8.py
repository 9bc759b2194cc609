"""8."""
from llmjax.mesh import Cluster
cluster=Cluster("cpu8",chips=8,emulated=True,tensor=2)
