#!/usr/bin/env python3
"""joblib over the nodes: `Parallel` as it is, in a `with` that names dispy; so does all of
scikit-learn."""

import math
import sys

try:
    import joblib
except ImportError:
    print('joblib is not installed here (pip install joblib): nothing to show')
    sys.exit()

import dispy   # noqa: F401 -- registers the backend

with joblib.parallel_config(backend='dispy', nodes='local'):
    roots = joblib.Parallel(n_jobs=-1)(joblib.delayed(math.sqrt)(n * n) for n in range(10))
print(roots)
