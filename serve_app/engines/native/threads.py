"""Reserves torch's threads for the steps of the model."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on the calling thread only.

    OpenMP creates helper threads for every thread on which torch computes, and keeps them. With more of them than
    cores, those of the engine sleep between two operations instead of spinning, and a step of a small model takes twice
    as long (libgomp's GOMP_SPINCOUNT). torch.set_num_threads would limit MKL on the engine's thread too.
    """
    torch.get_num_threads()  # its first call on a thread sets the number of threads, which the next line changes
    try:
        openmp = ctypes.CDLL(None)
        before, limit = openmp.omp_get_max_threads(), openmp.omp_set_num_threads
    except AttributeError:  # torch computes without OpenMP
        yield
        return
    limit(1)
    try:
        yield
    finally:
        limit(before)
