"""Bugs to plant: each a line of the library that is wrong, and the tests that must see it.

Some rows say where none is planted because it would change no result: the tests of what is remembered, of speed and of
memory are for these.
"""

from tests.helpers.mutants.attention import ATTENTION
from tests.helpers.mutants.diagonals import DIAGONALS
from tests.helpers.mutants.gpu import GPU
from tests.helpers.mutants.masks import MASKS
from tests.helpers.mutants.packing import PACKING
from tests.helpers.mutants.packing_plans import PACKING_PLANS
from tests.helpers.mutants.plans import PLANS
from tests.helpers.mutants.record import Mutant as Mutant
from tests.helpers.mutants.scores import SCORES
from tests.helpers.mutants.split import SPLIT
from tests.helpers.mutants.turns import TURNS

MUTANTS: tuple[Mutant, ...] = (
    *MASKS, *PACKING, *PACKING_PLANS, *PLANS, *ATTENTION, *SCORES, *SPLIT, *TURNS, *DIAGONALS, *GPU,
)  # fmt: skip
