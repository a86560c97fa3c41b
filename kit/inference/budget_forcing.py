"""Budget forcing: one generation that serves every shorter budget of tokens."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Forcing:
    """Budget forcing: what a sequence would have answered had it been stopped earlier.

    At each of `cuts` new tokens a sequence that is still running is continued in a copy of its
    cache by `ask` and at most `answer` tokens. A stop before the last cut is replaced by `wait`, as
    often as `waits`. Source: arXiv 2501.19393, section 3.
    """

    cuts: tuple[int, ...]  # ascending
    ask: tuple[int, ...]  # token ids
    answer: int
    wait: tuple[int, ...] = ()  # token ids
    waits: int = 0

    @property
    def more(self) -> int:
        """Tokens that an answer adds."""
        return len(self.ask) + self.answer

    def check(self, longest: int) -> None:
        """ValueError where it does not fit sequences of at most `longest` new tokens."""
        cuts = [*self.cuts]
        if cuts != sorted(set(cuts)) or cuts and not 0 < cuts[0] <= cuts[-1] <= longest:
            raise ValueError(
                f"cuts are {cuts}; give ascending numbers of new tokens, from 1 to {longest}, "
                f"which is max_new_tokens."
            )
        if cuts and not (self.ask and self.answer > 0) or self.waits and not self.wait:
            raise ValueError(
                f"ask has {len(self.ask)} tokens, answer is {self.answer}, wait has "
                f"{len(self.wait)} tokens; forcing needs some of each that it uses."
            )


NEVER = Forcing((), (), 0)
