"""What is simulated: the speed of a replica, the size of the service, its traffic, and the strategies to compare.

The numbers of a replica are assumptions and no measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Router = Literal["table", "round-robin", "power-of-two", "oracle"]
Scaler = Literal["work", "ray", "oracle"]


@dataclass(frozen=True, slots=True)
class Profile:
    """The speed of a replica in tokens per second, about that of an 8B model on one L4.

    Alone, a sequence generates `alone_rate`; all sequences together generate at most `answer_rate`. A step computes at
    most `step_tokens` tokens of a prompt, while `prompt_rate` holds for prompts. `kv_tokens` fit into the KV cache.
    """

    start_s: float = 60.0
    prompt_rate: float = 4000.0
    answer_rate: float = 800.0
    alone_rate: float = 30.0
    step_tokens: int = 512
    slots: int = 32
    max_ongoing: int = 64
    kv_tokens: int = 98_304
    block_tokens: int = 64


@dataclass(frozen=True, slots=True)
class Burst:
    """From `at_s` on, for `seconds`, the rate of new conversations is `factor` times the usual one."""

    at_s: float
    seconds: float
    factor: float


@dataclass(frozen=True, slots=True)
class Traffic:
    """Who sends what, and for how long.

    A user starts `sessions_per_day` conversations on average, of `turns` requests on average. The rate follows the time
    of the day from `from_hour` on, with the peak at 15 h, by `diurnal` above and below the mean. `hourly_bursts` random
    bursts are added to `bursts`. The system prompts of `families` are chosen by Zipf's law with the exponent `zipf`.
    """

    users: int = 1_000_000
    seconds: float = 600.0
    from_hour: float = 9.0
    diurnal: float = 0.6
    bursts: tuple[Burst, ...] = (Burst(120, 90, 3.0), Burst(360, 60, 4.0))
    hourly_bursts: float = 0.0
    sessions_per_day: float = 2.5
    turns: float = 3.0
    think_s: float = 30.0
    families: int = 500
    zipf: float = 1.1
    family_tokens: float = 700.0
    message_tokens: float = 150.0
    answer_tokens: float = 200.0
    named_sessions: float = 0.1


@dataclass(frozen=True, slots=True)
class Losses:
    """Each replica is lost `per_hour` times an hour on average, a share of `noticed` of them with notice."""

    per_hour: float = 0.5
    noticed: float = 0.5
    notice_s: float = 120.0
    # Without notice: until the requests of the replica are sent again, as HANG_S of serve_app/deployments/remote.py.
    detection_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Fleet:
    """The bounds of the service. `max_queued` requests wait at most before further ones are refused."""

    most: int = 100
    max_queued: int = 4000
    timeout_s: float = 600.0
    target_ttft_s: float = 2.0
    usd_per_hour: float = 0.0


@dataclass(frozen=True, slots=True)
class Strategy:
    """How requests are routed and how many replicas there are.

    `resumes` says whether the request of a lost replica goes on at another one. `target` is Ray's
    `target_ongoing_requests`. The delays are those of Ray's autoscaling configuration.
    """

    name: str
    router: Router
    scaler: Scaler
    resumes: bool = True
    target: float = 2.0
    upscale_delay_s: float = 0.0
    downscale_delay_s: float = 300.0


def ray(name: str, target: float, router: Router = "power-of-two", resumes: bool = False) -> Strategy:
    """Ray Serve's own policy with its own delays. Ray Serve does not resume requests."""
    return Strategy(name, router, "ray", resumes, target, upscale_delay_s=30.0, downscale_delay_s=600.0)


PRODUCT = Strategy("product", "table", "work")
# Ray's default of `target_ongoing_requests` is 2. The higher ones are what an operator might choose for 32 slots.
RAY = ray("ray-2", 2.0)
STRATEGIES = (
    PRODUCT,
    RAY,
    ray("ray-8", 8.0),
    ray("ray-16", 16.0),
    ray("table+ray-16", 16.0, "table", resumes=True),
    Strategy("round-robin", "round-robin", "work"),
    Strategy("power-of-two", "power-of-two", "work"),
    Strategy("oracle", "oracle", "oracle", downscale_delay_s=0.0),
)
MEANINGS = {
    "product": "the routing table and the scaling policy of the product; requests of lost replicas are resumed",
    "ray-2": "Ray Serve's default: power of two choices, one replica for each 2 open requests; nothing is resumed",
    "ray-8": "the same with one replica for each 8 open requests",
    "ray-16": "the same with one replica for each 16 open requests",
    "table+ray-16": "the routing table of the product with the number of replicas of ray-16",
    "round-robin": "the scaling policy of the product with round robin",
    "power-of-two": "the scaling policy of the product with power of two choices",
    "oracle": "knows the rate of the future; all replicas share one unlimited prefix cache; least work first",
}


@dataclass(frozen=True, slots=True)
class Job:
    """One simulation."""

    strategy: Strategy
    profile: Profile
    traffic: Traffic
    losses: Losses
    fleet: Fleet
    seed: int

    @property
    def name(self) -> str:
        return f"{self.strategy.name}, start {self.profile.start_s:g} s"
