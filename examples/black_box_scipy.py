"""A checklist tuned on its own cost, with scipy: steps everywhere, a gradient nowhere.

A nurse can apply the rule without a computer: one point for every measurement above its limit,
times the weight of that measurement; refer the patient if the points exceed the last limit.
What it costs are counts: 5 for a tumour that is missed, 1 for a needless referral. So every
derivative is zero or does not exist, and methods that measure slopes stop where they start.

    python examples/black_box_scipy.py     # seconds; scikit-learn brings the data

Data: Breast Cancer Wisconsin (Diagnostic), 569 patients, 30 measurements (Street et al. 1993).
"""

import argparse
import time

import numpy as np
from scipy.optimize import minimize
from sklearn.datasets import load_breast_cancer

from zo_adapt import scipy_method

MISSED, NEEDLESS = 5.0, 1.0


class Checklist:
    """The rule's cost per patient on some patients.

    Args:
        measured: Standardised measurements.
        ill: Who has a malignant tumour.
    """

    def __init__(self, measured: np.ndarray, ill: np.ndarray) -> None:
        self.measured, self.ill = measured, ill

    def refers(self, rule: np.ndarray) -> np.ndarray:
        """Whom a rule (limits, weights, limit of the sum) refers."""
        features = self.measured.shape[1]
        limits, weights, total = rule[:features], rule[features:-1], rule[-1]
        points = (self.measured > limits) @ weights
        referred: np.ndarray = points > total * features
        return referred

    def __call__(self, rule: np.ndarray) -> float:
        """Cost per patient."""
        referred = self.refers(rule)
        missed, needless = self.ill & ~referred, ~self.ill & referred
        return float(MISSED * missed.mean() + NEEDLESS * needless.mean())

    def report(self, rule: np.ndarray) -> str:
        """The cost, and what it is made of."""
        referred = self.refers(rule)
        return (
            f"cost {self(rule):.3f} per patient ({int((self.ill & ~referred).sum())} missed and "
            f"{int((~self.ill & referred).sum())} needless of {len(self.ill)})"
        )


def halves(seed: int) -> tuple[Checklist, Checklist]:
    """Patients to tune on and patients held out, standardised by the former."""
    data = load_breast_cancer()
    order = np.random.default_rng(seed).permutation(len(data.target))
    train, test = np.array_split(order, 2)
    centre, spread = data.data[train].mean(0), data.data[train].std(0)
    measured, ill = (data.data - centre) / spread, data.target == 0
    return Checklist(measured[train], ill[train]), Checklist(measured[test], ill[test])


def main() -> None:
    """Tune, and report what it brought to patients that were not tuned on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--maxfev", type=int, default=20_000, help="evaluations of the rule")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    cost, held_out = halves(args.seed)
    features = cost.measured.shape[1]
    start = np.concatenate([np.zeros(features), np.ones(features), [0.5]])
    print(f"before    held out: {held_out.report(start)}")
    methods = {
        "BFGS": "BFGS",
        "Nelder-Mead": "Nelder-Mead",
        "mezo": scipy_method(displacement=1.0, shaping="ranks"),
    }
    for name, method in methods.items():
        options = {} if name == "BFGS" else {"maxfev": args.maxfev}
        if name == "mezo":
            options["seed"] = args.seed
        began = time.perf_counter()
        result = minimize(cost, start, method=method, options=options)
        print(
            f"{name:<11} cost {cost(start):.3f} -> {result.fun:.3f} in {result.nfev} evaluations, "
            f"{time.perf_counter() - began:.1f} s\n"
            f"          held out: {held_out.report(result.x)}"
        )


if __name__ == "__main__":
    main()
