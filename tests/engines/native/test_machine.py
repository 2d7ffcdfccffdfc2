"""Memory, cores and instruction sets that the process finds, from files in the format of Linux."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.config import NativeOptions
from serve_app.engines.native.machine import (
    NotEnoughMemory,
    available_bytes,
    kv_tokens_that_fit,
    processor_flags,
    usable_cores,
)

MIB = 2**20


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    """A machine with 1000 MiB of available memory."""
    return written(tmp_path / "meminfo", f"MemTotal: 9999999 kB\nMemAvailable:   {1000 * 1024} kB\nBuffers: 1 kB\n")


def written(path: Path, text: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(text))
    return path


def test_without_a_cgroup_the_machine_is_the_limit(meminfo: Path, tmp_path: Path) -> None:
    assert available_bytes(meminfo, tmp_path / "nowhere", tmp_path / "alone") == 1000 * MIB


def test_this_machine_has_some_memory() -> None:
    assert available_bytes() > 0


def test_reclaimable_page_cache_of_cgroup_v2_counts_as_free(meminfo: Path, tmp_path: Path) -> None:
    written(tmp_path / "memory.max", 500 * MIB)
    written(tmp_path / "memory.current", 450 * MIB)
    assert available_bytes(meminfo, tmp_path, tmp_path / "alone") == 50 * MIB
    written(tmp_path / "memory.stat", f"anon 5\nactive_file 7\ninactive_file {100 * MIB}\n\n")
    assert available_bytes(meminfo, tmp_path, tmp_path / "alone") == 150 * MIB
    written(tmp_path / "memory.stat", "anon 5\n")
    assert available_bytes(meminfo, tmp_path, tmp_path / "alone") == 50 * MIB


def test_the_limit_of_cgroup_v1_is_read(meminfo: Path, tmp_path: Path) -> None:
    written(tmp_path / "memory/memory.limit_in_bytes", 300 * MIB)
    written(tmp_path / "memory/memory.usage_in_bytes", 250 * MIB)
    written(tmp_path / "memory/memory.stat", f"total_inactive_file {20 * MIB}\n")
    assert available_bytes(meminfo, tmp_path, tmp_path / "alone") == 70 * MIB


@pytest.mark.parametrize("tight", ["", "a.slice", "a.slice/b.service"])
def test_the_lowest_limit_among_the_ancestor_cgroups_holds(meminfo: Path, tmp_path: Path, tight: str) -> None:
    own = written(tmp_path / "own", "1:name=systemd:/elsewhere\n0::/a.slice/b.service\n")
    for group in ("", "a.slice", "a.slice/b.service", "other"):
        limit = 200 if group == tight else 100 if group == "other" else 900
        written(tmp_path / "tree" / group / "memory.max", limit * MIB)
        written(tmp_path / "tree" / group / "memory.current", 50 * MIB)
    assert available_bytes(meminfo, tmp_path / "tree", own) == 150 * MIB


def test_limits_of_ancestor_cgroups_v1_are_read(meminfo: Path, tmp_path: Path) -> None:
    own = written(tmp_path / "own", "5:cpu,memory:/a/b\n0::/\n")
    written(tmp_path / "tree/memory/a/memory.limit_in_bytes", 300 * MIB)
    written(tmp_path / "tree/memory/a/memory.usage_in_bytes", 100 * MIB)
    assert available_bytes(meminfo, tmp_path / "tree", own) == 200 * MIB


@pytest.mark.parametrize("group", ["/", "/../outside", "/docker/0123", "/gone (deleted)"])
def test_the_mounted_cgroup_is_used_if_the_own_path_is_not_mounted(meminfo: Path, tmp_path: Path, group: str) -> None:
    own = written(tmp_path / "own", f"0::{group}\n")
    written(tmp_path / "tree/memory.max", 300 * MIB)
    written(tmp_path / "tree/memory.current", 100 * MIB)
    assert available_bytes(meminfo, tmp_path / "tree", own) == 200 * MIB


def test_a_cgroup_path_outside_of_the_mount_is_not_followed(meminfo: Path, tmp_path: Path) -> None:
    own = written(tmp_path / "own", "4:memory:/../a\n0::/../a\n")
    for namesake in ("a", "tree/a", "tree/memory/a"):
        for limit, usage in (("max", "current"), ("limit_in_bytes", "usage_in_bytes")):
            written(tmp_path / namesake / f"memory.{limit}", 10 * MIB)
            written(tmp_path / namesake / f"memory.{usage}", 0)
    assert available_bytes(meminfo, tmp_path / "tree", own) == 1000 * MIB


def test_reclaimable_page_cache_of_an_ancestor_counts_as_free(meminfo: Path, tmp_path: Path) -> None:
    own = written(tmp_path / "own", "0::/a/b:c\n")
    written(tmp_path / "tree/a/memory.max", 300 * MIB)
    written(tmp_path / "tree/a/memory.current", 250 * MIB)
    written(tmp_path / "tree/a/memory.stat", f"inactive_file {30 * MIB}\n")
    written(tmp_path / "tree/a/b:c/memory.max", 100 * MIB)
    written(tmp_path / "tree/a/b:c/memory.current", 10 * MIB)
    assert available_bytes(meminfo, tmp_path / "tree", own) == 80 * MIB


def test_a_cgroup_without_a_limit_is_ignored(meminfo: Path, tmp_path: Path) -> None:
    written(tmp_path / "memory.max", "max\n")
    written(tmp_path / "memory.current", 450 * MIB)
    assert available_bytes(meminfo, tmp_path, tmp_path / "alone") == 1000 * MIB


def test_a_limit_without_a_usage_is_ignored(meminfo: Path, tmp_path: Path) -> None:
    written(tmp_path / "memory.max", 500 * MIB)
    assert available_bytes(meminfo, tmp_path, tmp_path / "alone") == 1000 * MIB


def test_a_cgroup_over_its_limit_has_no_available_memory(meminfo: Path, tmp_path: Path) -> None:
    written(tmp_path / "memory.max", 100)
    written(tmp_path / "memory.current", 300)
    assert available_bytes(meminfo, tmp_path, tmp_path / "alone") == 0


def test_meminfo_without_memavailable_is_an_error_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(NotEnoughMemory, match="memless has no MemAvailable line"):
        available_bytes(written(tmp_path / "memless", "MemTotal: 1 kB\n"))


@pytest.mark.parametrize(
    ("config", "tokens"),
    [(NativeOptions(kv_memory_fraction=0.5), 5), (NativeOptions(kv_memory_bytes=30 * MIB), 3)],
)
def test_the_memory_budget_gives_the_number_of_tokens(config: NativeOptions, tokens: int) -> None:
    assert kv_tokens_that_fit(config, free_bytes=100 * MIB, token_bytes=10 * MIB, longest=3) == tokens


def test_the_error_for_a_budget_below_one_sequence_has_the_numbers() -> None:
    with pytest.raises(NotEnoughMemory) as caught:
        kv_tokens_that_fit(NativeOptions(), free_bytes=100 * MIB, token_bytes=MIB // 2, longest=120)
    assert str(caught.value).startswith(
        "one sequence of 120 tokens needs 60 MiB of KV memory, the budget is 50 MiB (100 MiB free); lower"
    )
    with pytest.raises(NotEnoughMemory, match=r"the budget is 0\.5 MiB; lower"):
        kv_tokens_that_fit(NativeOptions(kv_memory_bytes=MIB // 2), free_bytes=0, token_bytes=MIB, longest=1)


ALL = usable_cores(Path("/nowhere"), Path("/nowhere"))


@pytest.mark.parametrize(("limit", "cores"), [("max 100000", ALL), ("100000 100000", 1), ("5000 100000", 1), ("", ALL)])
def test_cores_are_bounded_by_the_quota_of_cgroup_v2(tmp_path: Path, limit: str, cores: int) -> None:
    written(tmp_path / "pod" / "cpu.max", limit)
    own = written(tmp_path / "own", "0::/pod/app\n")
    assert usable_cores(tmp_path, own) == cores


@pytest.mark.parametrize(("quota", "cores"), [(-1, ALL), (100_000, 1), (100_000 * 10_000, ALL)])
def test_cores_are_bounded_by_the_quota_of_cgroup_v1(tmp_path: Path, quota: int, cores: int) -> None:
    written(tmp_path / "cpu" / "app" / "cpu.cfs_quota_us", quota)
    written(tmp_path / "cpu" / "app" / "cpu.cfs_period_us", 100_000)
    assert usable_cores(tmp_path, written(tmp_path / "own", "4:cpu,cpuacct:/app\n")) == cores


@pytest.mark.parametrize(
    ("cpuinfo", "flags"),
    [
        (
            "processor\t: 0\nflags\t\t: fpu avx2 avx512_vnni\n\nprocessor\t: 1\nflags\t\t: fpu\n",
            {"fpu", "avx2", "avx512_vnni"},
        ),
        ("processor\t: 0\nFeatures\t: fp asimd asimddp\n", {"fp", "asimd", "asimddp"}),
        ("processor\t: 0\n", set()),
    ],
    ids=["x86", "arm", "none"],
)
def test_processor_flags_are_those_of_the_first_processor(tmp_path: Path, cpuinfo: str, flags: set[str]) -> None:
    assert processor_flags(written(tmp_path / "cpuinfo", cpuinfo)) == flags


def test_processor_flags_are_empty_without_cpuinfo(tmp_path: Path) -> None:
    assert processor_flags(tmp_path / "missing") == set()
