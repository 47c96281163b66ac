"""All situations, in the order of the table."""

from __future__ import annotations

from tests.matrix.data import DATA
from tests.matrix.ends import ENDS
from tests.matrix.optimizing import OPTIMIZING
from tests.matrix.processes import PROCESSES

SITUATIONS = [*OPTIMIZING, *ENDS, *DATA, *PROCESSES]
