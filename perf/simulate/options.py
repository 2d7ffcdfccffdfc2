"""The command line of `python -m perf.simulate`, and the scales that it offers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from perf.options import positive, seconds
from perf.simulate.settings import STRATEGIES, Burst, Fleet, Job, Losses, Profile, Strategy, Traffic

_EPILOG = """\
scales (time on 2 cores; the time grows with users and seconds):
  quick      30,000 users, about 3 replicas, 2 minutes: some seconds
  trace      200,000 users, about 20 replicas, 10 minutes with two bursts: 1 to 2 minutes
  internet   10,000,000 users, about 1,000 replicas, 3 minutes with a burst: about 10 minutes, 2 GB
  day        50,000 users, 1 to 10 replicas, 24 hours with random bursts: about 6 minutes

examples:
  python -m perf.simulate                          the 10-minute trace, all strategies, starts of 5, 60 and 180 s
  python -m perf.simulate --start 20 --seed 2      another start time and other requests
  python -m perf.simulate --scale internet --only product,ray-16
  python -m perf.simulate --scale day --users 10000000 --only product     hours

exit codes: 0 success; 1 the product missed a bar; 2 invalid arguments; 130 Ctrl-C.
"""

# Replicas at most, and waiting requests at most, for each user.
_USERS_PER_REPLICA, _USERS_PER_PLACE = 5_000, 250
_FEW = ("product", "ray-2", "ray-16", "power-of-two", "oracle")
_LARGE = tuple(strategy for strategy in STRATEGIES if strategy.name in _FEW)


@dataclass(frozen=True, slots=True)
class Scale:
    traffic: Traffic
    starts: tuple[float, ...]
    strategies: tuple[Strategy, ...] = STRATEGIES


SCALES = {
    "quick": Scale(Traffic(users=30_000, seconds=120, bursts=(Burst(30, 30, 3.0),)), (5.0,)),
    "trace": Scale(Traffic(users=200_000), (5.0, 60.0, 180.0)),
    "internet": Scale(Traffic(users=10_000_000, seconds=180, bursts=(Burst(45, 60, 3.0),)), (60.0,), _LARGE),
    "day": Scale(Traffic(users=50_000, seconds=86_400, from_hour=0, bursts=(), hourly_bursts=0.5), (60.0,), _LARGE),
}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m perf.simulate",
        description="Simulates a service with many replicas and users: the routing table and the scaling policy of "
        "serve_app themselves, against Ray Serve's policies, round robin and an oracle. Replicas, users and losses are "
        "simulated; no service is needed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--scale", choices=tuple(SCALES), default="trace", help="default: %(default)s")
    parser.add_argument("--quick", action="store_const", const="quick", dest="scale", help="the same as --scale quick")
    parser.add_argument("--users", type=positive, metavar="N", help="number of users; replicas grow with it")
    parser.add_argument("--seconds", type=seconds, metavar="T", help="length of the trace, such as 5m")
    parser.add_argument("--start", type=seconds, nargs="+", metavar="T", help="time that a replica takes to start")
    parser.add_argument("--only", metavar="NAME,...", help="strategies to simulate")
    parser.add_argument("--list", action="store_true", help="list the strategies and exit")
    parser.add_argument("--losses", type=float, metavar="N", help="losses of a replica per hour (default: 0.5)")
    parser.add_argument("--target-ttft", type=seconds, default=2.0, metavar="T", help="target_ttft_s (default: 2s)")
    parser.add_argument("--seed", type=int, default=7, help="seed of all random numbers (default: 7)")
    parser.add_argument("--jobs", type=positive, default=2, help="processes (default: 2)")
    parser.add_argument(
        "--instance-type",
        default="g6.xlarge",
        metavar="TYPE",
        help="cloud instance type of a replica, for its price (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("perf-results/simulate"), help="folder (default: %(default)s)"
    )
    return parser


def strategies(text: str | None, known: Sequence[Strategy]) -> list[Strategy]:
    """The strategies that `--only` names, in their usual order. Raises ValueError."""
    if text is None:
        return list(known)
    names = {name.strip() for name in text.split(",")}
    if unknown := names - {strategy.name for strategy in STRATEGIES}:
        raise ValueError(f"--only: unknown strategy {min(unknown)!r}; --list has the names")
    return [strategy for strategy in STRATEGIES if strategy.name in names]


def jobs(args: argparse.Namespace, usd_per_hour: float) -> list[Job]:
    """All simulations of a command. Raises ValueError."""
    scale: Scale = SCALES[args.scale]
    traffic = replace(
        scale.traffic,
        users=scale.traffic.users if args.users is None else args.users,
        seconds=scale.traffic.seconds if args.seconds is None else args.seconds,
    )
    if args.losses is not None and args.losses < 0:
        raise ValueError("--losses is at least 0")
    losses = Losses() if args.losses is None else Losses(per_hour=args.losses)
    fleet = Fleet(
        most=max(2, traffic.users // _USERS_PER_REPLICA),
        max_queued=max(100, traffic.users // _USERS_PER_PLACE),
        target_ttft_s=args.target_ttft,
        usd_per_hour=usd_per_hour,
    )
    return [
        Job(strategy, Profile(start_s=start_s), traffic, losses, fleet, args.seed)
        for start_s in (scale.starts if args.start is None else args.start)
        for strategy in strategies(args.only, scale.strategies)
    ]
