"""Checked access to the keys of a model's config: what is wrong is a MinillmError naming the key and its value."""

from minillm.errors import MinillmError


class Keys:
    """Checked access to the keys of a config; every error names the key and its value."""

    def __init__(self, values: dict, name: str, prefix: str = ""):
        self.values, self.name, self.prefix = values, name or "config", prefix

    def get(self, key: str):
        value = self.values.get(self.prefix + key)
        if self.prefix and isinstance(value, list) and value and all(v == value[0] for v in value):
            return value[0]  # GGUF may give a size per layer; only equal ones make one model shape
        return value

    def error(self, key: str, value, what: str) -> MinillmError:
        shown = repr(value)
        shown = shown if len(shown) <= 200 else shown[:200] + "..."
        return MinillmError(f"{self.name}: {self.prefix}{key} = {shown} is not supported; {what}")

    def refuse_unless(self, supported: dict[str, tuple], absent: dict | None = None) -> None:
        for key, allowed in supported.items():
            value = self.get(key)
            value = (absent or {}).get(key) if value is None else value
            if value not in allowed:
                named = ", ".join(str(v) for v in allowed if v is not None)
                raise self.error(key, value, f"minillm runs {named}" if named else "minillm runs models without it")

    def number(self, key: str, *default, positive: bool = True) -> float:
        """A finite number; `default` stands in for an absent or null key, and without one the key is required."""
        value = self.get(key)
        if value is None and default:
            return default[0]
        if value is None:
            raise MinillmError(f"{self.name}: {self.prefix}{key} is missing; minillm needs it")
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
            raise self.error(key, value, "it must be a number")
        if positive and value <= 0:
            raise self.error(key, value, "it must be greater than 0")
        return float(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of numbers, which is required."""
        value = self.get(key)
        if not isinstance(value, list) or any(isinstance(x, bool) or not isinstance(x, int | float) for x in value):
            raise self.error(key, value, "it must be a list of numbers")
        return tuple(float(x) for x in value)

    def integer(self, key: str, *default, least: int = 1, most: int = 2**31 - 1, **null) -> int:
        """A whole number; `null` (keyword) is what an explicit null means, where that differs from an absent key."""
        value = self.get(key)
        if value is None and "null" in null and self.prefix + key in self.values:
            return null["null"]
        if value is None and default:
            return default[0]
        if value is None:
            raise MinillmError(f"{self.name}: {self.prefix}{key} is missing; minillm needs it")
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.error(key, value, f"it must be a whole number from {least} to {most}")
        return value

    def divided(self, key: str, value: int, by_key: str, by: int) -> int:
        if value % by:
            raise self.error(key, value, f"it must be a multiple of {by_key} = {by} when no head size is given")
        return value // by

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, value, "it must be true or false")
        return default if value is None else value


def scales(eps: float, embedding: float, attention: float, residual: float, logits: float) -> dict[str, float]:
    """Granite's four factors as fields of ModelConfig. With the factor r, x += r f(norm(x)) is y += f(norm(y)) for x =
    r y, where the norm of y has eps / r^2: so embeddings are divided by r, and no residual is multiplied."""
    return {
        "rms_eps": eps / residual**2,
        "embedding_scale": embedding / residual,
        "attention_scale": attention,
        "logit_scale": 1 / logits,
    }
