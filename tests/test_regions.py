"""The arithmetic around the transformer: one compiled region each for transition, surrogate and
diagnostics, with the numbers of the functions themselves."""

from functools import partial

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from benchmarks import kernels
from common import sde
from common.trainer import compiling

ROWS = 2


@pytest.fixture
def graphs(monkeypatch):
    """Inside, regions run as torch's compiler found them, without C++; the graphs that it found."""
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    monkeypatch.setattr(compiling.torch, "compile", partial(torch.compile, backend=backend))
    yield found
    torch._dynamo.reset()


def regions(schedule="dance"):
    parts = kernels.parts_of(kernels.Args(sde=schedule, rows=ROWS))
    return [part for part in parts if part.region]


@pytest.mark.parametrize("schedule", sde.TRANSITIONS)
def test_each_function_is_one_graph_with_the_same_numbers_and_gradients(schedule, graphs):
    for part in regions(schedule):
        expected, gradient = kernels.computed(part.function, part)
        graphs.clear()
        found, own_gradient = kernels.computed(compiling.region(part.function, ROWS), part)
        assert len(graphs) == 1, part.name
        pairs = zip(kernels.tensors(found), kernels.tensors(expected), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), part.name
        assert gradient is None or torch.equal(gradient, own_gradient)


def test_rows_of_another_number_and_a_plain_measurement_are_not_compiled(graphs):
    part = regions()[1]
    function = compiling.region(part.function, ROWS + 1)
    assert torch.equal(kernels.computed(function, part)[0], part.function(*part.inputs))
    with compiling.off():
        kernels.computed(compiling.region(part.function, ROWS), part)
    assert not graphs


def test_later_updates_share_one_graph_of_the_diagnostics(graphs):
    part = regions()[2]
    function = compiling.region(part.function, ROWS)
    for update in range(5):
        found = function(*part.inputs[:-1], update)
        expected = part.function(*part.inputs[:-1], update)
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert len(graphs) == 2, "the first update, and all others"


@pytest.mark.slow
def test_compiled_whole_a_sample_has_the_log_probability_that_its_score_has():
    """So the ratio is exactly 1. From the functions themselves it is rounding away."""
    torch._dynamo.reset()
    part = regions()[0]
    velocity, x, *at = part.inputs
    function = compiling.region(part.function, ROWS)
    with torch.no_grad():
        x_next, sampled, mean = function(velocity, x, *at, noise=part.settings["x_next"])
        plain, log_prob, _ = part.function(velocity, x, *at, noise=part.settings["x_next"])
    _, scored, mean_again = function(velocity, x, *at, x_next=x_next)
    assert torch.equal(sampled, scored.detach()) and torch.equal(mean, mean_again.detach())
    assert torch.allclose(x_next, plain, rtol=0, atol=2e-6)
    assert torch.allclose(sampled, log_prob, rtol=2e-6, atol=0)


@pytest.mark.slow
def test_a_pass_has_less_than_a_third_of_the_kernels():
    torch._dynamo.reset()
    before = after = 0
    with torch._inductor.config.patch(force_disable_caches=True):
        for part in kernels.parts_of(kernels.Args(rows=ROWS)):
            own = kernels.counted(part)
            before += own
            after += kernels.compiled(part, ROWS) if part.region else own
    assert 0 < 3 * after < before
