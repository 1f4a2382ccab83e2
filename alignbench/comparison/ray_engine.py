"""Cells as tasks of Ray: of the cluster at RAY_ADDRESS, or of a local one that listens to this machine alone."""

import logging
import os
import socket
import sys
from collections.abc import Iterable
from contextlib import chdir, suppress
from pathlib import Path
from typing import Any

from alignbench.comparison.cells import run_cell
from alignbench.comparison.grid import Cell
from alignbench.comparison.pool import Listener
from alignbench.config.run_config import RunConfig
from alignbench.errors import RunError, UserError
from alignbench.runtime.import_path import HOME


def run_with_ray(cells: Iterable[Cell], runs: Path, listener: Listener, gpus: float, processes: int) -> None:
    """Runs all cells as tasks of Ray.

    Args:
        runs: the folder of the cells' folders, on a file system that all nodes see.
        gpus: GPUs that each cell asks for.
        processes: how many processes share a cell.

    Raises:
        UserError: Ray is not installed.
        RunError: Ray cannot be started or reached.
    """
    if not os.environ.get("RAY_ADDRESS"):
        # Ray reads it when it is imported. Its servers then take 127.0.0.1 for their address, and listen nowhere else.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray needs Ray: pip install 'alignbench[ray]'") from None
    _start(ray)
    try:
        calls = 1 if processes > 1 else 0  # cells that one process of Ray's may run; 0 for any number
        remote = ray.remote(max_retries=0, max_calls=calls)(_task)
        place = (os.getcwd(), list(sys.path))
        at_work = {}
        for cell in cells:
            task = remote.options(num_cpus=cell.method.grid.threads * processes, num_gpus=gpus)
            at_work[task.remote(place, cell.config, (runs / cell.id).resolve(), processes)] = cell
        while at_work:
            ready, _ = ray.wait(list(at_work), num_returns=1)
            cell = at_work.pop(ready[0])
            try:
                error = ray.get(ready[0])
            except Exception as failure:  # the node or the process died
                error = f"its task died ({type(failure).__name__}: {' '.join(str(failure).split())})"
            listener.ended(cell, error)
    finally:
        ray.shutdown()


def _start(ray: Any) -> None:
    """Connects to the cluster at RAY_ADDRESS, or starts one on this machine; raises RunError where that fails."""
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            _check_reachable(address)
        with chdir(HOME):  # Ray puts the folder that it is started from on its workers' import path
            ray.init(
                address or "local",
                ignore_reinit_error=True,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except Exception as error:  # Ray has many kinds
        with suppress(Exception):
            ray.shutdown()
        what = f"be reached at RAY_ADDRESS={address}" if address else "be started on this machine"
        why = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise RunError(f"Ray cannot {what}: {why}; nothing has been run, and --engine local works without it") from None


def _check_reachable(address: str) -> None:
    """Raises OSError where nothing listens at `host:port`, which Ray would take minutes to notice."""
    host, _, port = address.removeprefix("ray://").partition("/")[0].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _task(place: tuple[str, list[str]], config: RunConfig, folder: Path, processes: int) -> str | None:
    """`run_cell` in the folder and with the import path of the process that asks for it."""
    here, path = place
    with suppress(OSError):  # on other machines it may not exist
        os.chdir(here)
    sys.path += [entry for entry in path if entry not in sys.path]
    return run_cell(config, folder, processes=processes)
