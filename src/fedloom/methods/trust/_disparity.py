"""Disparities in bits, where they come from, and what they cost in accuracy: of tables of counts, in float64."""

from functools import lru_cache

import numpy as np

ROUNDS = 3000  # of the decomposition, each a projection; it ends once a round gains less than CLOSE
FITS = 2000  # rescalings of rows and columns in a projection
CLOSE = 1e-12
CUTS = 400  # linear programs, at most, up to a limit that is known to GAP
GAP = 1e-5


def entropy(p):
    """H of probabilities of any shape, in bits; 0 log 0 = 0."""
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())


def information(p):
    """I(A; B) of P(a, b) [A, B]."""
    return max(0.0, entropy(p.sum(1)) + entropy(p.sum(0)) - entropy(p))


def within(p):
    """I(A; B | S) of P(s, a, b) [S, A, B]."""
    shares = p.sum((1, 2))
    return float(sum(share * information(part / share) for share, part in zip(shares, p, strict=True) if share > 0))


def decomposed(p):
    """The disparities of P(s, z, yh) [S, Z, Y] by name: global and local, and their unique, redundant, masked parts."""
    everywhere, inside = information(p.sum(0)), within(p)
    unique = min(unique_information(p), everywhere, inside)
    return {
        "global_disparity": everywhere,
        "local_disparity": inside,
        "unique_disparity": unique,
        "redundant_disparity": everywhere - unique,
        "masked_disparity": inside - unique,
    }


def unique_information(p):
    """min of I_Q(Z; Yh | S) over Q(s, z, yh) with the Q(z, yh) and Q(z, s) of P: Bertschinger et al. 2014.

    Q(., . | z) becomes the projection of Q(yh, s) on the marginals of z. That is mirror descent with the entropy as
    distance, to which the objective is 1-smooth, so that every round lessens it.
    """
    of_groups, of_sites = p.sum(0), p.sum(2).T  # [Z, Y] and [Z, S]
    whole = of_groups.sum(1)
    held = whole > 0
    of_groups, of_sites, whole = of_groups[held], of_sites[held], whole[held]
    q = of_groups[:, :, None] * of_sites[:, None, :] / whole[:, None, None]
    value = within(q.transpose(2, 0, 1))
    for _ in range(ROUNDS):
        q = projected(np.broadcast_to(q.sum(0), q.shape), of_groups, of_sites)
        before, value = value, within(q.transpose(2, 0, 1))
        if before - value < CLOSE:
            break
    return value


def projected(q, rows, columns):
    """The Q [Z, Y, S] nearest to q in information whose sums are `rows` [Z, Y] and `columns` [Z, S]."""
    for _ in range(FITS):
        q = q * ratio(rows, q.sum(2))[:, :, None]
        sums = q.sum(1)
        q = q * ratio(columns, sums)[:, None, :]
        if np.abs(sums - columns).max() < CLOSE:
            break
    return q


