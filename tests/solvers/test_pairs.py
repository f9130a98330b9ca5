"""Every pair of solvers is defined in words, and the words are in the spec."""

from itertools import product

from llmc.compiler.solvers import GRID_SOLVERS, MASK_SOLVERS, PAIRS


def test_every_pair_has_a_meaning():
    assert set(PAIRS) == set(product((None, *GRID_SOLVERS), (None, *MASK_SOLVERS)))
    assert len(set(PAIRS.values())) == len(PAIRS)
