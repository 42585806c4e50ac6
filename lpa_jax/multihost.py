"""Many hosts: how processes find each other, and which part of a batch belongs to which.

Everything else about several hosts is in the mapped step (`lpa_jax.parallel`), which is the same
on one host and on many: the mapped axis runs over the devices of all of them.
"""

import jax

from lpa_jax import checks


def connect(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    initialization_timeout: int = 300,
    heartbeat_timeout: int = 100,
) -> None:
    """Joins the processes of a run, before anything else asks JAX for a device.

    On TPU pods, under Slurm and under Open MPI no argument is needed: the environment knows them.
    Elsewhere all three are.

    Where a process dies or stops, JAX's runtime ends the others with SIGABRT: at once if it was
    process 0, which the others hold a connection to, within `heartbeat_timeout` otherwise. So it
    does after `initialization_timeout` (and up to 6 seconds) where one never comes.

    Args:
      coordinator_address: Host:port of process 0; the port must be free there.
      num_processes: How many processes there are.
      process_id: This process, 0..num_processes-1.
      initialization_timeout: Whole seconds to wait for the others.
      heartbeat_timeout: Whole seconds of silence after which a process counts as dead.

    Raises:
      ValueError: An argument out of range, some of the three without the others where the
        environment does not supply them, or a call after JAX has started.
    """
    given = (coordinator_address, num_processes, process_id)
    checks.integer("initialization_timeout", initialization_timeout, 1)
    checks.integer("heartbeat_timeout", heartbeat_timeout, 1)
    if num_processes is not None:
        checks.integer("num_processes", num_processes, 1)
    if process_id is not None:
        last = checks.LARGEST if num_processes is None else num_processes - 1
        checks.integer("process_id", process_id, 0, last)
    if coordinator_address is not None and not _is_host_and_port(coordinator_address):
        raise ValueError(f"coordinator_address must be host:port, got {coordinator_address!r}")
    try:
        jax.distributed.initialize(
            *given,
            cluster_detection_method=None if None in given else "deactivate",
            initialization_timeout=initialization_timeout,
            heartbeat_timeout_seconds=heartbeat_timeout,
            shutdown_timeout_seconds=heartbeat_timeout,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the processes cannot be joined: {reason}") from None


def _is_host_and_port(address: str) -> bool:
    host, colon, port = address.rpartition(":")
    return bool(host and colon and port.isdecimal() and 0 < int(port) < 2**16)


def host_slice() -> tuple[int, int]:
    """(process_index, process_count), as the batches in `lpa_jax.data` take it.

    Example:
      >>> host_slice()
      (0, 1)
    """
    return jax.process_index(), jax.process_count()


def is_first_host() -> bool:
    """Whether this process is the one that prints and writes files.

    Starts no backend in a program that has joined no processes.

    Example:
      >>> is_first_host()
      True
    """
    return not jax.distributed.is_initialized() or jax.process_index() == 0
