"""Class means: one round of feature sums by label, and nearest class means from them. A baseline.

FedNCM (Legate et al., NeurIPS 2023, arXiv 2303.06972); FedCOF sends the same sums (Dipam Goswami et al., NeurIPS 2025,
arXiv 2412.14326). Empirical Bayes shrinks the means by the noise on the sums (`shared/class_totals.py`).
"""

from ficpd.methods.analytic import Analytic, Config
from ficpd.optimizers import LocalTrainingConfig


def build(config: Config, training: LocalTrainingConfig) -> "ClassMeans":
    return ClassMeans(training)


class ClassMeans(Analytic):
    name = "class_means"
    gram = False
