#!/usr/bin/env python3
"""Files that a program makes come back. Each job runs in a directory of its own, so that all may
write the same name."""

import os
import tempfile

import dispy

PROGRAM = '''#!/bin/sh
sort -n numbers.txt | head -n $1 > smallest.txt
'''

os.chdir(tempfile.mkdtemp())
with open('smallest.sh', 'w') as file:
    file.write(PROGRAM)
os.chmod('smallest.sh', 0o755)
with open('numbers.txt', 'w') as file:
    file.write('\n'.join(str(n * 37 % 101) for n in range(100)) + '\n')

with dispy.JobCluster('./smallest.sh', nodes='local', depends=['numbers.txt'],
                      returns=['smallest.txt'], dest='results/{id}') as cluster:
    jobs = [cluster.submit_job_id('first %d' % count, count) for count in (3, 5)]
    cluster.gather(jobs)
for name in sorted(os.listdir('results')):
    with open(os.path.join('results', name, 'smallest.txt')) as file:
        print(name, '->', *file.read().split())
