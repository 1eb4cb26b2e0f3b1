"""SMILES: molecules as lines of text (Weininger 1988). Their symbols as numbers, and other ways to write the same one.

A molecule has many SMILES, one for each order in which a walk can visit its atoms. Training on another one each time
teaches a network the molecule instead of the habits of who wrote it (Bjerrum 2017, arXiv 1703.07076).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from configs.errors import UsageError

# Id 0 is padding. Of what has two letters only Cl and Br may stand outside of brackets; within them each letter is one.
SYMBOLS = ("", "Cl", "Br", *"ABCDEFGHIKLMNOPRSTUVWXYZabcdefghiklmnoprstuvyz0123456789()[]-=#$:/\\.+%@*~")
VOCAB_SIZE = len(SYMBOLS)

MOST_ATOMS = 400  # that a walk in Python can go down

_IDS = {symbol: number for number, symbol in enumerate(SYMBOLS) if symbol}
_SYMBOL = re.compile("|".join(map(re.escape, sorted(_IDS, key=len, reverse=True))))
_PART = re.compile(r"(?P<atom>Cl|Br|[BCNOPSFIbcnops]|\[[^\]@]*\])|(?P<bond>[-=#$:])|(?P<ring>\d)|[()]")


def encode(smiles: str) -> np.ndarray:
    """The id of each symbol, (L,) uint8. Raises UsageError for what is no SMILES."""
    symbols = _SYMBOL.findall(smiles)
    if sum(map(len, symbols)) != len(smiles):
        wrong = _SYMBOL.sub("", smiles)[:10]
        raise UsageError(f"{smiles!r} is no SMILES: it holds {wrong!r}. Correct it, or take the row out of the data.")
    return np.array([_IDS[symbol] for symbol in symbols], np.uint8)


class Molecule(NamedTuple):
    """atoms, as they are written; neighbours: of each atom, by number, with the bond's symbol ("" is left unsaid)."""

    atoms: list[str]
    neighbours: list[dict[int, str]]


def parse(smiles: str) -> Molecule | None:
    """The molecule, None where this reader does not know enough: stereochemistry, several molecules, ten rings open."""
    molecule = Molecule([], [])
    branches: list[int] = []
    rings: dict[str, tuple[int, str]] = {}
    at, bond, end = -1, "", 0
    for part in _PART.finditer(smiles):
        if part.start() != end:
            return None
        end, text = part.end(), part[0]
        if part["atom"]:
            molecule.atoms.append(text)
            molecule.neighbours.append({})
            if at >= 0:
                _join(molecule, at, len(molecule.atoms) - 1, bond)
            at, bond = len(molecule.atoms) - 1, ""
        elif part["bond"]:
            bond = text
        elif at < 0:
            return None
        elif text in rings:
            other, first_bond = rings.pop(text)
            if other == at or other in molecule.neighbours[at]:
                return None
            _join(molecule, other, at, bond or first_bond)
            bond = ""
        elif part["ring"]:
            rings[text], bond = (at, bond), ""
        elif text == "(":
            branches.append(at)
        elif branches:
            at = branches.pop()
        else:
            return None
    return None if end != len(smiles) or rings or branches or not molecule.atoms else molecule


def _join(molecule: Molecule, one: int, other: int, bond: str) -> None:
    molecule.neighbours[one][other] = molecule.neighbours[other][one] = bond


def write(molecule: Molecule, order: Sequence[float]) -> str | None:
    """The SMILES of a walk that begins at the atom of the least `order`, and at each takes the least neighbour first.

    None where it would take more than nine open rings.
    """
    children: list[list[int]] = [[] for _ in molecule.atoms]
    closed: list[list[int]] = [[] for _ in molecule.atoms]  # atoms to which a ring is closed, and from which opened
    seen: dict[int, int] = {}

    def walk(atom: int, parent: int) -> None:
        seen[atom] = len(seen)
        for other in sorted(molecule.neighbours[atom], key=order.__getitem__):
            if other not in seen:
                children[atom].append(other)
                walk(other, atom)
            elif other != parent and seen[other] < seen[atom]:
                closed[atom].append(other)
                closed[other].append(atom)

    start = min(range(len(molecule.atoms)), key=order.__getitem__)
    walk(start, -1)
    digits: dict[tuple[int, int], str] = {}
    free = list("987654321")

    def text(atom: int) -> str:
        written = molecule.atoms[atom]
        freed: list[str] = []
        for other in closed[atom]:
            if seen[other] < seen[atom]:
                digit = digits.pop((other, atom))
                freed.append(digit)
                written += molecule.neighbours[atom][other] + digit
            else:
                digits[atom, other] = free.pop()
                written += digits[atom, other]
        free.extend(freed)
        free.sort(reverse=True)  # the least is used next
        branches = [molecule.neighbours[atom][child] + text(child) for child in children[atom]]
        return written + "".join(f"({branch})" for branch in branches[:-1]) + "".join(branches[-1:])

    try:
        return text(start)
    except IndexError:
        return None


def rewritten(smiles: str, rng: np.random.Generator) -> str:
    """The same molecule written in another order; as it was, where `parse` or `write` cannot."""
    molecule = parse(smiles)
    if molecule is None or len(molecule.atoms) > MOST_ATOMS:
        return smiles
    return write(molecule, rng.random(len(molecule.atoms)).tolist()) or smiles
