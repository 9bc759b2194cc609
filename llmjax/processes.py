import dataclasses, jax
@dataclasses.dataclass(frozen=True)
class Processes:
    coordinator: str = ""
    count: int = 0
    index: int = -1
    devices: int = 0
def start(cluster, processes):
    if cluster.emulated:
        jax.config.update("jax_platforms","cpu"); jax.config.update("jax_num_cpu_devices", processes.devices or cluster.chips)
    if processes.coordinator:
        jax.config.update("jax_platforms","cpu"); jax.config.update("jax_num_cpu_devices", processes.devices)
        jax.distributed.initialize(processes.coordinator, processes.count, processes.index)
    return jax.devices()
def barrier(name):
    if jax.process_count()>1:
        from jax.experimental import multihost_utils
        multihost_utils.sync_global_devices(name)
def describe(*a): return "x"
def launch(*a): return 1
