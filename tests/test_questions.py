"""docs/questions.md: its output is what comes out, and each question has something to run."""

import doctest
import re

import pytest
import torch
from conftest import ROOT

PAGE = ROOT / "docs/questions.md"


@pytest.fixture
def torch_as_before():
    """Undo what the page sets for all of torch."""
    yield
    torch.set_grad_enabled(True)
    torch.set_printoptions(profile="default")


def test_the_output_is_what_comes_out(torch_as_before):
    failed, tried = doctest.testfile(
        str(PAGE), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert tried > 30 and failed == 0


def test_each_question_has_something_to_run():
    questions = re.split(r"^### ", PAGE.read_text(), flags=re.M)[1:]
    assert len(questions) >= 12
    for question in questions:
        assert re.search(r"^    (>>>|python) ", question, re.M), question.splitlines()[0]
