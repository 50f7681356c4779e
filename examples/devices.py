#!/usr/bin/env python3
"""Jobs that need a device: each sees its own, and no two use the same at the same time.

Real ones are found by themselves, or offered by `dispynode --resource gpu=auto`. Here two are
pretended, so that this runs anywhere."""

import os
import time

import dispy

os.environ['DISPY_RESOURCES'] = 'gpu=2'    # what the node of this program offers
os.environ.pop('CUDA_VISIBLE_DEVICES', None)


def train(model):
    time.sleep(0.1)
    return 'model %d on device %s' % (model, os.environ['CUDA_VISIBLE_DEVICES'])


with dispy.JobCluster(train, nodes='local', resources={'gpu': 1}) as cluster:
    jobs = [cluster.submit(model) for model in range(6)]
    both = cluster.submit(6, dispy_resources={'gpu': 2})
    for result in cluster.gather(jobs):
        print(result)
    print(both.get())
    node = cluster.status().nodes[0]
    print('the node offers', node.resources)
