"""The processes of a run: joining a cluster, a loopback cluster on one machine, and leaving."""

import collections
import dataclasses
import hashlib
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from llmjax import hardware, redact, tracking
from llmjax.errors import DONE, PREEMPTED, USAGE, Refused, TooFewDevices
from llmjax.mesh import Cluster
from llmjax.rollcall import roll_call


@dataclasses.dataclass(frozen=True)
class Processes:
    """For a cluster that is not detected; `llmjax launch` fills this in for a cluster on one machine."""

    coordinator: str = ""
    "host:port of process 0. Empty: SLURM, Open MPI, Kubernetes and Cloud TPU are detected."
    count: int = 0
    "Number of processes. 1 without a coordinator: run alone, detect nothing."
    index: int = -1
    "Which of them this is, from 0."
    devices: int = 0
    "Emulated CPU devices of each process; 0: the devices of the mesh."
    timeout: int = 300
    "Seconds that a process waits for the others at the start."
    patience: int = 60
    "Seconds without a sign of life after which a process counts as lost."


@dataclasses.dataclass(frozen=True)
class Supervised:
    """What `llmjax supervise` tells a run that it starts."""

    heartbeat: str = ""
    "File that says how far the run is, as JSON; rewritten while there is progress."
    fallback: bool = False
    "Train on fallback_mesh instead of mesh."


