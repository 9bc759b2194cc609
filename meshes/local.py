"""Whatever this machine has."""
from llmjax.mesh import Cluster
cluster=Cluster("local")
