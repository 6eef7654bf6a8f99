"""What a comparison is asked for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """What every arm is asked to write."""

    prompt: str
    num_tokens: int
    """0 asks for nothing."""


@dataclass(frozen=True)
class CompareConfig:
    """What is compared."""

    arms: tuple[str, ...] = ("gpt", "gpt-qknorm", "ngpt")
    """Arms by name, such as gpt-qknorm-muon, ngpt-scalar-alpha, or ngpt:s_z_init=1 to change a field."""
    seeds: int = 1
    """How many seeds to train each arm with; seeds count up from --seed."""
    arm_lr: tuple[str, ...] = ()
    """Learning rates by arm, as ARM=LR; --lr sets that of all arms."""
    sweep_lr: bool = False
    """Tune each arm's learning rate first, on a grid that is extended until the optimum lies inside it."""
    timing_rounds: int = 20
    """Steps of each arm, by turns, from which the step times are taken."""
    prompt: str | None = None
    """What the samples continue; "def " if not given."""
    sample_tokens: int = 400
    """Length of each arm's sample."""

    def __post_init__(self) -> None:
        if not self.arms:
            raise ValueError("no arms given; give some, such as --arms gpt ngpt")
        if len(set(self.arms)) < len(self.arms):
            raise ValueError(f"an arm is given twice in {' '.join(self.arms)}; give each once")
        for name, least in (("seeds", 1), ("timing_rounds", 1), ("sample_tokens", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def sample(self) -> Sample:
        """What each arm is asked to write."""
        return Sample("def " if self.prompt is None else self.prompt, self.sample_tokens)

    def learning_rates(self) -> dict[str, float]:
        """`arm_lr`, parsed. Raises ValueError for what is not ARM=LR of a given arm."""
        rates: dict[str, float] = {}
        for item in self.arm_lr:
            arm, _, text = item.rpartition("=")
            if arm not in self.arms:
                raise ValueError(f"--arm-lr {item}: {arm or item!r} is not among the arms {', '.join(self.arms)}")
            if arm in rates:
                raise ValueError(f"--arm-lr gives {arm} two learning rates; give one")
            try:
                rates[arm] = float(text)
            except ValueError:
                raise ValueError(f"--arm-lr {item}: {text!r} is not a number") from None
        return rates
