"""Settings: what a server was started with, beside its model."""

from dataclasses import dataclass

from minillm.sampling import SamplingParams

PARAMS = SamplingParams(temperature=0.8)  # of requests that do not say, and of a server that was not told
MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    params: SamplingParams = PARAMS  # of requests that do not say
    aliases: tuple[str, ...] = ()  # names of the model; the first is its id
    api_keys: tuple[str, ...] = ()  # one of which a request must have; none: everybody may ask
    cors_origins: tuple[str, ...] = ()  # whose pages may ask; "*": all
    parallel: int = 16  # requests that are answered at a time
    max_queue: int = 64  # that wait for a place beside them; more are refused
    timeout: float = 600.0  # seconds from a request's arrival to the end of its answer
    drain_timeout: float = 30.0  # seconds that answers on the way may still take when the server is to end
    cache_ram: int | None = None  # bytes of the snapshots of prefixes; None: half of what caches may take
    cache_disk: str | None = None  # a folder for those that have no room
    cache_disk_limit: int = 8192 * MIB  # bytes of its files
    max_body: int = 32 * MIB  # bytes of a request
    ping_interval: float = 10.0  # seconds after which a stream without news sends a comment
    slots: bool = True  # whether anybody may see what sequences there are
    metrics: bool = True
    webui: bool = True  # whether / is the page
