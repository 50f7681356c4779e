#!/usr/bin/env python3
"""Word count over text files, map and reduce: each job counts one file, the client adds up as they
end.

    python examples/word_count.py [FILE ...]
"""

import collections
import glob
import os
import sys

import dispy


def count(path):
    import re
    with open(path, encoding='utf-8', errors='replace') as file:
        return collections.Counter(re.findall(r'\w+', file.read().lower()))


root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
paths = sys.argv[1:] or sorted(glob.glob(os.path.join(root, '*.py'))
                               + glob.glob(os.path.join(root, '*.md')))
total = collections.Counter()
with dispy.JobCluster(count, nodes='local') as cluster:
    jobs = [cluster.submit(os.path.abspath(path)) for path in paths]
    for job in cluster.as_completed(jobs):
        if job.result is None:
            print(job.exception, file=sys.stderr)
        else:
            total.update(job.result)
print('%d files, %d words, %d different; most of all: %s'
      % (len(paths), sum(total.values()), len(total),
         ', '.join('%s %d' % item for item in total.most_common(3))))
