"""A program tuned on its own cost, through SciPy: steps everywhere, a gradient nowhere.

A checklist gives a weight for every measurement above its limit and refers the patient if the sum
exceeds a last limit; a missed tumour costs 5, a needless referral 1.
"""

import numpy as np
from scipy.optimize import minimize
from sklearn.datasets import load_breast_cancer

from zo_adapt import scipy_method

measured, benign = load_breast_cancer(return_X_y=True)
order = np.random.default_rng(0).permutation(len(benign))
measured, ill = measured[order], benign[order] == 0
tuned_on, held_out = slice(0, 300), slice(300, None)
measured = (measured - measured[tuned_on].mean(0)) / measured[tuned_on].std(0)


def cost(rule: np.ndarray, patients: slice = tuned_on) -> float:
    """Per patient, of a rule: 30 limits, 30 weights and the limit of their sum."""
    limits, weights, total = rule[:30], rule[30:60], rule[60]
    referred = (measured[patients] > limits) @ weights > 30 * total
    missed, needless = ill[patients] & ~referred, ~ill[patients] & referred
    return float(5 * missed.mean() + needless.mean())


start = np.concatenate([np.zeros(30), np.ones(30), [0.5]])
found = minimize(
    cost,
    start,
    # How far the answer may lie from the start; ranks, because the cost counts.
    method=scipy_method(displacement=1.0, shaping="ranks", maxfev=20_000),
)
print(f"held-out cost before: {cost(start, held_out):.3f}")
print(f"held-out cost after: {cost(found.x, held_out):.3f} ({found.nfev} calls)")
