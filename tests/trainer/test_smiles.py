"""Ways to write a molecule: another line, the same molecule."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from configs.errors import UsageError
from trainer.parts.smiles import SYMBOLS, VOCAB_SIZE, Molecule, encode, parse, rewritten, write

MOLECULES = [
    "C",
    "CC(=O)Oc1ccccc1C(=O)O",  # aspirin
    "CN1C=NC2=C1C(=O)N(C(=O)N2C)C",  # caffeine: a ring closed at the atom where another opens
    "C1CC2CC1CC2",  # bridged
    "c1ccc2c(c1)ccc1ccccc12",
    "Clc1ccc(Br)c(C#N)c1[N+](=O)[O-]",
    "C=1CCCCC=1",  # the bond of a ring, said at both ends
]


def same(one: Molecule, other: Molecule) -> bool:
    """Whether some renumbering of atoms makes them equal, by trying: neighbours are matched one atom at a time."""

    def extend(mapping: dict[int, int]) -> bool:
        if len(mapping) == len(one.atoms):
            return True
        atom = len(mapping)
        for match in set(range(len(other.atoms))) - set(mapping.values()):
            agrees = one.atoms[atom] == other.atoms[match] and all(
                one.neighbours[atom].get(known) == other.neighbours[match].get(there)
                for known, there in mapping.items()
            )
            if agrees and extend({**mapping, atom: match}):
                return True
        return False

    return Counter(one.atoms) == Counter(other.atoms) and extend({})


@pytest.mark.parametrize("smiles", MOLECULES)
def test_written_in_another_order_it_is_the_same_molecule(smiles: str) -> None:
    molecule = parse(smiles)
    assert molecule is not None
    rng = np.random.default_rng(0)
    found = {rewritten(smiles, rng) for _ in range(30)}
    assert len(found) > 5 or len(smiles) < 3
    for other in found:
        read = parse(other)
        assert read is not None and same(molecule, read), other


def test_every_order_of_a_small_molecule_can_come() -> None:
    molecule = parse("CCO")
    assert molecule is not None
    found = {write(molecule, order) for order in itertools.permutations(range(3))}
    assert found == {"CCO", "OCC", "C(C)O", "C(O)C"}


def test_what_two_molecules_differ_in_is_seen() -> None:
    first, bond, ring = (parse(smiles) for smiles in ("CC1CCC1", "CC1=CCC1", "C1CCCC1"))
    assert first and bond and ring
    assert not same(first, bond) and not same(first, ring)


@pytest.mark.parametrize(
    "smiles", ["C[C@H](N)O", "F/C=C/F", "CC.O", "C1CC", "C(C", "C)C", "(C)C", "n(H)c", "C%10CC%10", ""]
)
def test_what_it_cannot_read_is_left_as_it_was(smiles: str) -> None:
    assert parse(smiles) is None
    assert rewritten(smiles, np.random.default_rng(0)) == smiles


def test_more_than_nine_open_rings_are_left_as_they_were() -> None:
    complete = Molecule(["C"] * 9, [{other: "" for other in range(9) if other != atom} for atom in range(9)])
    assert write(complete, range(9)) is None  # 7 rings open at its first atom, 6 more at its second
    chain = "C" * 3000  # deeper than Python's stack
    assert rewritten(chain, np.random.default_rng(0)) == chain


def test_each_symbol_has_a_number_of_its_own() -> None:
    assert len(set(SYMBOLS)) == VOCAB_SIZE <= 256
    numbers = encode("ClCBr[nH]")
    assert [SYMBOLS[number] for number in numbers] == ["Cl", "C", "Br", "[", "n", "H", "]"]
    for wrong in ("C C", "CCé"):
        with pytest.raises(UsageError, match="is no SMILES"):
            encode(wrong)
