"""The PQ index of Diao et al., EMP's nearest relative, as a count for each group of weights.

Diao, Wang, Zhang, Yang, Ding and Tarokh, "Pruning Deep Neural Networks from a Sparsity
Perspective" (ICLR 2023, arXiv 2302.05601), measure how sparse a vector w of d weights already is by

    I(w) = 1 - d^(1/q - 1/p) · ‖w‖_p / ‖w‖_q             0 < p < q, the PQ index

and bound the number r of weights that have to stay from below by

    r ≥ d · (1 + η)^(-q/(q-p)) · (1 - I(w))^(pq/(q-p))

where η is what the others may hold of Σ|w|^p, relative to what those that stay hold. The powers of
d cancel:

    r ≥ (1 + η)^(-q/(q-p)) · (‖w‖_p / ‖w‖_q)^(pq/(q-p))

With p = 1, q = 2 and η = 0 this **is** EMP's effective number: (‖w‖_1 / ‖w‖_2)² = N_eff. With these
and γ = 1, one round of their algorithm SAP keeps what EMP keeps at β = 1, but for rounding up
instead of down. With p = 0.5 and q = 1, as in the example that comes with the paper's code, it is
(Σ√|w|)² / Σ|w|, the effective number of the *square roots* of the magnitudes: of Gaussian weights
84.7 %, where N_eff is 63.7 %.

SAP as published does more: it prunes γ times the share that may go, up to a limit, in the scope of
a neuron, a layer or the whole model, retrains, and repeats this in rounds. The control here takes
from it what can be compared without training: the counts of its groups, multiplied by one factor
for all of them (in which η cancels) so that they sum up to EMP's count. It differs from EMP only in
how many of these weights each group keeps.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from emp_kernels.rows import Workspace

from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.comparison.allocation import Floats
from emp_llm.runtime.pipeline import Advance, Piece, run_pieces
from emp_llm.tensors.geometry import RowBlock
from emp_llm.tensors.target import Target

__all__ = ["P", "Q", "power_sums", "retained_bound"]

P, Q = 0.5, 1.0
"""The exponents of the example that SAP's authors give with their code."""


def retained_bound(sums_p: Floats, sums_q: Floats, *, p: float = P, q: float = Q) -> Floats:
    """How many weights of each group the PQ index says must stay, with η = 0.

    Args:
        sums_p: Σ|w|^p of each group, float64 [G].
        sums_q: Σ|w|^q, likewise.
        p: Exponent, above 0.
        q: Exponent, above p.

    Returns:
        (‖w‖_p / ‖w‖_q)^(pq/(q-p)) of each group, float64 [G]: from 1 to the number of weights that
        are not zero, and 0 where all are.

    >>> retained_bound(np.array([5.0]), np.array([11.0]), p=1, q=2)  # N_eff of 1, 1, 3
    array([2.27272727])
    """
    live = sums_q > 0
    ratios = np.divide(sums_p**q, sums_q**p, out=np.zeros_like(sums_p), where=live)
    return np.power(ratios, 1 / (q - p), out=np.zeros_like(ratios), where=live)


def power_sums(
    targets: Sequence[Target],
    files: OpenFiles,
    *,
    threads: int,
    progress: Advance | None = None,
) -> dict[str, tuple[Floats, Floats]]:
    """Σ|w|^p and Σ|w|^q of every row, float64 [R], by the target's name; each is read once."""
    parts: dict[str, list[tuple[Floats, Floats]]] = {target.name: [] for target in targets}

    def pieces() -> Iterator[Piece]:
        for target in targets:
            file = files.file(target.shard)
            for block in target.geometry.row_blocks():
                nbytes = target.geometry.block_bytes(block)
                yield Piece(nbytes, partial(_sums, target, block, file), parts[target.name].append)

    run_pieces(pieces(), threads=threads, progress=progress, abandon=files.abandon)
    return {
        name: (np.concatenate([p for p, _ in found]), np.concatenate([q for _, q in found]))
        for name, found in parts.items()
    }


def _sums(
    target: Target, block: RowBlock, file: SourceFile, workspace: Workspace
) -> tuple[Floats, Floats]:
    weights_RC = target.read(file, block, workspace)
    magnitudes_RC = target.geometry.number_format.magnitudes(weights_RC)
    return (magnitudes_RC**P).sum(axis=1), (magnitudes_RC**Q).sum(axis=1)