def ratio(a, b):
    """a / b, and 0 where b is."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def parity_gap(p):
    """The largest difference of P(yh | z) between two groups, of P(z, yh) [Z, Y]."""
    there = p[p.sum(1) > 0]
    shares = there / there.sum(1, keepdims=True)
    return float((shares.max(0) - shares.min(0)).max(initial=0.0)) if len(there) else 0.0


def least_error(p, eps_global, eps_local):
    """AGLFOP: the least P(yh != y) of any predictor that may look at s, z and y, of P(s, z, y) [S, Z, Y], to 1e-5.

    Under I(Z; Yh) <= eps_global and I(Z; Yh | S) <= eps_local, in bits. Both depend on q(s, z, yh) alone, for which the
    least error is the mass that must move, sum (q - p)+; so the program is over q, with as many variables as p. It is
    solved by linear programs with supporting planes at the boundary (Veinott 1967); bounds of 0 are linear themselves.
    """
    return _least_error(np.ascontiguousarray(p).tobytes(), p.shape, float(eps_global), float(eps_local))


@lru_cache(maxsize=1024)
def _least_error(data, shape, eps_global, eps_local):
    from scipy.optimize import linprog

    p = np.frombuffer(data).reshape(shape)
    n, cells = p.size, p.shape[0] * p.shape[1]
    block = np.kron(np.eye(cells), np.ones(shape[2]))  # the sums over yh
    equal, wanted = [block], [p.sum(2).ravel()]
    for eps, planes in ((eps_global, alike_everywhere), (eps_local, alike_inside)):
        if eps == 0:
            equal.append(planes(p))
            wanted.append(np.zeros(len(equal[-1])))
    a_eq, b_eq = np.hstack([np.vstack(equal), np.zeros((len(np.vstack(equal)), n))]), np.concatenate(wanted)
    above, most = [np.hstack([np.eye(n), -np.eye(n)])], [p.ravel()]  # q - u <= p
    cost = np.concatenate([np.zeros(n), np.ones(n)])
    fair = p.sum(2)[:, :, None] * p.sum((0, 1))  # yh independent of s and z
    best = float(np.clip(fair - p, 0, None).sum())
    bounds = [one for one in ((eps_global, slope_everywhere), (eps_local, slope_inside)) if one[0] > 0]
    for _ in range(CUTS):
        found = linprog(cost, np.vstack(above), np.concatenate(most), a_eq, b_eq, bounds=(0, None), method="highs")
        q = found.x[:n].reshape(shape)
        share = farthest(fair, q, bounds)
        here = fair + share * (q - fair)
        best = min(best, float(np.clip(here - p, 0, None).sum()))
        if share == 1 or best - found.fun < GAP:
            break
        for eps, slope in bounds:
            plane = slope(here)
            if (plane * here).sum() > eps * (1 - 1e-6) - 1e-12:
                above.append(np.concatenate([plane.ravel(), np.zeros(n)])[None])
                most.append(np.array([eps]))
    return best


def farthest(fair, q, bounds):
    """How far one can go from `fair` to q within the bounds, in 0 to 1."""

    def inside(share):
        here = fair + share * (q - fair)
        return all((slope(here) * here).sum() <= eps for eps, slope in bounds)

    if inside(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) else (low, middle)
    return low


def slope_everywhere(q):
    """The gradient of I(Z; Yh) by q [S, Z, Y]; its product with q is I(Z; Yh) itself."""
    joint = q.sum(0)
    odds = ratio(joint, joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True))
    return np.broadcast_to(np.log2(odds, out=np.zeros_like(odds), where=odds > 0), q.shape)


def slope_inside(q):
    """The gradient of I(Z; Yh | S) by q [S, Z, Y]; its product with q is I(Z; Yh | S) itself."""
    odds = ratio(q * q.sum((1, 2), keepdims=True), q.sum(2, keepdims=True) * q.sum(1, keepdims=True))
    return np.log2(odds, out=np.zeros_like(odds), where=odds > 0)


def alike_everywhere(p):
    """Rows whose product with q [S, Z, Y] is P(yh | z) less P(yh | z'), for one z' of all."""
    of_groups = p.sum((0, 2))
    held = np.flatnonzero(of_groups > 0)
    planes = []
    for z in held[1:]:
        for y in range(p.shape[2]):
            row = np.zeros(p.shape)
            row[:, z, y], row[:, held[0], y] = 1 / of_groups[z], -1 / of_groups[held[0]]
            planes.append(row.ravel())
    return np.array(planes).reshape(-1, p.size)


def alike_inside(p):
    """Rows whose product with q [S, Z, Y] is P(yh | s, z) less P(yh | s, z'), for one z' of each s."""
    planes = []
    for s, share in enumerate(p.sum(2)):
        held = np.flatnonzero(share > 0)
        for z in held[1:]:
            for y in range(p.shape[2]):
                row = np.zeros(p.shape)
                row[s, z, y], row[s, held[0], y] = 1 / share[z], -1 / share[held[0]]
                planes.append(row.ravel())
    return np.array(planes).reshape(-1, p.size)
