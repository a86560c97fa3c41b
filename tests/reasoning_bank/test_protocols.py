"""Protocols: what they promise of prompts and banks, and the published grader with its faults."""

import pytest

from kit.data.prompts import FORMAT_INSTRUCTION
from kit.evaluation import grader
from kit.reasoning_bank import build, protocols
from kit.reasoning_bank.bank import ReasoningBank
from kit.reasoning_bank.strategy import Strategy
from kit.schema import Problem
from tests.reasoning_bank.hash_embedder import HashEmbedder

ASKED = Problem("p", "What is 2 + 2?", "4", "f", 1, "s")


def test_both_arms_of_reasoning_bank_slm_have_its_instruction_and_think():
    protocol = protocols.load("reasoning-bank-slm")
    bare, hinted = (build.solve_prompt(ASKED, "a", text, place="system") for text in ("", "Add."))
    for prompt in build.with_instruction([bare, hinted], **protocol.wording):
        system = prompt.messages[0][1]
        assert system.startswith(protocol.instruction) and FORMAT_INSTRUCTION not in system
        assert "REASONING:" in system and "ANSWER:" in system and prompt.thinking
    assert system.endswith("\n\nAdd.") and prompt.id != hinted.id
    assert build.with_instruction([hinted], **protocols.load("kit").wording) == [hinted]
    graded = grader.grade("REASONING: two twos\nANSWER: 4", "4", form="answer line")
    assert graded.correct and graded.compliant, "the form it asks for is the one that is checked"


def test_a_protocol_says_how_a_bank_is_built():
    for name in protocols.PROTOCOLS:
        protocol = protocols.load(name)
        made = protocol.bank("gold", 64, "system")
        assert made.solve_tokens == 64 and made.instruction == protocol.instruction
        assert made.extract_tokens == protocol.extract_tokens and made.seed == 0
    assert protocols.load("kit").bank("gold", 128, "system") == build.BankBuildConfig()
    paper = protocols.load("reasoningbank")
    assert (paper.retrieval, paper.group, paper.widths) == (
        {"k": 1, "key": "question"}, 1, (1, 2, 3, 4, 5),
    )  # fmt: skip
    with pytest.raises(ValueError, match="No protocol 'paper'; there are kit, reasoning-bank-slm"):
        protocols.load("paper")


def test_a_bank_may_embed_title_and_description_only(tmp_path):
    one = Strategy("T", "When.", "Content.", "success", "q", "f", 1, "q?", "m", "x")
    bank = ReasoningBank(tmp_path, HashEmbedder(), embedded="summary")
    bank.add([one])
    assert [*bank.table()["text"]] == ["T. When."] and bank.strategies() == [one]
    bank.tag("now")
    assert len(bank.checkout("now")) == 1
    with pytest.raises(ValueError, match="has the summary of its strategies embedded; open it so"):
        ReasoningBank(tmp_path, HashEmbedder())


@pytest.mark.parametrize("text, gold, verdict", [
    ("REASONING: 6 * 7\nANSWER: 42", "42", True),
    ("REASONING: 6 * 7\nANSWER: 41", "42", False),
    ("The answer is 7", "7", True),  # without its labels the last number counts
    ("REASONING: r\nANSWER: 3/4", "0.75", True),
    ("REASONING: r\nANSWER: x+1", "x+1", True),
    ("REASONING: r\nANSWER: 41", "x^2-10x+41", True),  # wrong: the gold's last number
    ("REASONING: r\nANSWER: 14", r"\sqrt{14}", True),  # wrong: the gold ends at its first brace
    ("REASONING: r\nANSWER: 5/2", r"\frac{5}{2}", False),  # wrong: of that gold 5 is left
    ("REASONING: r\nANSWER: \\boxed{5}", "5", True),
    ("REASONING: r\nANSWER: 1/2/3", "3", True),
    ("REASONING: r\nANSWER: 2510", "3120", True),  # wrong: a number's digits from the fourth on
    ("", "3", False),
])  # fmt: skip
def test_the_published_grader_is_as_published(text, gold, verdict):
    assert protocols.published_grade(text, gold) is verdict
