"""Budget forcing: one generation that serves every shorter token budget."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BudgetForcing:
    """Asks a sequence for its answer at several budgets of new tokens.

    When a running sequence reaches one of `budgets`, it is continued by `answer_prompt` and at most
    `max_answer_tokens` more tokens, which are then taken back. A stop before the last budget is
    replaced by `wait_tokens`, at most `max_waits` times. A model that thinks ends its thoughts by
    `end_of_thinking`, which is replaced as a stop is; as long as they are open, `closing_prompt`
    asks for the answer. Source: s1, section 3.1, https://arxiv.org/abs/2501.19393.
    """

    budgets: tuple[int, ...]  # new tokens, ascending
    answer_prompt: tuple[int, ...]  # token ids
    max_answer_tokens: int
    wait_tokens: tuple[int, ...] = ()  # token ids
    max_waits: int = 0
    end_of_thinking: int | None = None  # token id; None for a model that does not think
    closing_prompt: tuple[int, ...] = ()  # token ids; ends thoughts and asks for the answer

    @property
    def extra_tokens(self) -> int:
        """Tokens that an answer adds at most, its prompt included."""
        return max(len(self.answer_prompt), len(self.closing_prompt)) + self.max_answer_tokens

    @property
    def key(self) -> dict:
        """For record keys, under the names that stored keys were made of."""
        key = {
            "cuts": self.budgets,
            "ask": self.answer_prompt,
            "answer": self.max_answer_tokens,
            "wait": self.wait_tokens,
            "waits": self.max_waits,
        }
        if self.end_of_thinking is not None:
            key |= {"end_of_thinking": self.end_of_thinking, "closing": self.closing_prompt}
        return key

    def prompt(self, new_ids: Sequence[int]) -> tuple[int, ...]:
        """The token ids that ask for an answer after `new_ids`."""
        thinks = self.end_of_thinking is not None and self.end_of_thinking not in new_ids
        return self.closing_prompt if thinks else self.answer_prompt

    def check(self, max_new_tokens: int) -> None:
        """Raise ValueError if it does not fit sequences of at most `max_new_tokens`."""
        budgets = [*self.budgets]
        ascending = budgets == sorted(set(budgets))
        if not ascending or budgets and not 0 < budgets[0] <= budgets[-1] <= max_new_tokens:
            raise ValueError(
                f"budgets are {budgets}; give ascending numbers of new tokens, from 1 to "
                f"{max_new_tokens}, which is max_new_tokens."
            )
        if budgets and not (self.answer_prompt and self.max_answer_tokens > 0):
            raise ValueError(
                f"answer_prompt has {len(self.answer_prompt)} tokens and max_answer_tokens is "
                f"{self.max_answer_tokens}; give at least one of each."
            )
        if budgets and self.end_of_thinking is not None and not self.closing_prompt:
            raise ValueError(
                f"end_of_thinking is {self.end_of_thinking} and closing_prompt is empty; give "
                f"tokens that end thoughts and ask for the answer."
            )
        if self.max_waits and not self.wait_tokens:
            raise ValueError(
                f"max_waits is {self.max_waits} and wait_tokens is empty; give tokens to wait by."
            )


NO_FORCING = BudgetForcing((), (), 0)