def start(cluster: Cluster, processes: Processes | None = None) -> list[jax.Device]:
    """Joins the run's processes and returns the devices of the mesh, all processes together.

    Call it before anything touches a JAX backend. On a lone machine it neither prints, waits nor opens a port.

    Raises:
      Refused: the process settings contradict each other, or the mesh is not what was found.
    """
    processes = processes or Processes()
    _check(cluster, processes)
    each = processes.devices or (cluster.chips // max(processes.count, 1) if cluster.emulated else 0)
    if each:
        _emulate(each)
    if processes.coordinator:
        _join(processes)
    elif not each and processes.count != 1:
        _detect(os.environ, processes)
    compiler_only()
    devices = jax.devices()
    if jax.process_count() > 1 and devices[0].platform == "cpu":
        _hide_foreign_output()
    return _matching(cluster, devices, jax.process_count())


def compiler_only() -> None:
    """Has libtpu, if it is installed where there is no TPU, serve as a compiler.

    Without this it asks the cloud for the TPU that is not there, complains, and lets only one process load it.
    """
    if hardware.has(*hardware.TPUS):
        return
    settings = dict(TPU_SKIP_MDS_QUERY="1", TPU_MIN_LOG_LEVEL="3", TPU_ACCELERATOR_TYPE="v5p-8",
                    TPU_WORKER_HOSTNAMES="localhost", ALLOW_MULTIPLE_LIBTPU_LOAD="1")  # fmt: skip
    for name, value in settings.items():
        if os.environ.get(name, "WARNING").startswith("WARNING"):  # what JAX writes there when it has found no TPU
            os.environ[name] = value


def _check(cluster: Cluster, processes: Processes) -> None:
    """Refuses settings that contradict each other, before anything is started."""
    if processes.coordinator:
        host, _, port = processes.coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise Refused(f"processes.coordinator is '{processes.coordinator}': give host:port, e.g. 10.0.0.1:8476.")
        if processes.count < 1:
            raise Refused(f"processes.count is {processes.count}: say how many processes share the coordinator.")
        if not 0 <= processes.index < processes.count:
            raise Refused(f"processes.index is {processes.index}: give 0 to {processes.count - 1}, one each.")
    elif processes.count > 1 or processes.index > 0:
        raise Refused("processes.coordinator is empty: give host:port of process 0, or use `llmjax launch`.")
    if processes.timeout < 1 or processes.patience < 1:
        field = "timeout" if processes.timeout < 1 else "patience"
        raise Refused(f"processes.{field} is {getattr(processes, field)}: give a number of seconds.")
    if processes.devices < 0:
        raise Refused(f"processes.devices is {processes.devices}: give a positive number, or 0 for the mesh's own.")
    if cluster.emulated:
        count = max(processes.count, 1)
        total = processes.devices * count or cluster.chips
        if cluster.chips % count or total != cluster.chips:
            raise Refused(
                f"mesh {cluster.name} has {cluster.chips} devices, which {count} processes"
                f"{f' of {processes.devices} devices' if processes.devices else ''} do not make: "
                "choose --mesh local, or numbers that multiply to it."
            )


def _emulate(devices: int) -> None:
    if jax.config.jax_num_cpu_devices == devices and jax.config.jax_platforms == "cpu":
        return  # a second run in one interpreter: JAX refuses even an unchanged value once a backend exists
    try:
        jax.config.update("jax_num_cpu_devices", devices)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:
        if jax.devices()[0].platform != "cpu":
            raise


def _join(processes: Processes) -> None:
    loopback = processes.coordinator.startswith("127.")
    if loopback:
        jax.config.update("jax_check_proxy_envs", False)  # a proxy is never asked for this machine: no warning
    roll_call(processes.coordinator, processes.count, processes.index, processes.timeout)
    jax.distributed.initialize(
        processes.coordinator,
        processes.count,
        processes.index,
        cluster_detection_method="deactivate",
        initialization_timeout=processes.timeout,
        heartbeat_timeout_seconds=processes.patience,
        coordinator_bind_address=processes.coordinator if loopback else None,  # the default binds every interface
    )


def _detect(environment: Mapping[str, str], processes: Processes) -> None:
    """Joins the cluster that JAX detects, if there is one.

    JAX detects by environment variables, and by a TPU on the PCI bus before it asks for any metadata; alone, it
    raises ValueError at once, with nothing started.
    """
    if jax.distributed.is_initialized() or _lone_task(environment):
        return
    if (
        "JOB_COMPLETION_INDEX" in environment
        and not importlib.util.find_spec("kubernetes")
        and not _tpu_pod(environment)
    ):
        raise Refused(
            "This pod belongs to an indexed Kubernetes Job, and the package that finds its peers is missing: "
            "pip install 'jax[k8s]', give --processes.coordinator, count and index, or run alone with "
            "--processes.count 1."
        )
    try:
        jax.distributed.initialize(
            initialization_timeout=processes.timeout, heartbeat_timeout_seconds=processes.patience
        )
    except ValueError as error:
        if "coordinator_address" not in str(error):
            raise Refused(
                f"JAX found part of a cluster only ({error}): give --processes.coordinator, count and index."
            ) from error
    except RuntimeError as error:  # a notebook that has used JAX already may still train alone
        if "must be called before" not in str(error) or _launched(environment) or jax.devices()[0].platform == "tpu":
            raise


def _lone_task(environment: Mapping[str, str]) -> bool:
    """One task or pod of its own, which JAX would treat as a cluster of one, with one GPU, or warn about."""
    if environment.get("OMPI_COMM_WORLD_SIZE", environment.get("SLURM_NTASKS")) == "1":
        return True
    pod = "KUBERNETES_SERVICE_HOST" in environment
    return pod and not _launched(environment) and not _tpu_pod(environment)


def _launched(environment: Mapping[str, str]) -> bool:
    return any(key in environment for key in ("SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE", "JOB_COMPLETION_INDEX"))


def _tpu_pod(environment: Mapping[str, str]) -> bool:
    return any(key in environment for key in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"))


def _matching(cluster: Cluster, devices: list[jax.Device], processes: int) -> list[jax.Device]:
    """The devices that make up the mesh; Refused where these cannot."""
    wanted, found, kind = cluster.chips, len(devices), devices[0].device_kind
    emulate = "choose --mesh local, or emulate eight CPU devices with --mesh cpu8"
    if wanted is not None and found < wanted:
        needs = f"{wanted} device{'s' * (wanted > 1)}"
        where = "this machine has" if processes == 1 else f"these {processes} processes have"
        raise TooFewDevices(f"mesh {cluster.name} needs {needs} and {where} {found} {kind}: {emulate}.")
    if cluster.chip is not None and cluster.chip.platform != devices[0].platform:
        raise Refused(f"mesh {cluster.name} is of {cluster.chip.name} chips and this machine has {kind}: {emulate}.")
    if cluster.chip is not None and cluster.chip.kinds and not cluster.chip.named(kind):
        raise Refused(
            f"mesh {cluster.name} is of {cluster.chip.name} chips and these are '{kind}', whose peak and memory "
            "differ: choose --mesh local, or write a mesh for them."
        )
    if wanted is not None and found > wanted and processes > 1:
        raise Refused(
            f"mesh {cluster.name} needs {wanted} devices and these {processes} processes have {found}: "
            "start fewer processes, or choose --mesh local."
        )
    return devices[:wanted]


def _hide_foreign_output() -> None:
    """Keeps stdout for Python: Gloo prints a line there for every group of processes it connects, at any time."""
    shown = sys.stdout
    if (shown.stream if isinstance(shown, redact.Stream) else shown) is not sys.__stdout__:
        return  # captured by someone who knows what they do
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    sys.__stdout__ = open(  # noqa: SIM115  lives as long as the process
        kept, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, buffering=1
    )
    if isinstance(shown, redact.Stream):
        shown.stream = sys.__stdout__
    else:
        sys.stdout = sys.__stdout__


def barrier(name: str) -> None:
    """Returns once every process has come here; at once where there is one."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def agree(value: int) -> int:
    """The first process's value, on every process; it waits for all of them."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def every(fine: bool) -> bool:
    """Whether it is fine on every process; it waits for all of them."""
    if jax.process_count() == 1:
        return fine
    from jax.experimental import multihost_utils

    return bool(np.min(multihost_utils.process_allgather(np.int32(fine))))


def share(value: Any) -> Any:
    """The first process's value (JSON), on every process; it waits for all of them."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    text = json.dumps(value).encode() if jax.process_index() == 0 else b""
    padded = np.zeros(agree(len(text)), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8)))


def gather(text: str) -> list[str]:
    """What every process says, in their order, on all of them."""
    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    said = text.encode()
    longest = int(np.max(multihost_utils.process_allgather(np.int32(len(said)))))
    padded = np.frombuffer(said.ljust(longest, b"\0"), np.uint8)
    return [bytes(row).rstrip(b"\0").decode() for row in np.asarray(multihost_utils.process_allgather(padded))]


def agreement(facts: Mapping[str, Any], code: int = USAGE) -> None:
    """Returns if all processes say the same of everything; each calls it with the same names, at the same point.

    Raises:
      Refused: with `code`, the names of what differs, and the processes that differ from most, on all of them.
    """
    mine = {name: hashlib.sha256(json.dumps(value).encode()).hexdigest() for name, value in facts.items()}
    said = [json.loads(text) for text in gather(json.dumps([platform.node(), mine]))]
    odd: dict[int, list[str]] = {}
    for name in mine:
        values = [theirs.get(name) for _, theirs in said]
        usual = collections.Counter(values).most_common(1)[0][0]
        for index, value in enumerate(values):
            if value != usual:
                odd.setdefault(index, []).append(name)
    if odd:
        index, names = next(iter(odd.items()))
        others = f" (and {len(odd) - 1} more processes)" if len(odd) > 1 else ""
        raise Refused(
            f"process {index} on {said[index][0]}{others} differs from the others in {', '.join(names)}: start every "
            "process with the same command, code and data.",
            code,
        )


def lost_peer(error: BaseException) -> bool:
    """Whether this error of a collective means that another process is gone."""
    text = str(error)
    return isinstance(error, jax.errors.JaxRuntimeError) and any(
        sign in text for sign in ("Connection closed by peer", "Connection reset by peer", "heartbeat timeout")
    )


def leave(code: int) -> None:
    """Ends this process; on failure at once, without the wait for its peers that JAX adds to a normal exit.

    That wait lasts up to five minutes, while the peers wait for this process in a collective.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if tracking.hanging():  # Python would wait for what it has left open
        os._exit(code)
    if code not in (DONE, PREEMPTED) and jax.distributed.is_initialized() and jax.process_count() > 1:
        os._exit(code)
    sys.exit(code)


def describe(sharding: NamedSharding, batch: int) -> str:
    """This process's share of a batch [A, B/A, ...], for its log: "process 1 of 2: 4 of 8 devices, 32 of 64 rows"."""
    mine, every = sharding.addressable_devices, sharding.device_set
    cuts = {rows.indices(batch)[:2] for _, rows in sharding.addressable_devices_indices_map((1, batch)).values()}
    return (
        f"process {jax.process_index()} of {jax.process_count()}: {len(mine)} of {len(every)} devices, "
        f"{sum(stop - start for start, stop in cuts)} of {batch} rows"
    )
