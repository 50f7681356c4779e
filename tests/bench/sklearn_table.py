"""How long joblib's calls and estimators of scikit-learn take with the backend 'dispy' on the
program's own node, beside joblib's own backend in the same run, and whether both give the same.

    python tests/bench/sklearn_table.py [--rounds N] [--n-jobs N] [--only WORD]

Each row is measured with both backends by turns. `first` is the first call of a fresh program,
which starts processes and imports in them what the calls need; the other columns are medians of the
calls after it.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)
BACKENDS = {'loky': {}, 'dispy': {'nodes': 'local'}}


def total(array):
    """Of a large array."""
    return float(array.sum())


def joblib_rows(n_jobs):
    """Name -> a call that returns something to compare."""
    import numpy
    from joblib import Parallel, delayed
    large = numpy.arange(6_000_000, dtype='f8')   # 48 MB
    return {
        '5 trivial calls': lambda: Parallel(n_jobs)(delayed(math.sqrt)(n) for n in range(5)),
        '20,000 tiny calls': lambda: Parallel(n_jobs)(delayed(math.sqrt)(n) for n in range(20000)),
        '48 MB in 20 calls': lambda: Parallel(n_jobs)(delayed(total)(large) for _ in range(20))}


def sklearn_rows(n_jobs):
    """The same of scikit-learn."""
    from sklearn.datasets import make_classification
    from sklearn.ensemble import BaggingClassifier, RandomForestClassifier, StackingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, cross_val_score
    from sklearn.svm import SVC
    from sklearn.tree import DecisionTreeClassifier
    features, labels = make_classification(4000, 40, n_informative=12, random_state=0)

    def grid_search():
        found = GridSearchCV(SVC(), {'C': [0.5, 1, 2, 4], 'gamma': ['scale', 0.01]}, cv=3,
                             n_jobs=n_jobs).fit(features, labels)
        return [found.best_params_, *found.cv_results_['mean_test_score'].tolist()]

    def cross_validation():
        return cross_val_score(SVC(), features, labels, cv=10, n_jobs=n_jobs).tolist()

    def forest():
        model = RandomForestClassifier(200, random_state=0, n_jobs=n_jobs).fit(features, labels)
        return model.predict_proba(features[:200]).tolist()

    def bagging():
        model = BaggingClassifier(DecisionTreeClassifier(), 60, random_state=0, n_jobs=n_jobs).fit(
            features, labels)
        return model.predict_proba(features[:200]).tolist()

    def stacking():
        models = [('tree', DecisionTreeClassifier(random_state=0)), ('svc', SVC(random_state=0)),
                  ('forest', RandomForestClassifier(60, random_state=0))]
        model = StackingClassifier(models, LogisticRegression(), cv=3, n_jobs=n_jobs).fit(features,
                                                                                          labels)
        return model.predict_proba(features[:200]).tolist()
    return {'GridSearchCV': grid_search, 'cross_val_score': cross_validation,
            'RandomForest': forest, 'Bagging': bagging, 'Stacking': stacking}


def timed(backend, call):
    """Seconds, and what it returned."""
    import joblib
    import dispy   # noqa: F401 -- registers the backend
    began = time.perf_counter()
    with joblib.parallel_config(backend=backend, **BACKENDS[backend]):
        found = call()
    return time.perf_counter() - began, found


def first_call(kind, name, backend, n_jobs):
    """In a process of its own: seconds of the first call."""
    command = [sys.executable, os.path.abspath(__file__), '--one',
               json.dumps([kind, name, backend, n_jobs])]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=dict(
        os.environ, DISPY_DISCOVERY='off')).stdout.split()[-1])


def show(kind, rows, rounds, n_jobs, only):
    """One table."""
    print('%-20s %9s %9s %9s %9s %7s  %s'
          % (kind, 'loky', 'dispy', 'loky', 'dispy', 'ratio', 'equal'))
    print('%-20s %9s %9s %9s %9s' % ('', 'first', 'first', 'median', 'median'))
    for name, call in rows.items():
        if only not in name:
            continue
        first = {backend: first_call(kind, name, backend, n_jobs) for backend in BACKENDS}
        times = {backend: [] for backend in BACKENDS}
        found = {}
        for backend in BACKENDS:   # not measured
            timed(backend, call)
        for _ in range(rounds):
            for backend in BACKENDS:
                seconds, found[backend] = timed(backend, call)
                times[backend].append(seconds)
        loky, own = (statistics.median(times[backend]) for backend in ('loky', 'dispy'))
        print('%-20s %8.3fs %8.3fs %8.3fs %8.3fs %6.2fx  %s'
              % (name, first['loky'], first['dispy'], loky, own, own / loky,
                 found['loky'] == found['dispy']), flush=True)
    print()


KINDS = {'joblib': joblib_rows, 'scikit-learn': sklearn_rows}


def main():
    """The tables, or one call in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--n-jobs', type=int, default=-1)
    parser.add_argument('--only', default='', help='rows whose names contain this')
    parser.add_argument('--one', help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        kind, name, backend, n_jobs = json.loads(options.one)
        print(timed(backend, KINDS[kind](n_jobs)[name])[0])
        return
    os.environ['DISPY_DISCOVERY'] = 'off'
    for kind, make in KINDS.items():
        show(kind, make(options.n_jobs), options.rounds, options.n_jobs, options.only)


if __name__ == '__main__':
    main()
